"""KronA^B and KronA^B_res: Kronecker modules beside a whole feed-forward block.

A. Edalati, M. Tahaei, I. Kobyzev, V. Partovi Nia, J. J. Clark, M. Rezagholizadeh, "KronA: Parameter Efficient Tuning
with Kronecker Adapter", 2022, https://arxiv.org/abs/2212.10650; equations and tables are numbered as in the book
chapter that it became (chapter 4).

Reproduced: the modules of equations 4.5 and 4.6, and what the ablations of tables 4.8 to 4.10 change: sequential
instead of parallel, without a scale, after attention too, a function between the factors, a sigmoid on the residual's
scale.

Symbols, for K modules beside a block that maps ``in_features`` = m1·m2 to ``out_features`` = n1·n2:

=========== ================= ====================================================================
A           (K, m1, n1)       first factors, ``a_shape``
B           (K, m2, n2)       second factors, (in_features / m1, out_features / n1)
bias        (K, out)          first biases, of the modules' outputs
hidden_bias (K, n1, m2)       second biases, of what lies between the factors; with ``biases=2``
s           number            ``scale``, of a module's whole output, its bias included
s_res       (1,)              ``residual``, the learned scale of the residual connection
x, X        (…, in), (m1, m2) a row of the input, and the same row as a row-major matrix
=========== ================= ====================================================================

Readings and deviations:

- "Two modules to each FFN" (section 4.6.2) are two side by side, and the default: table 4.5's 0.07 % of T5-base needs
  two, and the layer norms trained.
- "One or two biases": the first is added to a module's output (only that gives the 0.046 % of one module), the second
  between the factors, whose order is then A first. Without it or a function there, the cheaper order is taken.
- Sequential means "like a normal adapter": the module reads the block's output y and adds to it.
- Equation 4.6 has one residual connection for a block, however many modules that has. The sigmoid acts on s_res, which
  starts at 1 there too. Since B starts at zero, KronA^B starts as the frozen model; KronA^B_res starts as a model with
  the block's input added to its output.
- After attention means self-attention, as in the code of Compacter, which the chapter's adapters build on.
- Table 4.3 has s = 16 for most tasks, 4 for others; the default is 16.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from pareto_adapters._build import attach
from pareto_adapters._kron import multiplications
from pareto_adapters._peft import BlockConfig, Cell, check_choice, check_count
from pareto_adapters._registration import register
from pareto_adapters._stored import Unmerged
from pareto_adapters.krona import Init, KronA, KronACell, check_factors, start_factors

if TYPE_CHECKING:
    from pareto_core import Task

Block = Literal["ffn", "attention"]
Placement = Literal["parallel", "sequential"]
Nonlinearity = Literal["none", "silu", "mish", "relu", "gelu", "gelu_new"]

#: the functions of table 4.9; ``gelu_new`` is the form of GELU with a tanh
NONLINEARITIES = {
    "none": nn.Identity,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
}
#: what may multiply the residual connection: there is none (KronA^B), s_res (KronA^B_res), or its sigmoid
RESIDUALS = ("none", "learned", "sigmoid")


def hidden_a_first(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Contract rows ``x`` (N, m1, m2) with every A of ``a`` (K, m1, n1): (N, n1·K, m2), K running faster than n1.

    That order lets one product with all B, stacked, sum over the modules.
    """
    count, m1, n1 = a.shape
    # Eq. (4.2)
    return torch.bmm(a.permute(2, 0, 1).reshape(n1 * count, m1).expand(len(x), -1, -1), x)


def add_a_first(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``y + scale * sum_k h_k @ b[k]`` for ``h`` as :func:`hidden_a_first` gives it and ``b`` (K, m2, n2)."""
    count, m2, n2 = b.shape
    return torch.addmm(y.reshape(-1, n2), h.reshape(-1, count * m2), b.reshape(-1, n2), alpha=scale).view(y.shape)


def add_b_first(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``y + scale * sum_k x @ kron(a[k], b[k])``, contracting with ``b`` first."""
    (count, m1, n1), (_, m2, n2) = a.shape, b.shape
    h = torch.mm(x.reshape(-1, m2), b.transpose(0, 1).reshape(m2, count * n2)).view(-1, m1 * count, n2)
    factor = a.permute(2, 1, 0).reshape(n1, m1 * count)
    return torch.baddbmm(y.reshape(-1, n1, n2), factor.expand(len(h), -1, -1), h, alpha=scale).view(y.shape)


@dataclasses.dataclass
class KronABConfig(BlockConfig):
    """Configuration of KronA^B and KronA^B_res for ``peft.get_peft_model``.

    ``a_shape`` is (m1, n1) of equation 4.1, ``scale`` is s of equations 4.5 and 4.6, ``init`` as in
    :class:`pareto_adapters.KronAConfig`. Each of the ``blocks`` gets that many ``modules``, each with 1 or 2 ``biases``
    and a ``nonlinearity`` (a key of :data:`NONLINEARITIES`) between its factors. ``residual`` is ``none`` (KronA^B),
    ``learned`` (KronA^B_res) or ``sigmoid``; it needs the parallel ``placement``. Raises :class:`ConfigError` for
    values out of range, and, once it meets a model, :class:`pareto_core.ModelError` for blocks that it does not fit.
    """

    peft_name: ClassVar[str] = "kronablock"

    a_shape: tuple[int, int] = (32, 24)
    scale: float = 16.0
    init: str = "kaiming"
    modules: int = 2
    biases: int = 1
    nonlinearity: str = "none"
    residual: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factors(self)
        check_count(self, "modules")
        check_choice(self, "biases", (1, 2))
        check_choice(self, "nonlinearity", tuple(NONLINEARITIES))
        check_choice(self, "residual", RESIDUALS if self.placement == "parallel" else ("none",))


class KronABCell(Cell):
    """The factors ``A`` (K, m1, n1) and ``B`` (K, m2, n2) of one block, their biases, and the residual's scale."""

    @classmethod
    def refusal(cls, config: KronABConfig, in_features: int, out_features: int) -> str:
        """Say that ``a_shape`` does not factor the block, or that there is nothing to add a residual to."""
        if config.residual != "none" and in_features != out_features:
            return "the residual connection needs a block whose input is as wide as its output"
        return KronACell.refusal(config, in_features, out_features)

    def __init__(self, config: KronABConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        (self.m1, n1), count = config.a_shape, config.modules
        m2, n2 = in_features // self.m1, out_features // n1
        self.scale, self.sequential = config.scale, config.placement == "sequential"
        self.reads_output = self.sequential
        self.A = nn.Parameter(torch.empty(count, self.m1, n1))
        self.B = nn.Parameter(torch.empty(count, m2, n2))
        for a, b in zip(self.A.data, self.B.data, strict=True):
            start_factors(a, b, config.init, in_features)
        self.bias = nn.Parameter(torch.zeros(count, out_features))
        self.hidden_bias = nn.Parameter(torch.zeros(count, n1, m2)) if config.biases == 2 else None
        self.nonlinearity = NONLINEARITIES[config.nonlinearity]()
        self.residual = nn.Parameter(torch.ones(1)) if config.residual != "none" else None
        self.sigmoid = config.residual == "sigmoid"
        a_first, b_first = multiplications(self.m1, n1, m2, n2)
        between = config.biases == 2 or config.nonlinearity != "none"
        self.a_first = between or a_first <= b_first

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Y = FFN(X) + s·X(A⊗B) + s_res·X, where ``y`` is FFN(X); the product is summed over the modules."""
        if self.residual is not None:
            # Eq. (4.6)
            y = torch.addcmul(y, x, self.residual.sigmoid() if self.sigmoid else self.residual)
        x = y if self.sequential else x
        y = torch.add(y, self.bias.sum(0), alpha=self.scale)
        # Eq. (4.5)
        if self.a_first:
            return add_a_first(y, self._hidden(x), self.B, self.scale)
        return add_b_first(y, x, self.A, self.B, self.scale)

    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        h = hidden_a_first(x.reshape(-1, self.m1, self.B.shape[1]), self.A)
        if self.hidden_bias is not None:
            h = h + self.hidden_bias.transpose(0, 1).reshape(h.shape[1:])
        return self.nonlinearity(h)


KronABLayer, KronABTuner = register(KronABConfig, KronABCell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KroneckerBlocks(Unmerged):
    """The fields that KronA^B and KronA^B_res have in common."""

    paper = KronA.paper

    a_shape: tuple[int, int] = (32, 24)
    scale: float = 16.0
    blocks: tuple[Block, ...] = ("ffn",)
    modules: int = 2
    biases: Literal[1, 2] = 1
    nonlinearity: Nonlinearity = "none"
    init: Init = "kaiming"
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges; whether ``a_shape`` factors the blocks is known when there is a model."""
        self.require("a_shape", all(size > 0 for size in self.a_shape), "both sizes must be above 0")
        self.require("blocks", len(self.blocks) > 0, "name at least one block")
        self.require("modules", self.modules > 0, "must be above 0")

    def _config(self, placement: str, residual: str) -> KronABConfig:
        return KronABConfig(
            a_shape=self.a_shape,
            scale=self.scale,
            init=self.init,
            blocks=list(self.blocks),
            modules=self.modules,
            biases=self.biases,
            nonlinearity=self.nonlinearity,
            placement=placement,
            residual=residual,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KronAB(_KroneckerBlocks):
    """KronA^B on the blocks of a task's backbone; its head is trained whole, the rest stays frozen.

    The adapters cannot be merged into a block: they stay in the deployed model, and cost latency there.
    """

    placement: Placement = "parallel"

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put the modules beside (or, sequential, after) the blocks."""
        config = self._config(self.placement, residual="none")
        return attach(self.starting_model(task, model), config, task, self.train_layer_norms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KronABRes(_KroneckerBlocks):
    """KronA^B_res: KronA^B with a learned residual connection; ``sigmoid`` is KronA^B_sigres of table 4.10."""

    residual: Literal["learned", "sigmoid"] = "learned"

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put the modules beside the blocks."""
        config = self._config("parallel", self.residual)
        return attach(self.starting_model(task, model), config, task, self.train_layer_norms)

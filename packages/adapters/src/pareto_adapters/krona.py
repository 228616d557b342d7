"""KronA: a Kronecker product of two small factors beside a frozen weight.

A. Edalati, M. Tahaei, I. Kobyzev, V. Partovi Nia, J. J. Clark, M. Rezagholizadeh, "KronA: Parameter Efficient Tuning
with Kronecker Adapter", 2022, https://arxiv.org/abs/2212.10650; equations and tables are numbered as in the book
chapter that it became (chapter 4).

Reproduced: the module of equations 4.1 to 4.4 and both initialisations of table 4.7. The product and its two orders of
evaluation, equations 4.1 to 4.3, are in :mod:`pareto_adapters._kron`, with their gradients.

Symbols, for one layer W that maps ``in_features`` = m1·m2 to ``out_features`` = n1·n2:

====== ================= ===========================================================
A      (m1, n1)          first Kronecker factor, ``a_shape``
B      (m2, n2)          second factor, (in_features / m1, out_features / n1)
s      number            ``scale``
x, X   (…, in), (m1, m2) a row of the input, and the same row as a row-major matrix
====== ================= ===========================================================

Readings and deviations:

- Equation 4.2 holds as printed for column-major reshapes. Row-major, (A⊗B)x = flatten(A·X·Bᵀ); the rows of equation 4.3
  multiply from the left, so x(A⊗B) = flatten(Aᵀ·X·B). ``nn.Linear.weight`` is transposed: merging adds s·(A⊗B)ᵀ.
- Table 4.1's m1·m2 = n1·n2 is its special case of square layers; here m1 divides in_features and n1 out_features.
- The paper does not say which projections it adapts; query and value are ours, and give table 4.5's parameter count.
- That count, 0.07 % of T5-base, has the layer norms trained: ``train_layer_norms``, off by default.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import nn

from pareto_adapters._build import attach, mergeable_projections, merged
from pareto_adapters._kron import cheaper_order, kron, nearest_shapes
from pareto_adapters._peft import Cell, TunerConfig, check_choice, check_number
from pareto_adapters._registration import register
from pareto_core import ConfigError, Method, Paper

if TYPE_CHECKING:
    from pareto_core import Task

Init = Literal["kaiming", "normal"]


def check_factors(config: Any) -> None:
    """Check ``a_shape``, ``scale`` and ``init`` of a PEFT configuration; ``a_shape`` becomes a tuple.

    Raises :class:`ConfigError`.
    """
    shape = config.a_shape
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ConfigError(type(config).__name__, "a_shape", shape, "expected two integers above 0: (m1, n1)")
    config.a_shape = tuple(shape)
    check_number(config, "scale")
    check_choice(config, "init", get_args(Init))


@torch.no_grad()
def start_factors(a: torch.Tensor, b: torch.Tensor, init: str, width: int) -> None:
    """Fill the factors of a layer of ``width`` inputs as the row ``init`` of table 4.7 says, in place."""
    if init == "normal":
        nn.init.normal_(a, std=width**-0.5)
        nn.init.normal_(b, std=width**-0.5)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)


@dataclasses.dataclass
class KronAConfig(TunerConfig):
    """Configuration of KronA for ``peft.get_peft_model``.

    ``a_shape`` is (m1, n1) of equation 4.1, ``scale`` is s of equation 4.3; ``init`` is a row of table 4.7: ``kaiming``
    (A Kaiming-uniform with a = √5, B zero: the layer starts unchanged) or ``normal`` (both normal, deviation
    1/√in_features). Raises :class:`ConfigError` for values out of range, and, once it meets a model,
    :class:`pareto_core.ModelError` for layers that it does not fit.
    """

    peft_name: ClassVar[str] = "krona"

    a_shape: tuple[int, int] = (32, 24)
    scale: float = 1.0
    init: str = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factors(self)


class KronACell(Cell):
    """The factors ``A`` (m1, n1) and ``B`` (m2, n2) of one layer."""

    mergeable = True
    reads_output = False

    @classmethod
    def refusal(cls, config: KronAConfig, in_features: int, out_features: int) -> str:
        """Say that ``a_shape`` does not factor the layer, and which shapes near it would."""
        m1, n1 = config.a_shape
        if in_features % m1 == 0 and out_features % n1 == 0:
            return ""
        fitting = ", ".join(map(str, nearest_shapes(config.a_shape, in_features, out_features)))
        rule = f"m1 must divide {in_features} and n1 must divide {out_features}"
        return f"a_shape = {config.a_shape}, but {rule}; shapes with about as many parameters: {fitting}"

    def __init__(self, config: KronAConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        (m1, n1), self.scale = config.a_shape, config.scale
        m2, n2 = in_features // m1, out_features // n1
        self.A = nn.Parameter(torch.empty(m1, n1))
        self.B = nn.Parameter(torch.empty(m2, n2))
        self._add = cheaper_order(m1, n1, m2, n2)
        start_factors(self.A, self.B, config.init, in_features)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Y = XW + s·X(A⊗B), where ``y`` is XW (and the layer's bias)."""
        # Eq. (4.3)
        return self._add(y, x, self.A, self.B, self.scale)

    def delta(self) -> torch.Tensor:
        """s·(A⊗B), transposed to the layout of ``nn.Linear.weight``."""
        # Eq. (4.4)
        return self.scale * kron(self.A, self.B).T


KronALayer, KronATuner = register(KronAConfig, KronACell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KronA(Method):
    """KronA on the named projections of a task's backbone; its head is trained whole, the rest stays frozen.

    ``target_modules`` are module names, or ``q``, ``k``, ``v``, ``o`` for whatever the architecture calls them; where
    it fuses them (GPT-2), each gets factors of its own. ``finish`` merges: what is deployed has the backbone's
    architecture, hence its latency and memory.
    """

    paper = Paper(
        title="KronA: Parameter Efficient Tuning with Kronecker Adapter",
        authors="A. Edalati, M. Tahaei, I. Kobyzev, V. Partovi Nia, J. J. Clark, M. Rezagholizadeh",
        year=2022,
        url="https://arxiv.org/abs/2212.10650",
    )

    a_shape: tuple[int, int] = (32, 24)
    scale: float = 1.0
    target_modules: tuple[str, ...] = ("q", "v")
    init: Init = "kaiming"
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges; whether ``a_shape`` factors the layers is known when there is a model."""
        self.require("a_shape", all(size > 0 for size in self.a_shape), "both sizes must be above 0")
        self.require("target_modules", len(self.target_modules) > 0, "name at least one module")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put the factors beside the targeted weights."""
        start = self.starting_model(task, model)
        config = KronAConfig(
            a_shape=self.a_shape,
            scale=self.scale,
            init=self.init,
            **mergeable_projections(start, self.target_modules),
        )
        return attach(start, config, task, self.train_layer_norms)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        """Add s·(A⊗B) to the weights and remove the factors."""
        return merged(model)

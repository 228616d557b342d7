"""Compacter: adapters whose projections are sums of Kronecker products, with factors that all of them share.

R. Karimi Mahabadi, J. Henderson, S. Ruder, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021,
https://arxiv.org/abs/2106.04647.

Reproduced: adapters after every self-attention and feed-forward block as Houlsby et al. place them,
y + U(f(D(y))), whose projections D and U are x·W + b with W the sum over i of A_i ⊗ s_i·t_iᵀ.

Symbols, for a projection from p to q units:

====== ============ ====================================================================================
n      number       terms of a sum, and the size of the first factors; table 4.3's "hypercomplex division"
A      (n, n, n)    the first factors, one tensor for all projections of all layers
s      (n, p / n)   columns of the second factors, which have rank 1; each projection has its own
t      (n, q / n)   their rows
b      (q,)         bias
====== ============ ====================================================================================

Readings and deviations:

- A bottleneck of d // ``reduction_factor`` units; n must divide it and d. Defaults are table 4.3's, n = 4 and 32.
- From the authors' code: f is GELU in its tanh form, A starts normal with deviation 1e-4, s and t start Glorot-uniform
  with gain √2, biases at zero, so that an adapter starts within 1e-6 of the identity.
- Their code forms W in every forward pass; here a row is contracted with s, A and t in turn: n·(p + n² + q)
  multiplications instead of p·q, and W is never held.
- The authors train the layer norms; here that is ``train_layer_norms``, which makes 0.073 % of T5-base, as they print.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from pareto_adapters._build import attach
from pareto_adapters._peft import BlockConfig, Cell, check_count
from pareto_adapters._registration import register
from pareto_adapters._stored import Unmerged
from pareto_core import Paper

if TYPE_CHECKING:
    from pareto_core import Task


def phm(x: torch.Tensor, a: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``x @ sum_i kron(a[i], outer(s[i], t[i]))``, (…, p) to (…, q), with a (n, n, n), s (n, p / n), t (n, q / n)."""
    rows = x.reshape(-1, len(a), s.shape[1])
    mixed = torch.einsum("rji,ijk->rki", rows @ s.T, a)
    return (mixed @ t).reshape(*x.shape[:-1], len(a) * t.shape[1])


class PHMProjection(nn.Module):
    """One projection's own part: ``s`` (n, p / n), ``t`` (n, q / n) and the bias ``b`` (q,)."""

    def __init__(self, n: int, p: int, q: int) -> None:
        super().__init__()
        self.s = nn.Parameter(_glorot(n, p // n))
        self.t = nn.Parameter(_glorot(n, q // n))
        self.b = nn.Parameter(torch.zeros(q))

    def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(…, p) to (…, q), with the shared first factors ``a`` (n, n, n)."""
        return phm(x, a, self.s, self.t) + self.b


def _glorot(n: int, size: int) -> torch.Tensor:
    """``n`` vectors, each started as a matrix of one column: Glorot-uniform with gain √2."""
    bound = math.sqrt(2) * math.sqrt(6 / (1 + size))
    return torch.empty(n, size).uniform_(-bound, bound)


@dataclasses.dataclass
class CompacterConfig(BlockConfig):
    """Configuration of Compacter for ``peft.get_peft_model``.

    ``n`` is the number of terms in each sum, the bottleneck has width // ``reduction_factor`` units. Raises
    :class:`ConfigError` for values out of range, and, once it meets a model, :class:`pareto_core.ModelError` where n
    does not divide the width or the bottleneck.
    """

    peft_name: ClassVar[str] = "compacter"
    placements: ClassVar[tuple[str, ...]] = ("sequential",)

    blocks: list[str] = dataclasses.field(default_factory=lambda: ["ffn", "attention"])
    placement: str = "sequential"
    n: int = 4
    reduction_factor: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "n")
        check_count(self, "reduction_factor")


class CompacterCell(Cell):
    """The adapter after one block. The first block's holds ``A`` (n, n, n), all others read it there."""

    @classmethod
    def refusal(cls, config: CompacterConfig, in_features: int, out_features: int) -> str:
        """Say that n does not divide the width or the bottleneck."""
        r = in_features // config.reduction_factor
        if r and in_features % config.n == 0 and r % config.n == 0:
            return ""
        return (
            f"n = {config.n} must divide the width {in_features} and the bottleneck {in_features} // "
            f"{config.reduction_factor} = {r}; choose n and reduction_factor accordingly"
        )

    def __init__(self, config: CompacterConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        n, r = config.n, in_features // config.reduction_factor
        self.A = nn.Parameter(torch.empty(n, n, n).normal_(std=1e-4))
        self._holder = [self]  # a list, which is no submodule
        self.down = PHMProjection(n, in_features, r)
        self.function = nn.GELU(approximate="tanh")
        self.up = PHMProjection(n, r, out_features)

    def tie(self, first: Cell) -> None:
        """Read the first factors of ``first``."""
        del self.A
        self._holder = [first]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + U(f(D(y))), where ``y`` is the block's output."""
        a = self._holder[0].A
        return y + self.up(self.function(self.down(y, a)), a)


CompacterLayer, CompacterTuner = register(CompacterConfig, CompacterCell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compacter(Unmerged):
    """Compacter on a task's backbone; its head is trained whole, the rest stays frozen."""

    paper = Paper(
        title="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
        authors="R. Karimi Mahabadi, J. Henderson, S. Ruder",
        year=2021,
        url="https://arxiv.org/abs/2106.04647",
    )

    n: int = 4
    reduction_factor: int = 32
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges; whether n divides the widths is known when there is a model."""
        self.require("n", self.n > 0, "must be above 0")
        self.require("reduction_factor", self.reduction_factor > 0, "must be above 0")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put an adapter after every block."""
        config = CompacterConfig(n=self.n, reduction_factor=self.reduction_factor)
        return attach(self.starting_model(task, model), config, task, self.train_layer_norms)

"""LoDA and LoDA+: a non-linear map of low dimension beside a frozen weight.

J. Liu, T. Koike-Akino, P. Wang, M. Brand, Y. Wang, K. Parsons, "LoDA: Low-Dimensional Adaptation of Large Language
Models", NeurIPS workshop on efficient natural language and speech processing 2023,
https://www.merl.com/publications/TR2023-150; equations and tables are numbered as in the book chapter that it became
(chapter 5).

Reproduced: equations 5.1 and 5.2, with the two bottleneck matrices, slopes and fixed norms of section 5.3.1.

Symbols, for one layer W that maps ``in_features`` = d to ``out_features``:

====== ======================= ====================================================================
A      (in_features, r)        down projection
B      (r, out_features)       up projection
V1, V2 (r, r)                  the bottleneck matrices, "a hidden layer's weights" of the chapter
r      number                  bottleneck dimension, 4 as in the chapter
s      number                  ``scale``: what LoRA calls alpha / r (Hu et al.'s table 11: 32 / 4)
====== ======================= ====================================================================

Readings and deviations:

- The order within f1 is lost with figure 5.1. Here it is (linear, LeakyReLU 0.8, layer norm without weights) twice: the
  4r operations that section 5.3.2 counts beside the products are two activations and two norms of r numbers.
- f2 is LeakyReLU 0.8. A layer norm there would scale f1(xA)B to unit size while B is still almost zero, and the map
  would leap at the first step; section 5.3.2 counts no operations for one either.
- LoRA is the special case with V1 or V2 zero, since f1 and f2 map zero to zero. The norm of one number is zero, so at
  r = 1 LoDA is LoRA, and of two numbers ±1, which may be why table 5.3 falls off at r = 2.
- A starts Kaiming-uniform and B at zero, as in LoRA, V1 and V2 as ``nn.Linear`` does: a model starts unchanged.
- ``scale`` is 1 by default, as for the other methods of this package; the chapter takes LoRA's settings, 8 for r = 4.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from pareto_adapters._build import attach, projections
from pareto_adapters._peft import Cell, TunerConfig, check_count, check_number
from pareto_adapters._registration import register
from pareto_adapters._stored import Unmerged
from pareto_core import Measurement, ModelError, Paper

if TYPE_CHECKING:
    from pareto_core import Task

#: the attribute of a model that says how its projections are approximated; its configuration may be others' too
NOTE = "approximated_projections"
#: slope of LeakyReLU for negative numbers (section 5.3.1)
SLOPE = 0.8


def f1(z: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor) -> torch.Tensor:
    """The map of the bottleneck, (…, r) to (…, r); zero where ``v1`` or ``v2`` (r, r) is zero."""
    for v in (v1, v2):
        z = functional.leaky_relu(z @ v, SLOPE)
        z = functional.layer_norm(z, z.shape[-1:])
    return z


def f2(h: torch.Tensor) -> torch.Tensor:
    """The map after B, element by element; zero stays zero."""
    return functional.leaky_relu(h, SLOPE)


@dataclasses.dataclass
class LoDAConfig(TunerConfig):
    """Configuration of LoDA for ``peft.get_peft_model``.

    ``r`` is the bottleneck dimension and ``scale`` multiplies the whole update. ``approximation`` is written when the
    configuration meets its model: ``kind`` and ``size`` as :func:`pareto_adapters.approximation` tells them, empty for
    a model that is not approximated. Raises :class:`pareto_core.ConfigError` for values out of range, and, once a saved
    one meets a model that is approximated otherwise, :class:`pareto_core.ModelError`.
    """

    peft_name: ClassVar[str] = "loda"

    r: int = 4
    scale: float = 1.0
    approximation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "r")
        check_number(self, "scale")
        self._from_file = self.approximation is not None

    def meet(self, model: nn.Module) -> None:
        """Note how the projections of ``model`` are approximated; refuse one unlike that of a saved configuration."""
        note = getattr(model, NOTE, {})
        base = {key: note[key] for key in ("kind", "size") if key in note}
        if self._from_file and self.approximation != base:
            raise ModelError(
                f"the adapter belongs to a model whose projections are {_described(self.approximation)}, but those of "
                f"this {type(model).__name__} are {_described(base)}: approximate the model likewise before loading"
            )
        self.approximation = base


def _described(approximation: dict[str, Any] | None) -> str:
    if not approximation:
        return "not approximated"
    kind, size = approximation["kind"], approximation["size"]
    return f"approximated ({kind}, {'rank' if kind == 'low_rank' else 'keep'} = {size})"


@dataclasses.dataclass
class LoDAPlusConfig(LoDAConfig):
    """Configuration of LoDA+; the fields are those of :class:`LoDAConfig`."""

    peft_name: ClassVar[str] = "lodaplus"


class LoDACell(Cell):
    """``A`` (in_features, r), ``B`` (r, out_features), ``V1`` and ``V2`` (r, r) of one layer."""

    reads_output = False

    def __init__(self, config: LoDAConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.r, self.scale = config.r, config.scale
        self.A = nn.Parameter(torch.empty(in_features, self.r))
        self.B = nn.Parameter(torch.zeros(self.r, out_features))
        self.V1 = nn.Parameter(torch.empty(self.r, self.r))
        self.V2 = nn.Parameter(torch.empty(self.r, self.r))
        for weight in (self.A, self.V1, self.V2):  # stored as x @ weight, so the inputs are the rows: "fan_out"
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), mode="fan_out")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y`` + s·(xAB + f1(xA)B)."""
        z = x @ self.A
        # Eq. (5.1)
        return y + (self.scale * (z + f1(z, self.V1, self.V2))) @ self.B

    def elementwise_macs(self) -> int:
        """Two activations and two norms of r numbers, as section 5.3.2 counts them."""
        return 4 * self.r


class LoDAPlusCell(LoDACell):
    """The same weights, with f2 after the non-linear part."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y`` + s·(xAB + f2(f1(xA)B))."""
        z = x @ self.A
        # Eq. (5.2)
        return y + self.scale * (z @ self.B + f2(f1(z, self.V1, self.V2) @ self.B))


LoDALayer, LoDATuner = register(LoDAConfig, LoDACell)
LoDAPlusLayer, LoDAPlusTuner = register(LoDAPlusConfig, LoDAPlusCell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoDA(Unmerged):
    """LoDA on the named projections of a task's backbone; its head is trained whole, the rest stays frozen.

    ``target_modules`` as in :class:`pareto_adapters.KronA`. What it adds is not linear, so it cannot be merged: the
    deployed model keeps it.
    """

    paper = Paper(
        title="LoDA: Low-Dimensional Adaptation of Large Language Models",
        authors="J. Liu, T. Koike-Akino, P. Wang, M. Brand, Y. Wang, K. Parsons",
        year=2023,
        url="https://www.merl.com/publications/TR2023-150",
    )

    r: int = 4
    scale: float = 1.0
    target_modules: tuple[str, ...] = ("q", "v")
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges."""
        self.require("r", self.r > 0, "must be above 0")
        self.require("target_modules", len(self.target_modules) > 0, "name at least one module")

    def tuner_config(self, model: nn.Module) -> LoDAConfig:
        """PEFT's configuration for the projections of ``model``."""
        return LoDAConfig(r=self.r, scale=self.scale, **projections(model, self.target_modules))

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put the maps beside the targeted weights."""
        start = self.starting_model(task, model)
        return attach(start, self.tuner_config(start), task, self.train_layer_norms)

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """Multiply-accumulates per token of query, key and value: a column of table 5.2."""
        from pareto_adapters.macs import qkv_figures

        return qkv_figures(deployed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoDAPlus(LoDA):
    """LoDA+: as :class:`LoDA`, with a map whose image is no linear space."""

    def tuner_config(self, model: nn.Module) -> LoDAConfig:
        """PEFT's configuration for the projections of ``model``."""
        return LoDAPlusConfig(r=self.r, scale=self.scale, **projections(model, self.target_modules))

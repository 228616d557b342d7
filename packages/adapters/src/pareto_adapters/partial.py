"""Fine-tuning of a part of the weights: the query and value projections, or the top layers.

- FT^{Wq,Wv}, the comparison of chapter 5: J. Liu, T. Koike-Akino, P. Wang, M. Brand, Y. Wang, K. Parsons, "LoDA:
  Low-Dimensional Adaptation of Large Language Models", 2023, https://www.merl.com/publications/TR2023-150.
- FT^{Top2}: X. L. Li, P. Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021,
  https://arxiv.org/abs/2101.00190, whose baseline it is.

Reproduced: their trainable parameters in table 5.1, 50,331,648 and 25,192,448 of GPT2-medium: the matrices without
their biases, and whole layers without the norm after the last.

Deviation: where a model fuses query, key and value, a matrix D of full size beside each part is trained in place of the
part, from zero, and added to it in the end. Gradients are the same, so training is, up to rounding and to weight decay,
which here draws towards the pre-trained weight and there towards zero. A step costs the product with D more.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import peft
import torch
from torch import nn
from torch.nn import functional

from pareto_adapters._build import attach, merged, plain, projections, refuse_tied, train_in_place
from pareto_adapters._peft import Cell, TunerConfig
from pareto_adapters._registration import register
from pareto_adapters._stored import InPlace
from pareto_adapters.loda import LoDA
from pareto_core import Measurement, ModelError, Paper
from pareto_core.weights import check_finite

if TYPE_CHECKING:
    from pareto_core import Task


@dataclasses.dataclass
class FullDeltaConfig(TunerConfig):
    """Configuration of a difference of full rank beside each targeted weight, for ``peft.get_peft_model``."""

    peft_name: ClassVar[str] = "fulldelta"


class FullDeltaCell(Cell):
    """``D`` (out_features, in_features), which starts at zero and is added to the weight."""

    mergeable = True
    reads_output = False

    def __init__(self, config: FullDeltaConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y`` + x·Dᵀ."""
        return y + functional.linear(x, self.D)

    def delta(self) -> torch.Tensor:
        """``D`` itself."""
        return self.D


FullDeltaLayer, FullDeltaTuner = register(FullDeltaConfig, FullDeltaCell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FTProjections(InPlace):
    """Train the weights of the named projections of a task's backbone, and its head; biases stay frozen.

    ``target_modules`` as in :class:`pareto_adapters.KronA`.
    """

    paper = LoDA.paper

    target_modules: tuple[str, ...] = ("q", "v")

    def validate(self) -> None:
        """Check ranges."""
        self.require("target_modules", len(self.target_modules) > 0, "name at least one module")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Unfreeze the weights, or put a difference beside each where they are parts of a fused one."""
        start = self.starting_model(task, model)
        fields = projections(start, self.target_modules)
        if "fused_parts" in fields:
            refuse_tied(start, fields["target_modules"])
            return attach(start, FullDeltaConfig(**fields), task, train_layer_norms=False)
        check_finite(start)
        for name, module in start.named_modules():
            if any(f".{name}".endswith(f".{target}") for target in fields["target_modules"]):
                module.weight.requires_grad_(True)
        train_in_place(start, task, train_layer_norms=False)
        return start

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        """Add the differences to the weights, where there are any."""
        configs = model.peft_config.values() if isinstance(model, peft.PeftModel) else []
        return merged(model) if any(isinstance(config, FullDeltaConfig) for config in configs) else model

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """Multiply-accumulates per token of query, key and value: a column of table 5.2."""
        from pareto_adapters.macs import qkv_figures

        return qkv_figures(deployed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FTTop(InPlace):
    """Train the last ``layers`` transformer layers of a task's backbone, and its head.

    Of an encoder and a decoder, the decoder's.
    """

    paper = Paper(
        title="Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        authors="X. L. Li, P. Liang",
        year=2021,
        url="https://arxiv.org/abs/2101.00190",
    )

    layers: int = 2

    def validate(self) -> None:
        """Check ranges; how many layers there are is known when there is a model."""
        self.require("layers", self.layers > 0, "must be above 0")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Unfreeze the layers."""
        start = self.starting_model(task, model)
        check_finite(start)
        every = transformer_layers(start)
        if self.layers > len(every):
            raise ModelError(f"layers = {self.layers}, but {type(plain(start)).__name__} has {len(every)}")
        for layer in every[-self.layers :]:
            layer.requires_grad_(True)
        train_in_place(start, task, train_layer_norms=False)
        return start


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model``, lowest first: its longest list of modules that lies in no other; a decoder's own.

    Raises :class:`ModelError` where there is no such list.
    """
    model = plain(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        model = model.get_decoder()
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{name}." for name, _ in lists)
    outer = [list(module) for name, module in lists if not name.startswith(inside)]
    if not outer:
        raise ModelError(f"{type(model).__name__} has no list of layers")
    return max(outer, key=len)

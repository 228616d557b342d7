"""Adapter^L: a bottleneck with a layer norm of its own on the output of every layer.

Z. Lin, A. Madotto, P. Fung, "Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer Learning",
Findings of EMNLP 2020, https://arxiv.org/abs/2004.03829; E. J. Hu et al. (LoRA, 2022) call it Adapter^L.

Reproduced: h + W_up·relu(W_down·LN(h) + b_down) + b_up, where h is what a transformer layer passes to the next one,
its feed-forward block added; the layer norm is the adapter's own and trained. W_down is (r, d), W_up (d, r).

Readings and deviations:

- Hu et al. write "after the MLP module and after a LayerNorm"; the authors' code applies the whole adapter to the sum
  that leaves the layer, and so does this.
- The paper does not say how the weights start; here W_up is zero, so that the model starts unchanged.
- Asked for ``output_hidden_states``, transformers reports what its own layers give, before the adapters.
- The default ``r`` is 6: with it, GPT2-medium has the 0.37 M parameters of table 5.1 (368,784), with 224 its 11.09 M.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from pareto_adapters._bottleneck import BottleneckCell, BottleneckConfig
from pareto_adapters._build import attach
from pareto_adapters._registration import register
from pareto_adapters._stored import Unmerged
from pareto_core import Paper

if TYPE_CHECKING:
    from pareto_core import Task


@dataclasses.dataclass
class AdapterLConfig(BottleneckConfig):
    """Configuration of Adapter^L for ``peft.get_peft_model``; ``r`` is the width of the bottleneck."""

    peft_name: ClassVar[str] = "linadapter"
    placements: ClassVar[tuple[str, ...]] = ("sequential",)

    blocks: list[str] = dataclasses.field(default_factory=lambda: ["layer"])
    placement: str = "sequential"
    r: int = 6


class AdapterLCell(BottleneckCell):
    """The adapter after one layer, and its ``norm``."""

    def __init__(self, config: AdapterLConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features, nn.ReLU())
        self.norm = nn.LayerNorm(in_features)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + W_up·relu(W_down·LN(y)), with biases, where ``y`` is the layer's output."""
        return y + self.bottleneck(self.norm(y))


AdapterLLayer, AdapterLTuner = register(AdapterLConfig, AdapterLCell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterL(Unmerged):
    """Adapter^L on a task's backbone; its head is trained whole, the rest stays frozen."""

    paper = Paper(
        title="Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer Learning",
        authors="Z. Lin, A. Madotto, P. Fung",
        year=2020,
        url="https://arxiv.org/abs/2004.03829",
    )

    r: int = 6
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges."""
        self.require("r", self.r > 0, "must be above 0")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put an adapter after every layer."""
        return attach(self.starting_model(task, model), AdapterLConfig(r=self.r), task, self.train_layer_norms)

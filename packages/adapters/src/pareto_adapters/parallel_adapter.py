"""PA: a bottleneck beside a whole feed-forward block, with a scale.

J. He, C. Zhou, X. Ma, T. Berg-Kirkpatrick, G. Neubig, "Towards a Unified View of Parameter-Efficient Transfer
Learning", ICLR 2022, https://arxiv.org/abs/2110.04366.

Reproduced: the scaled parallel adapter on feed-forward blocks, FFN(x) + s·(W_up·relu(W_down·x + b_down) + b_up), with
W_down (r, in) and W_up (out, r); s is fixed. It starts as LoRA does: W_down Kaiming-uniform with a = √5, the rest zero,
so that the model starts unchanged.

The defaults are table 4.3's of the KronA chapter, r = 2 and s = 16; the paper itself has r = 512 and s = 4.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from pareto_adapters._bottleneck import BottleneckCell, BottleneckConfig
from pareto_adapters._build import attach
from pareto_adapters._peft import check_number
from pareto_adapters._registration import register
from pareto_adapters._stored import Unmerged
from pareto_core import Paper

if TYPE_CHECKING:
    from pareto_core import Task


@dataclasses.dataclass
class ParallelAdapterConfig(BottleneckConfig):
    """Configuration of PA for ``peft.get_peft_model``; ``r`` is the width of the bottleneck, ``scale`` is s."""

    peft_name: ClassVar[str] = "paralleladapter"
    placements: ClassVar[tuple[str, ...]] = ("parallel",)

    r: int = 2
    scale: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "scale")


class ParallelAdapterCell(BottleneckCell):
    """The adapter beside one block."""

    reads_output = False

    def __init__(self, config: ParallelAdapterConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features, nn.ReLU())
        self.scale = config.scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + s·(W_up·relu(W_down·x)), with biases, where ``x`` is the block's input and ``y`` its output."""
        return torch.add(y, self.bottleneck(x), alpha=self.scale)


ParallelAdapterLayer, ParallelAdapterTuner = register(ParallelAdapterConfig, ParallelAdapterCell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Unmerged):
    """PA on a task's backbone; its head is trained whole, the rest stays frozen."""

    paper = Paper(
        title="Towards a Unified View of Parameter-Efficient Transfer Learning",
        authors="J. He, C. Zhou, X. Ma, T. Berg-Kirkpatrick, G. Neubig",
        year=2022,
        url="https://arxiv.org/abs/2110.04366",
    )

    r: int = 2
    scale: float = 16.0
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges."""
        self.require("r", self.r > 0, "must be above 0")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put an adapter beside every feed-forward block."""
        config = ParallelAdapterConfig(r=self.r, scale=self.scale)
        return attach(self.starting_model(task, model), config, task, self.train_layer_norms)

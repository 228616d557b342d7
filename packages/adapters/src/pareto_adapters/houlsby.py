"""Adapter: a bottleneck with a residual connection after every attention and feed-forward block.

N. Houlsby, A. Giurgiu, S. Jastrzebski, B. Morrone, Q. de Laroussilhe, A. Gesmundo, M. Attariyan, S. Gelly,
"Parameter-Efficient Transfer Learning for NLP", ICML 2019, https://arxiv.org/abs/1902.00751.

Reproduced: h + W_up·f(W_down·h + b_down) + b_up on the output h of a block, before the model adds the block's input;
W_down (r, d) and W_up (d, r) start normal with deviation 0.01, truncated at two deviations, the biases at zero, so that
the adapter starts near the identity.

Readings and deviations:

- The paper leaves f open; here it is GELU in its tanh form, as in the code of Compacter, with which the KronA chapter
  ran its "Adapter", and whose places are taken too: self-attention, not cross-attention.
- The default ``r`` is 1, which table 4.5's 0.07 % of T5-base needs, layer norms trained; the paper used 8 to 256.
- The paper always trains the layer norms; here that is ``train_layer_norms``, off by default as in all methods.
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

#: the deviation of the weights at the start
DEVIATION = 0.01


@dataclasses.dataclass
class HoulsbyConfig(BottleneckConfig):
    """Configuration of Adapter for ``peft.get_peft_model``; ``r`` is the width of the bottleneck."""

    peft_name: ClassVar[str] = "houlsby"
    placements: ClassVar[tuple[str, ...]] = ("sequential",)

    blocks: list[str] = dataclasses.field(default_factory=lambda: ["ffn", "attention"])
    placement: str = "sequential"


class HoulsbyCell(BottleneckCell):
    """The adapter after one block."""

    def __init__(self, config: HoulsbyConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features, nn.GELU(approximate="tanh"))
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + W_up·f(W_down·y), with biases, where ``y`` is the block's output."""
        return y + self.bottleneck(y)


HoulsbyLayer, HoulsbyTuner = register(HoulsbyConfig, HoulsbyCell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Houlsby(Unmerged):
    """Adapter on a task's backbone; its head is trained whole, the rest stays frozen."""

    paper = Paper(
        title="Parameter-Efficient Transfer Learning for NLP",
        authors="N. Houlsby, A. Giurgiu, S. Jastrzebski, B. Morrone, Q. de Laroussilhe, A. Gesmundo, M. Attariyan, "
        "S. Gelly",
        year=2019,
        url="https://arxiv.org/abs/1902.00751",
    )

    r: int = 1
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges."""
        self.require("r", self.r > 0, "must be above 0")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put an adapter after every block."""
        return attach(self.starting_model(task, model), HoulsbyConfig(r=self.r), task, self.train_layer_norms)

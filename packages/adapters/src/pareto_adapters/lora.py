"""LoRA: a product of two low-rank factors beside a frozen weight, by PEFT's own tuner.

E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen, "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685.

Defaults are those of the KronA chapter that compares with it: rank 1 on the query and value projections, and a scaling
factor of one (``alpha`` equal to ``r``). Where a model fuses its projections (GPT-2's ``c_attn``), PEFT adapts the
whole layer: rank r then has as many parameters as on query and value alone, with one A for the three. Symbols:
W + (alpha / r)·B·A with A (r, in_features) and B (out_features, r).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from pareto_adapters._build import attach, mergeable_projections, merged
from pareto_core import Measurement, Method, Paper

if TYPE_CHECKING:
    from torch import nn

    from pareto_core import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """LoRA on the named projections of a task's backbone; its head is trained whole, the rest stays frozen.

    ``alpha`` None means ``r``: a scaling factor of one. ``target_modules`` as in :class:`pareto_adapters.KronA`.
    """

    paper = Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        authors="E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen",
        year=2022,
        url="https://arxiv.org/abs/2106.09685",
    )

    r: int = 1
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q", "v")
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges."""
        self.require("r", self.r > 0, "must be above 0")
        self.require("alpha", self.alpha is None or self.alpha > 0, "must be above 0")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("target_modules", len(self.target_modules) > 0, "name at least one module")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put the factors beside the targeted weights."""
        start = self.starting_model(task, model)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.r if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=mergeable_projections(start, self.target_modules)["target_modules"],
        )
        return attach(start, config, task, self.train_layer_norms)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        """Add the product of the factors to the weights and remove them."""
        return merged(model)

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """Multiply-accumulates per token of query, key and value: a column of table 5.2."""
        from pareto_adapters.macs import qkv_figures

        return qkv_figures(deployed)

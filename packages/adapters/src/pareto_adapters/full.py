"""Full fine-tuning: every parameter is trained. The reference that parameter-efficient methods are compared with.

J. Devlin, M.-W. Chang, K. Lee, K. Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", NAACL 2019, https://arxiv.org/abs/1810.04805, which made it the usual way.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pareto_adapters._stored import InPlace
from pareto_core import Paper
from pareto_core.weights import check_finite

if TYPE_CHECKING:
    from torch import nn

    from pareto_core import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuning(InPlace):
    """Train every parameter of a task's backbone."""

    paper = Paper(
        title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        authors="J. Devlin, M.-W. Chang, K. Lee, K. Toutanova",
        year=2019,
        url="https://arxiv.org/abs/1810.04805",
    )

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Unfreeze everything."""
        start = self.starting_model(task, model)
        check_finite(start)
        return start.requires_grad_(True)

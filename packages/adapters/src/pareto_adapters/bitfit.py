"""BitFit: train the biases and nothing else.

E. Ben Zaken, Y. Goldberg, S. Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022, https://arxiv.org/abs/2106.10199.

Reproduced: every parameter called ``bias`` is trained, layer norms' included. Deviation: a model whose linear layers
have no bias at all (T5, Llama) first gets one, of zeros, in each of them, the output layer included; the KronA chapter
lists BitFit on T5, which needs it. Names decide, and exactly: T5's ``relative_attention_bias`` is an embedding and
stays frozen. Only the base model counts: adapters in it neither get biases nor are taken for layers that have some.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from pareto_adapters._build import plain, train_in_place
from pareto_adapters._peft import LinearMap, base_modules
from pareto_adapters._stored import InPlace
from pareto_core import Paper
from pareto_core.weights import add_bias, check_finite

if TYPE_CHECKING:
    from pareto_core import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(InPlace):
    """Train the biases of a task's backbone and its head; with ``train_layer_norms`` also the norms' scales."""

    paper = Paper(
        title="BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        authors="E. Ben Zaken, Y. Goldberg, S. Ravfogel",
        year=2022,
        url="https://arxiv.org/abs/2106.10199",
    )

    train_layer_norms: bool = False

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Add biases where the model has none, and unfreeze all of them."""
        start = self.starting_model(task, model)
        check_finite(start)
        modules = base_modules(plain(start))
        body = [module for name, module in modules if not _inside(name, task.spec.head)]
        if not any(_has_bias(module) for module in body):
            for module in body:
                add_bias(module)
        for _, module in modules:
            for kind, parameter in module.named_parameters(recurse=False):
                if kind in ("bias", "in_proj_bias"):
                    parameter.requires_grad_(True)
        train_in_place(start, task, self.train_layer_norms)
        return start


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, LinearMap)) and module.bias is not None


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)

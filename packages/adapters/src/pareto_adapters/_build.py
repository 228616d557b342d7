"""What the methods of this package share when they build, finish and save: targets, trainable parts, merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from pareto_adapters._peft import FUSED, refuse_shared, shared_weights
from pareto_core import ModelError
from pareto_core.errors import suggest
from pareto_core.weights import check_finite, unfreeze

if TYPE_CHECKING:
    from pareto_core import Task

#: how architectures spell the projections of attention; a name that a model has as it is means itself
SPELLINGS = {
    "q": ("q", "query", "q_proj", "q_lin", "query_proj", "to_q", "wq"),
    "k": ("k", "key", "k_proj", "k_lin", "key_proj", "to_k", "wk"),
    "v": ("v", "value", "v_proj", "v_lin", "value_proj", "to_v", "wv"),
    "o": ("o", "o_proj", "out_proj", "out_lin", "attention.output.dense", "attn.c_proj", "to_out", "wo"),
}
#: how architectures spell one layer that computes query, key and value side by side
FUSED_SPELLINGS = ("c_attn",)


def resolve_targets(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Turn ``q``, ``k``, ``v``, ``o`` into the names that ``model`` uses; other names must exist.

    A model that mixes spellings (an encoder and a decoder of different families) gets all that it has. Raises
    :class:`ModelError` naming the linear layers that exist, and for a model that holds adapters already.
    """
    refuse_adapters(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]

    def present(target: str) -> bool:
        return any(name == target or name.endswith(f".{target}") for name in linear)

    found: list[str] = []
    for name in names:
        spelled = [name] if present(name) else [s for s in SPELLINGS.get(name, ()) if present(s)]
        if not spelled:
            known = suggest(name, {layer.rpartition(".")[2] for layer in linear})
            raise ModelError(f"target module {name!r} is not a linear layer of {type(model).__name__}; {known}")
        found += spelled
    return found


def refuse_adapters(model: nn.Module) -> None:
    """Raise :class:`ModelError` for a model that holds adapters, or that PEFT wraps for a prefix."""
    if any(isinstance(module, (BaseTunerLayer, peft.PeftModel)) for module in model.modules()):
        raise ModelError("the model holds adapters already: finish (merge) them in an earlier stage first")


def projections(model: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a :class:`~pareto_adapters._peft.TunerConfig` that adapt the projections ``names`` of ``model``.

    As :func:`resolve_targets`, and on a model that fuses its projections, parts of the fused layer.
    """
    wanted = [name for name in names if name in FUSED]
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    fused = [name for name in FUSED_SPELLINGS if name in layers]
    if not fused or not wanted:
        return {"target_modules": resolve_targets(model, names)}
    if len(wanted) < len(names):
        other = ", ".join(name for name in names if name not in FUSED)
        raise ModelError(
            f"{type(model).__name__} has q, k and v in one layer ({fused[0]}), whose parts are adapted one by one: "
            f"adapt {other} in another stage"
        )
    return {"target_modules": resolve_targets(model, tuple(fused)), "fused_parts": wanted}


def mergeable_projections(model: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """As :func:`projections`, for adapters that ``finish`` merges: weights that other modules share are refused."""
    fields = projections(model, names)
    refuse_tied(model, fields["target_modules"])
    return fields


def refuse_tied(model: nn.Module, targets: list[str]) -> None:
    """Raise :class:`ModelError` where a module of ``model`` that ``targets`` name shares its weight with another."""
    shared = shared_weights(model)
    for name, module in model.named_modules():
        if any(f".{name}".endswith(f".{target}") for target in targets):
            refuse_shared(name, module, shared)


def attach(model: nn.Module, config: peft.PeftConfig, task: Task, train_layer_norms: bool) -> nn.Module:
    """Return ``model`` with the tuner of ``config``, which is trained together with what was trainable before.

    The head and the layer norms are trained in place, not as PEFT's ``modules_to_save``: one way for every method,
    which needs no second copy and which merging cannot lose.
    """
    refuse_adapters(model)
    check_finite(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuned = peft.get_peft_model(model, config)
    for parameter in trainable:
        parameter.requires_grad_(True)
    train_in_place(model, task, train_layer_norms)
    return tuned


def merged(model: nn.Module) -> nn.Module:
    """Return the plain model that :func:`attach` was given, with the adapters added to its weights."""
    if not isinstance(model, peft.PeftModel):
        raise ModelError(f"{type(model).__name__} holds no adapters: finish takes what build returned")
    return model.merge_and_unload(safe_merge=True)


def plain(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's wrapper, whose modules have the names that the task knows; others as they are."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def train_in_place(model: nn.Module, task: Task, train_layer_norms: bool) -> None:
    """Unfreeze the head of ``task`` and, where asked, every layer norm."""
    unfreeze(plain(model), task.spec.head)
    if train_layer_norms:
        for norm in layer_norms(model):
            norm.requires_grad_(True)


def layer_norms(model: nn.Module) -> list[nn.Module]:
    """Every layer norm of ``model``; those of an architecture's own (``T5LayerNorm``, ``LlamaRMSNorm``) by class name.

    Raises :class:`ModelError` where there is none.
    """
    found = [
        m for m in model.modules() if isinstance(m, nn.LayerNorm) or type(m).__name__.endswith(("LayerNorm", "RMSNorm"))
    ]
    if not found:
        raise ModelError(f"{type(model).__name__} has no layer norms to train: set train_layer_norms to false")
    return found

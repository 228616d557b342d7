"""Freezing, counting, checking and storing weights. Files are safetensors and JSON; nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pareto_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


def freeze(model: T) -> T:
    """Switch off the gradient of every parameter, in place; a mapping of models and None are accepted."""
    from torch import nn

    modules = model.values() if isinstance(model, Mapping) else [model]
    for module in modules:
        if isinstance(module, nn.Module):
            module.requires_grad_(False)
    return model


def unfreeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Switch on the gradient of the submodules called ``names`` (a task's head, the layer norms).

    Raises :class:`ModelError` where a name is not a submodule.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            top = ", ".join(dict(model.named_children()))
            raise ModelError(f"{type(model).__name__} has no submodule {name!r}; top level: {top}")
        modules[name].requires_grad_(True)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters; sizes partitioned by ZeRO-3 count in full."""
    sizes = [(p.requires_grad, int(getattr(p, "ds_numel", p.numel()))) for p in model.parameters()]
    return sum(size for trainable, size in sizes if trainable), sum(size for _, size in sizes)


def weight_bytes(deployed: Any) -> int:
    """Bytes of the weights of what is deployed: its own ``weight_bytes``, or the sum over parameters and buffers."""
    own = getattr(deployed, "weight_bytes", None)
    if own is not None:
        return int(own() if callable(own) else own)
    from torch import nn

    if not isinstance(deployed, nn.Module):
        raise ModelError(f"{type(deployed).__name__} is deployed but has no weight_bytes")
    tensors = {t.data_ptr(): t for t in [*deployed.parameters(), *deployed.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check_finite(model: nn.Module) -> None:
    """Raise :class:`ModelError` naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise ModelError(f"weight {name} holds NaN or infinite values: the model cannot be used")


def save_transformer(model: Any, directory: Path) -> None:
    """Write a transformers model: ``config.json`` and ``model.safetensors``, whose names are those of the model.

    Left to itself, transformers writes the names of its earlier versions (ViT's), which no model here has.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model: its method must define save and load")
    model.save_pretrained(directory, save_original_format=False)


def load_transformer(directory: Path, change: Callable[[nn.Module], object] | None = None) -> Any:
    """Read what :func:`save_transformer` wrote, as the class that was saved, in evaluation mode.

    Biases that a method added to bias-free linear layers are added again, and ``change`` makes whatever other changes
    the method made to the architecture; any difference that is left between the file and the model raises
    :class:`DataError`.
    """
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import load_model

    path = directory / "config.json"
    if not path.is_file():
        raise DataError(f"no config.json in {directory}: not a saved model")
    name = (json.loads(path.read_text()).get("architectures") or [None])[0]
    cls = getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise DataError(f"{path}: {name!r} is not a model class of transformers")
    config = transformers.AutoConfig.from_pretrained(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        dtype = file.get_tensor(min(keys)).dtype
    model: Any = cls(config).to(dtype)
    _add_biases(model, keys)
    if change is not None:
        change(model)
    missing, unexpected = load_model(model, directory / "model.safetensors", strict=False)
    if missing or unexpected:
        raise DataError(f"{directory}: missing weights {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}")
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def _add_biases(model: nn.Module, keys: set[str]) -> None:
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and f"{name}.bias" in keys:
            add_bias(module)


def add_bias(linear: nn.Module) -> None:
    """Give a bias-free linear layer a bias of zeros, in place; one that has a bias is left alone."""
    import torch
    from torch import nn

    if isinstance(linear, nn.Linear) and linear.bias is None:
        zeros = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
        linear.bias = nn.Parameter(zeros)

"""Freezing, counting, checking and storing weights. Files are safetensors and JSON; nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pareto_core.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")

#: the files of a model
WEIGHTS, BUFFERS = "model.safetensors", "buffers.json"
#: the floating dtypes of safetensors, as torch calls them
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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

    Left to itself, transformers writes the names of its earlier versions (ViT's), which no model here has. Buffers that
    are computed rather than stored are noted in ``buffers.json`` where they were cast, as ``model.bfloat16()`` does.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model: its method must define save and load")
    model.save_pretrained(directory, save_original_format=False)
    cast = {name: str(b.dtype).removeprefix("torch.") for name, b in _computed_buffers(model) if b.element_size() < 4}
    if cast:
        (directory / BUFFERS).write_text(json.dumps(cast, indent=2) + "\n")


def load_transformer(directory: Path, change: Callable[[nn.Module], object] | None = None) -> Any:
    """Read what :func:`save_transformer` wrote, as the class that was saved, in evaluation mode.

    ``change`` makes whatever changes a method made to the architecture; biases that were added to bias-free linear
    layers are then added again. Every weight has the dtype that it has in the file. Raises :class:`DataError` for a
    directory that holds no model, and for any difference that is left between the file and the model.
    """
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import load_model

    path = directory / "config.json"
    require_files(directory, path.name)
    name = (json.loads(path.read_text()).get("architectures") or [None])[0]
    cls = getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise DataError(f"{path}: {name!r} is not a model class of transformers")
    require_files(directory, WEIGHTS)
    config = transformers.AutoConfig.from_pretrained(directory)
    with safe_open(directory / WEIGHTS, "pt") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    model: Any = cls(config)
    if change is not None:
        change(model)
    _add_biases(model, dtypes)
    _cast(model, {key: DTYPES[dtype] for key, dtype in dtypes.items() if dtype in DTYPES}, directory)
    try:
        missing, unexpected = load_model(model, directory / WEIGHTS, strict=False)
    except RuntimeError as error:  # sizes that differ
        raise DataError(f"{directory}: the weights do not fit {name}: {error}") from error
    if missing or unexpected:
        raise DataError(f"{directory}: missing weights {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}")
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def require_files(directory: Path, *names: str) -> None:
    """Raise :class:`DataError` naming the first of the files that ``directory`` lacks."""
    for name in names:
        if not (Path(directory) / name).is_file():
            raise DataError(f"no {name} in {directory}: not a saved model")


def _cast(model: nn.Module, dtypes: Mapping[str, str], directory: Path) -> None:
    """Give the stored weights the dtypes of the file, and computed buffers those that were noted."""
    import torch

    path = directory / BUFFERS
    noted = json.loads(path.read_text()) if path.is_file() else {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        dtype = str(dtypes.get(name, noted.get(name)))
        if dtype in DTYPES.values():
            tensor.data = tensor.data.to(getattr(torch, dtype))


def _computed_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names and values of the floating buffers that no file holds, such as the frequencies of rotary embeddings."""
    stored = model.state_dict().keys()
    return [(name, b) for name, b in model.named_buffers() if b.is_floating_point() and name not in stored]


def _add_biases(model: nn.Module, keys: Container[str]) -> None:
    for name, module in model.named_modules():
        if f"{name}.bias" in keys:
            add_bias(module)


def add_bias(linear: nn.Module) -> None:
    """Give a bias-free linear layer a bias of zeros, in place; one that has a bias is left alone, and other modules.

    A linear layer is a module with ``out_features`` whose parameter ``bias`` is None.
    """
    import torch
    from torch import nn

    size, parameters = getattr(linear, "out_features", None), linear._parameters
    if isinstance(size, int) and "bias" in parameters and parameters["bias"] is None:
        weight: Any = linear.weight
        linear.bias = nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device))

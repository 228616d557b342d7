"""Back to plain torch: a transformers model from quantised matrices and the other tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from pareto_core.errors import ModelError
from pareto_cpu_runtime.quantise.matrix import QuantisedLinear
from pareto_cpu_runtime.quantise.operators import is_linear, output_embedding, set_weight, weight_of


def model_class(architecture: str) -> Any:
    """Return the transformers class of that name; raises :class:`ModelError` where there is none."""
    import transformers

    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ModelError(f"{architecture!r} is not a model class of transformers")
    return found


def build_model(
    config: Any,
    architecture: str,
    matrices: Mapping[str, QuantisedLinear],
    tensors: Mapping[str, torch.Tensor],
    generation_config: Any = None,
) -> Any:
    """Return a model in fp32, in evaluation mode, with the dequantised ``matrices`` and the other ``tensors``.

    ``generation_config`` None leaves what transformers makes of ``config``. An output embedding that was quantised no
    longer shares its weight with the input's. Raises :class:`ModelError` where names or shapes differ from the
    architecture's.
    """
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    if not isinstance(config, model_class(architecture).config_class):
        raise ModelError(f"{architecture} is not configured by a {type(config).__name__}")
    model = model_class(architecture)(config)
    head = output_embedding(model)
    if head in matrices and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        model = model_class(architecture)(config)
    model = model.float()
    given = {f"{name}.weight" for name in matrices} | set(tensors)
    missing, unexpected = set(model.state_dict()) - given, given - set(model.state_dict())
    if missing or unexpected:
        raise ModelError(f"{architecture}: missing weights {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}")
    _fill(model, matrices, tensors)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def _fill(model: Any, matrices: Mapping[str, QuantisedLinear], tensors: Mapping[str, torch.Tensor]) -> None:
    state = model.state_dict()
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise ModelError(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(state[name].shape)}")
        state[name].copy_(tensor)
    for name, matrix in matrices.items():
        module = model.get_submodule(name)
        if not is_linear(module) or tuple(weight_of(module).shape) != matrix.shape:
            raise ModelError(f"{name} is not a linear operator of {matrix.shape[0]} x {matrix.shape[1]}")
        set_weight(module, matrix.dequantise())

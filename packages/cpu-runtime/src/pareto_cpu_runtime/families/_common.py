"""What several families share: checks of a config, rotary tables, ALiBi slopes."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from pareto_core.errors import ConfigError, UnsupportedError
from pareto_cpu_runtime.families.description import ACTIVATIONS, Rotary

if TYPE_CHECKING:
    from numpy.typing import NDArray


def activation_of(config: Any, field: str) -> str:
    """Our name of the activation that ``config.field`` names. Raises :class:`ConfigError` for one we have not."""
    name = getattr(config, field)
    if name not in ACTIVATIONS:
        raise ConfigError(type(config).__name__, field, name, "expected one of " + ", ".join(sorted(ACTIVATIONS)))
    return ACTIVATIONS[name]


def refuse(config: Any, field: str, wanted: Any, why: str) -> None:
    """Raise :class:`UnsupportedError` unless ``config.field`` is ``wanted`` (or missing)."""
    value = getattr(config, field, wanted)
    if value != wanted:
        raise UnsupportedError(f"{config.model_type}: {field} = {value!r} is not supported: {why}")


def head_size(config: Any) -> int:
    """``head_dim`` of the config, or width / heads."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.num_attention_heads % (getattr(config, "num_key_value_heads", None) or 1):
        raise ConfigError(
            type(config).__name__,
            "num_key_value_heads",
            config.num_key_value_heads,
            f"must divide num_attention_heads = {config.num_attention_heads}",
        )
    return int(size)


def rotary_of(config: Any, class_name: str, dim: int) -> Rotary:
    """Rotary positions as transformers' own module ``class_name`` makes them, whatever the rope type.

    Types whose frequencies change with the length of the text (dynamic, longrope) hold up to the length that the model
    was first trained on; the builder refuses a longer cache.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    longest = None
    if kind in ("dynamic", "longrope"):
        original = parameters.get("original_max_position_embeddings")
        longest = original or getattr(config, "original_max_position_embeddings", None)
        longest = int(longest or config.max_position_embeddings)
    return Rotary(dim=dim, table=functools.partial(_rotary_table, config, class_name, dim), longest=longest)


def _rotary_table(config: Any, class_name: str, dim: int, length: int) -> NDArray[np.float32]:
    import torch

    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    with torch.no_grad():
        cos, sin = getattr(module, class_name)(config)(torch.zeros(1), torch.arange(length)[None])
    cos, sin = cos[0].float().numpy(), sin[0].float().numpy()
    if cos.shape[-1] != dim:
        raise UnsupportedError(f"{config.model_type}: rotary positions of {cos.shape[-1]} dimensions, expected {dim}")
    return np.ascontiguousarray(np.concatenate((cos[:, : dim // 2], sin[:, : dim // 2]), axis=1))


def sinusoid_table(dim: int, length: int) -> NDArray[np.float32]:
    """Cosines and sines of the original rotary positions, base 10,000: fp32 (length, dim)."""
    frequencies = (1.0 / (10000 ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.ascontiguousarray(np.concatenate((np.cos(angles), np.sin(angles)), axis=1), dtype=np.float32)

"""Architectures that the runtime knows: a transformers config goes in, a :class:`Decoder` description comes out."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

from pareto_core.errors import ConfigError, ModelError, ParetoError, UnsupportedError

if TYPE_CHECKING:
    from pareto_cpu_runtime.families.description import Decoder
    from pareto_cpu_runtime.quantise.fusion import Fusion

#: transformers' model type -> the file that describes it
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gptj": "gptj",
    "gpt_neox": "gpt_neox",
    "mpt": "mpt",
    "falcon": "falcon",
    "phi": "phi",
    "phi3": "phi3",
}
#: modules that transformers writes to files under another name than the model's own: model type -> {file's: model's}
FILE_NAMES = {"gpt_neox": {"embed_out": "lm_head"}}


def describe(config: Any) -> Decoder:
    """Describe the model of a transformers config.

    Raises :class:`UnsupportedError` for an architecture or an option that the runtime has not, naming what it has,
    :class:`ConfigError` for values that do not fit together, and :class:`ModelError` for a config that cannot be used.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedError(f"the runtime has no architecture {kind!r}; it has {', '.join(sorted(FAMILIES))}")
    try:
        decoder = importlib.import_module(f"pareto_cpu_runtime.families.{FAMILIES[kind]}").describe(config)
        _check(decoder)
    except ParetoError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(config).__name__}: its values cannot be used ({type(error).__name__}: {error})"
        ) from error
    return decoder


def _check(decoder: Decoder) -> None:
    """Raise :class:`ConfigError` for sizes that no decoder has."""
    owner = type(decoder.config).__name__
    for field in ("vocabulary", "width", "heads", "kv_heads", "head_dim", "ffn", "positions"):
        value = getattr(decoder, field)
        if type(value) is not int or value < 1:
            raise ConfigError(owner, field, value, "must be a whole number, at least 1")
    if not decoder.blocks:
        raise ConfigError(owner, "blocks", 0, "must be at least 1")
    if decoder.heads % decoder.kv_heads:
        raise ConfigError(owner, "kv_heads", decoder.kv_heads, f"must divide heads = {decoder.heads}")
    rotary = decoder.rotary
    if rotary is not None and not (2 <= rotary.dim <= decoder.head_dim and rotary.dim % 2 == 0):
        raise ConfigError(owner, "rotary dimensions", rotary.dim, f"must be even, from 2 to {decoder.head_dim}")
    norms = [decoder.final_norm, *(norm for block in decoder.blocks for norm in (block.attention_norm, block.ffn_norm))]
    for field, value in [("scale", decoder.scale), *(("epsilon", norm.epsilon) for norm in norms)]:
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ConfigError(owner, field, value, "must be a finite number above 0")
    for block in decoder.blocks:
        if type(block.window) is not int or block.window < 0:
            raise ConfigError(owner, "window", block.window, "must be a whole number, at least 0")


def model_name(kind: str, name: str) -> str:
    """The model's own name of the tensor that a file of the model type ``kind`` calls ``name``."""
    for written, own in FILE_NAMES.get(kind, {}).items():
        if name.startswith(f"{written}."):
            return own + name.removeprefix(written)
    return name


def fusions(config: Any) -> list[Fusion]:
    """Matrices that are best stored as one: operators that the runtime makes of several whole modules."""
    from pareto_cpu_runtime.quantise.fusion import Fusion

    made = []
    for operator in describe(config).operators():
        modules = tuple(part.module for part in operator.parts)
        if len(set(modules)) > 1 and all(part.index is None for part in operator.parts):
            made.append(Fusion(operator.name, modules, "interleave" if operator.gated else "concat"))
    return made

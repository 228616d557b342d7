"""Architectures that the runtime knows: a transformers config goes in, a :class:`Decoder` description comes out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pareto_core.errors import UnsupportedError

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


def describe(config: Any) -> Decoder:
    """Describe the model of a transformers config.

    Raises :class:`UnsupportedError` for an architecture or an option that the runtime has not, naming what it has, and
    :class:`ConfigError` for values that do not fit together.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedError(f"the runtime has no architecture {kind!r}; it has {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(f"pareto_cpu_runtime.families.{FAMILIES[kind]}").describe(config)


def fusions(config: Any) -> list[Fusion]:
    """Matrices that are best stored as one: operators that the runtime makes of several whole modules."""
    from pareto_cpu_runtime.quantise.fusion import Fusion

    made = []
    for operator in describe(config).operators():
        modules = tuple(part.module for part in operator.parts)
        if len(set(modules)) > 1 and all(part.index is None for part in operator.parts):
            made.append(Fusion(operator.name, modules, "interleave" if operator.gated else "concat"))
    return made

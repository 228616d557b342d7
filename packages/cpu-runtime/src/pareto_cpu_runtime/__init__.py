"""INT4 quantisation of decoders, and a native runtime that generates with them on x86 CPUs.

Names are imported when they are used: importing this package imports neither torch nor the native library.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AutoResult": "quantise",
    "Engine": "batching",
    "ParallelRuntime": "parallel",
    "QuantisationConfig": "quantise",
    "QuantisedModel": "quantise",
    "Request": "batching",
    "Runtime": "runtime",
    "Sampling": "sampling",
    "accelerate_generate": "drop_in",
    "auto_quantize": "quantise",
    "dequantise": "checkpoint",
    "load_packed": "checkpoint",
    "quantize": "quantise",
    "save_packed": "checkpoint",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

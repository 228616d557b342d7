"""INT4 quantisation of decoders, and a native runtime that generates with them on x86 CPUs.

>>> from pareto_cpu_runtime import Runtime  # doctest: +SKIP
>>> Runtime.from_pretrained("path/to/model").generate(ids)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Engine": "batching",
    "Request": "batching",
    "Runtime": "runtime",
    "Sampling": "sampling",
    "accelerate_generate": "drop_in",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

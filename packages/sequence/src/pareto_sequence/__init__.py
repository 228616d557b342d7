"""Long-sequence models: TCNCA, MEGA, and the variants between them.

Names are imported when they are used: importing this package imports neither torch nor the native library.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DampedEMA": "ema",
    "SequenceConfig": "configuration",
    "SequenceForCausalLM": "modeling",
    "SequenceForSequenceClassification": "modeling",
    "TCN": "tcn",
    "depthwise_conv": "conv",
    "load_model": "modeling",
    "parameter_count": "matching",
    "parameter_matched": "matching",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]

"""INT4 quantisation of transformers models: RTN, GPTQ, AWQ, TEQ, SignRound and AutoRound, and the loop over recipes.

``quantize(model, task_or_calibration, config)`` and ``auto_quantize(model, evaluate, max_relative_loss)`` are what
users call. Names are imported when they are used: the configuration alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "QuantisationConfig": "config",
    "Precision": "config",
    "Override": "config",
    "GPTQConfig": "config",
    "AWQConfig": "config",
    "TEQConfig": "config",
    "RoundingConfig": "config",
    "QuantisedLinear": "matrix",
    "QuantisedModel": "matrix",
    "Fusion": "fusion",
    "fuse": "fusion",
    "split": "fusion",
    "quantise": "flow",
    "quantize": "flow",
    "auto_quantize": "auto",
    "AutoResult": "auto",
    "Trial": "auto",
    "rank": "sensitivity",
    "import_gptq": "imports",
    "import_awq": "imports",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(module, "quantise" if name == "quantize" else name)

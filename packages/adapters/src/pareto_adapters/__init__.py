"""Parameter-efficient tuners on PEFT: KronA, and the methods that it is compared with.

Names load on first use, so importing the package is cheap. The first use of a PEFT configuration (``KronAConfig``)
registers its method with PEFT.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "BitFit": "bitfit",
    "FullFineTuning": "full",
    "KronA": "krona",
    "KronAConfig": "krona",
    "LoRA": "lora",
    "kron": "krona",
    "kron_linear": "krona",
}

__all__ = ["BitFit", "FullFineTuning", "KronA", "KronAConfig", "LoRA", "kron", "kron_linear"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Parameter-efficient tuners on PEFT: the KronA and LoDA families, and the methods that they are compared with.

Names load on first use, so importing the package is cheap. The first use of a PEFT configuration (``KronAConfig``)
registers its method with PEFT.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AdapterL": "adapter_l",
    "AdapterLConfig": "adapter_l",
    "BitFit": "bitfit",
    "Compacter": "compacter",
    "CompacterConfig": "compacter",
    "FTProjections": "partial",
    "FTTop": "partial",
    "FullFineTuning": "full",
    "Houlsby": "houlsby",
    "HoulsbyConfig": "houlsby",
    "KronA": "krona",
    "KronAB": "krona_block",
    "KronABConfig": "krona_block",
    "KronABRes": "krona_block",
    "KronAConfig": "krona",
    "LoDA": "loda",
    "LoDAConfig": "loda",
    "LoDAPlus": "loda",
    "LoDAPlusConfig": "loda",
    "LoRA": "lora",
    "OneShot": "one_shot",
    "ParallelAdapter": "parallel_adapter",
    "ParallelAdapterConfig": "parallel_adapter",
    "PreLayer": "prelayer",
    "PrefixTuning": "prefix",
    "RLoDA": "r_loda",
    "RLoDAPlus": "r_loda",
    "SLoDA": "s_loda",
    "SLoDAPlus": "s_loda",
    "approximation": "approximate",
    "energy_by_rank": "approximate",
    "energy_by_share": "approximate",
    "kron": "_kron",
    "kron_linear": "_kron",
    "qkv_macs": "macs",
    "qkv_macs_per_token": "macs",
    "sparsify_projections": "s_loda",
    "truncate_projections": "r_loda",
}

__all__ = [
    "AdapterL",
    "AdapterLConfig",
    "BitFit",
    "Compacter",
    "CompacterConfig",
    "FTProjections",
    "FTTop",
    "FullFineTuning",
    "Houlsby",
    "HoulsbyConfig",
    "KronA",
    "KronAB",
    "KronABConfig",
    "KronABRes",
    "KronAConfig",
    "LoDA",
    "LoDAConfig",
    "LoDAPlus",
    "LoDAPlusConfig",
    "LoRA",
    "OneShot",
    "ParallelAdapter",
    "ParallelAdapterConfig",
    "PreLayer",
    "PrefixTuning",
    "RLoDA",
    "RLoDAPlus",
    "SLoDA",
    "SLoDAPlus",
    "approximation",
    "energy_by_rank",
    "energy_by_share",
    "kron",
    "kron_linear",
    "qkv_macs",
    "qkv_macs_per_token",
    "sparsify_projections",
    "truncate_projections",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

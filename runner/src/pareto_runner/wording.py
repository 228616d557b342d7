"""Figures, values and names as people read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def number(value: float, unit: str = "") -> str:
    """Write a figure with the digits that it carries: whole with separators from 100 on, else three digits."""
    if unit == "%":
        return f"{value:.1f}"
    if abs(value) >= 99.95 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.9995 else f"{value:.3g}"


def show(value: Any) -> str:
    """Write any JSON value in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    """Write the name of a metric or request for people: ``batch32`` as ``batch 32``."""
    text = re.sub(r"(?<=[a-z])(?=\d)", " ", name.replace("_", " "))
    return text[:1].upper() + text[1:]

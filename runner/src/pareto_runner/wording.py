"""Figures, values and names as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


def number(value: float, unit: str = "") -> str:
    """Write a figure with the digits that it carries: whole with separators from 100 on, else three digits."""
    if not math.isfinite(value) or abs(value) >= 1e15:
        return f"{value:.3g}"
    if unit == "%":
        return f"{value:.1f}"
    if abs(value) >= 99.95 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.9995 else f"{value:.3g}"


def signed(value: float, unit: str = "") -> str:
    """Write a difference with its sign; one that is written as zero has none."""
    text = number(abs(value), unit)
    return text if not text.strip("0.") else f"{'+' if value > 0 else '−'}{text}"


def bounds(low: float, high: float, unit: str = "") -> str:
    """Write an interval."""
    return f"[{number(low, unit)}, {number(high, unit)}]"


def ratio(value: float, low: float, high: float) -> str:
    """Write a ratio and its interval."""
    return f"×{value:.3f} [{low:.3f}, {high:.3f}]"


def difference(value: float, low: float, high: float, unit: str = "") -> str:
    """Write a difference and its interval."""
    return f"{signed(value, unit)} [{signed(low, unit)}, {signed(high, unit)}]"


def margin(value: float) -> str:
    """Write what cannot be told from no change, as a share."""
    return f"±{100 * value:.1f}".removesuffix(".0") + " %"


def show(value: Any) -> str:
    """Write any JSON value in a line; what is not known is a dash."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Write each value in a line, those of inner tables under both names."""
    lines = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.update({f"{key} {inner}": show(item) for inner, item in value.items()})
        else:
            lines[str(key)] = show(value)
    return lines


def escape_markdown(text: str) -> str:
    """Make text safe inside Markdown, table cells included."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", line)


def words(name: str) -> str:
    """Write the name of a metric or request for people: ``batch32`` as ``batch 32``."""
    text = re.sub(r"(?<=[a-z])(?=\d)", " ", name.replace("_", " "))
    return text[:1].upper() + text[1:]

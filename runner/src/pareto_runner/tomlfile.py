"""Reads a TOML file that anybody may have written: bounded in length, in depth and in its integers."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pareto_core import ParetoError
from pareto_core.config import DEPTH

#: what is longer than any benchmark is refused before it is looked at
BYTES = 2**18
#: characters of a message
LINE = 1000
KEY_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
#: a key of more parts than values may have levels: tomllib takes time and memory by the square of their number
LONG_KEY = re.compile(rf"(?<![\w.-])(?:{KEY_PART}[ \t]*+\.[ \t]*+){{{DEPTH}}}")


class BenchmarkFileError(ParetoError):
    """A benchmark file that cannot be run; the message, a line, names the file, the key and what is allowed."""

    def __init__(self, path: Path, key: str, problem: str) -> None:
        text = f"{key}: {problem}" if key else problem
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        super().__init__(f"{path}: {line if len(line) <= LINE else line[:LINE] + '…'}")


def load(path: Path) -> dict[str, Any]:
    """Return what the file holds; raises BenchmarkFileError where it cannot be read, is not TOML, or has no end."""
    text = _text(path)
    if long_key := LONG_KEY.search(text):
        raise BenchmarkFileError(path, long_key[0], f"is nested more than {DEPTH} levels deep")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and integers of thousands of digits
        raise BenchmarkFileError(path, "", f"is not TOML: {error}") from error
    _check_values(path, values)
    return values


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise BenchmarkFileError(path, "", "is not a file")
        with path.open("rb") as file:
            content = file.read(BYTES + 1)
    except OSError as error:
        raise BenchmarkFileError(path, "", f"cannot be read: {error.strerror}") from error
    if len(content) > BYTES:
        raise BenchmarkFileError(path, "", f"is longer than {BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BenchmarkFileError(path, "", f"is not UTF-8 text: {error}") from error


def _check_values(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse what TOML need not allow and no message could show: tables without end, integers past 64 bits."""
    pending: list[tuple[str, Any, int]] = [("", values, 0)]
    while pending:
        key, value, depth = pending.pop()
        if depth > DEPTH:
            raise BenchmarkFileError(path, key, f"is nested more than {DEPTH} levels deep")
        if isinstance(value, Mapping):
            pending += [(f"{key}.{name}" if key else name, item, depth + 1) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(f"{key}[{number}]", item, depth + 1) for number, item in enumerate(value)]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise BenchmarkFileError(path, key, "an integer goes from -2^63 to 2^63 - 1")

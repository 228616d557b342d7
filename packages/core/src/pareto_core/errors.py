"""Errors that a user can do something about: each message names the thing, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ParetoError(Exception):
    """Base of every error that Pareto raises on purpose."""


class ConfigError(ParetoError, ValueError):
    """A field holds a value that it may not hold.

    ``owner`` is the class or table that has the field, ``allowed`` says what would be accepted.
    """

    def __init__(self, owner: str, field: str, value: object, allowed: str) -> None:
        self.owner, self.field, self.value, self.allowed = owner, field, value, allowed
        super().__init__(f"{owner}.{field} = {shown(value)}: {allowed}")


class UnknownNameError(ParetoError, LookupError):
    """A name that nothing is registered under; the message lists the nearest known names."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"unknown {kind} {shown(name)}; {suggest(str(name), self.known)}")


class DataError(ParetoError):
    """Data that is missing, empty, or not in the format that the loader reads."""


class ModelError(ParetoError, ValueError):
    """A model that a method or task cannot work with (wrong layers, shapes, dtype or weights)."""


class TrainingError(ParetoError, RuntimeError):
    """Training that cannot go on, such as a loss that is not a number."""


class UnsupportedError(ParetoError):
    """Something that cannot be done on this machine or with this combination, with its reason."""


def shown(value: object, limit: int = 200) -> str:
    """Write ``value`` as Python would, in at most ``limit`` characters, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists without end
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which of the ``known`` names is meant by ``name``, or list them all."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    listing = "known: " + (", ".join(names) or "none")
    return f"did you mean {' or '.join(map(repr, near))}? ({listing})" if near else listing

"""Typed, frozen configuration that round-trips through JSON and refuses bad fields by name.

Methods, tasks and run specifications are dataclasses that derive from :class:`Config`. A value is checked against the
field's annotation when the object is made, from Python or from JSON alike, so that a wrong type never travels further.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pareto_core.errors import ConfigError, suggest

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]
#: levels of lists and tables that a field without a type of its own may hold
DEPTH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration; a subclass overrides :meth:`validate` to check ranges."""

    _hints: ClassVar[dict[type, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        hints = self._type_hints()
        for field in dataclasses.fields(self):
            value = convert(type(self).__name__, field.name, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self.validate()

    def validate(self) -> None:
        """Raise :class:`ConfigError` where values of the right type are out of range. Default: nothing."""

    def require(self, field: str, condition: bool, allowed: str) -> None:
        """Raise :class:`ConfigError` for ``field`` unless ``condition`` holds."""
        if not condition:
            raise ConfigError(type(self).__name__, field, getattr(self, field), allowed)

    @classmethod
    def _type_hints(cls) -> dict[str, Any]:
        if cls not in Config._hints:
            Config._hints[cls] = typing.get_type_hints(cls)
        return Config._hints[cls]

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of the fields that a JSON object for this class may hold."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Make the configuration from a JSON object; unknown and missing fields are named."""
        if not isinstance(values, Mapping):
            raise ConfigError(cls.__name__, "(whole)", values, "expected a table of fields")
        names = cls.field_names()
        for key in values:
            if key not in names:
                raise ConfigError(cls.__name__, str(key), values[key], f"no such field; {suggest(str(key), names)}")
        for field in dataclasses.fields(cls):
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if needed and field.name not in values:
                raise ConfigError(cls.__name__, field.name, None, "this field is required")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which :meth:`from_json` makes an equal configuration."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def canonical(self) -> str:
        """Return the JSON text with sorted keys: equal configurations have equal texts."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))


def convert(owner: str, field: str, hint: Any, value: Any) -> Any:
    """Check ``value`` against the annotation ``hint`` and return it in canonical form (lists become tuples).

    Integers are accepted where a float is asked, booleans are not integers, and floats must be finite.
    Raises :class:`ConfigError` naming ``owner`` and ``field``.
    """
    if _fits(hint, value):
        return value
    if hint is Any:
        return _convert_json(owner, field, value)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(owner, field, hint, value)
    if origin is tuple:
        return _convert_tuple(owner, field, hint, value)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in args):
            return value
    elif origin in (dict, Mapping) or hint in (dict, Mapping):
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            inner = args[1] if len(args) == 2 else Any
            return {key: convert(owner, f"{field}.{key}", inner, item) for key, item in value.items()}
    elif isinstance(hint, type) and issubclass(hint, Config):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return hint.from_json(value)
    else:
        return _convert_scalar(owner, field, hint, value)
    raise _refusal(owner, field, hint, value)


def _fits(hint: Any, value: Any) -> bool:
    """Whether the value is of a simple type as it is: most are, and long lists of figures need no more."""
    return type(value) is hint and (hint in (bool, int, str) or (hint is float and math.isfinite(value)))


def _refusal(owner: str, field: str, hint: Any, value: Any) -> ConfigError:
    return ConfigError(owner, field, value, f"expected {describe(hint)}")


def _convert_union(owner: str, field: str, hint: Any, value: Any) -> Any:
    options = get_args(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        try:
            return convert(owner, field, option, value)
        except ConfigError as error:
            if isinstance(value, Mapping) and isinstance(option, type) and issubclass(option, Config):
                raise error
    raise _refusal(owner, field, hint, value)


def _convert_tuple(owner: str, field: str, hint: Any, value: Any) -> Any:
    args = get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise _refusal(owner, field, hint, value)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(value) != len(args):
        raise _refusal(owner, field, hint, value)
    return tuple(
        item if _fits(arg, item) else convert(owner, f"{field}[{i}]", arg, item)
        for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )


def _convert_json(owner: str, field: str, value: Any, depth: int = 0) -> Any:
    if depth > DEPTH:
        raise ConfigError(owner, field, value, f"is nested more than {DEPTH} levels deep")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _convert_json(owner, f"{field}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_convert_json(owner, f"{field}[{i}]", item, depth + 1) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(owner, field, value, "expected what JSON can hold: texts, finite numbers, lists, tables")


def _convert_scalar(owner: str, field: str, hint: Any, value: Any) -> Any:
    if hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                raise _refusal(owner, field, hint, value) from None
            if math.isfinite(number):
                return number
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _refusal(owner, field, hint, value)


def describe(hint: Any) -> str:
    """Name a field's annotation the way a user would."""
    origin, args = get_origin(hint), get_args(hint)
    words = {
        int: "an integer",
        float: "a finite number",
        str: "a text",
        bool: "true or false",
        type(None): "nothing",
    }
    if hint in words:
        return words[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"a list, each item {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: " + ", ".join(describe(arg) for arg in args)
    return f"a table ({getattr(hint, '__name__', hint)})"


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_json()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value

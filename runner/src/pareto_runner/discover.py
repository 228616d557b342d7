"""Finds methods and tasks by their entry points, and imports one only when it is used."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, TypeVar

from pareto_core import Method, MethodSpec, ParetoError, Target, Task, TaskRef, UnknownNameError

T = TypeVar("T")

METHODS = "pareto.methods"
TASKS = "pareto.tasks"
TARGETS = ("xeon", "gpu", "tpu")
#: the pretended device of the instruments' self-test, which no list shows
SELFTEST = "selftest"


@functools.cache
def available(group: str) -> Mapping[str, EntryPoint]:
    """Entry points of ``group`` by name; nothing is imported. What is installed is looked through once."""
    return MappingProxyType({entry.name: entry for entry in sorted(entry_points(group=group))})


def entry_point(group: str, name: str) -> EntryPoint:
    """Entry point called ``name``; raises UnknownNameError with the nearest names."""
    known = available(group)
    if name not in known:
        raise UnknownNameError(group.removeprefix("pareto.").removesuffix("s"), name, known)
    return known[name]


def method_class(name: str) -> type[Method]:
    """Import the method called ``name``; raises UnknownNameError with the nearest names."""
    return _load(METHODS, name, Method)


def task_class(name: str) -> type[Task]:
    """Import the task called ``name``; raises UnknownNameError with the nearest names."""
    return _load(TASKS, name, Task)


def make_method(spec: MethodSpec) -> Method:
    """Make the method that a specification names."""
    return method_class(spec.name).from_json(spec.fields)


def make_task(ref: TaskRef) -> Task:
    """Make the task that a specification names."""
    return task_class(ref.name).from_json(ref.fields)


def make_target(name: str) -> Target:
    """Make the target called ``name``; raises UnknownNameError."""
    if name not in (*TARGETS, SELFTEST):
        raise UnknownNameError("target", name, TARGETS)
    from pareto_runner import targets

    return targets.make(name)


def _load(group: str, name: str, base: type[T]) -> type[T]:
    entry = entry_point(group, name)
    try:
        loaded: Any = entry.load()
    except (ImportError, AttributeError) as error:
        raise ParetoError(f"the entry point {name} ({entry.value}) cannot be imported: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise ParetoError(f"the entry point {name} ({entry.value}) is not a {base.__name__}")
    return loaded

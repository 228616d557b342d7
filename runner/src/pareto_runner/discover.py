"""Finds methods and tasks by their entry points, and imports one only when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from pareto_core import Method, MethodSpec, ParetoError, Target, Task, TaskRef, UnknownNameError

T = TypeVar("T")

METHODS = "pareto.methods"
TASKS = "pareto.tasks"
TARGETS = ("xeon", "gpu", "tpu")


def available(group: str) -> dict[str, EntryPoint]:
    """Entry points of ``group`` by name; nothing is imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=group))}


def method_class(name: str) -> type[Method]:
    """Import the method called ``name``; raises UnknownNameError with the nearest names."""
    return _load("method", METHODS, name, Method)


def task_class(name: str) -> type[Task]:
    """Import the task called ``name``; raises UnknownNameError with the nearest names."""
    return _load("task", TASKS, name, Task)


def make_method(spec: MethodSpec) -> Method:
    """Make the method that a specification names."""
    return method_class(spec.name).from_json(spec.fields)


def make_task(ref: TaskRef) -> Task:
    """Make the task that a specification names."""
    return task_class(ref.name).from_json(ref.fields)


def make_target(name: str) -> Target:
    """Make the target called ``name``; raises UnknownNameError."""
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    from pareto_runner import targets

    return targets.make(name)


def _load(kind: str, group: str, name: str, base: type[T]) -> type[T]:
    known: Mapping[str, EntryPoint] = available(group)
    if name not in known:
        raise UnknownNameError(kind, name, known)
    loaded: Any = known[name].load()
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise ParetoError(f"the entry point {name} ({known[name].value}) is not a {base.__name__}")
    return loaded

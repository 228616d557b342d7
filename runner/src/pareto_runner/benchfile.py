"""Benchmark files: one TOML per question. Reading one checks everything that can be checked before a run starts.

A file names entry points of installed packages, never code. Every refusal is a BenchmarkFileError that names the file,
the key, and what is allowed there.
"""

from __future__ import annotations

import collections
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pareto_core import (
    Budget,
    ConfigError,
    Engine,
    MethodSpec,
    ParetoError,
    RunSpec,
    Stage,
    TaskRef,
    Training,
)
from pareto_core.errors import shown, suggest
from pareto_core.spec import SEEDS
from pareto_runner import discover
from pareto_runner.tomlfile import BenchmarkFileError, load

Table = dict[str, Any]

#: variants in cases in profiles
COMBINATIONS = 10_000


def _check_name(name: str) -> str:
    if not name.strip() or not name.isprintable() or len(name) > 100:
        raise ValueError(f"a name has 1 to 100 printable characters (found {shown(name, 60)})")
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class Strict(BaseModel):
    """A table of a benchmark file: unknown keys are refused with the nearest known one, values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(f"no such key {key!r}; {suggest(str(key), cls.model_fields)}")
        return values


class ReferenceTable(Strict):
    """Figures of a paper that are shown beside ours."""

    table: str
    caption: str
    columns: list[str] = Field(min_length=1)
    rows: dict[str, list[float | int | str]] = Field(min_length=1)
    ours: dict[str, str] = {}
    note: str = ""

    @model_validator(mode="after")
    def _row_lengths(self) -> ReferenceTable:
        for name, row in self.rows.items():
            if len(row) != len(self.columns):
                raise ValueError(f"row {name!r} has {len(row)} figures for {len(self.columns)} columns")
        return self


class StageTable(Strict):
    """A stage with more than its methods."""

    methods: list[Table] = Field(min_length=1)
    name: str = ""
    teacher: str | None = None
    labels_from: str | None = None
    training: Table = {}


class Variant(Strict):
    """One row of the question: a list of stages, each a list of methods or a table."""

    name: Name
    stages: list[list[Table] | Table] = Field(min_length=1)
    training: Table = {}
    engine: Table = {}
    compare_with: list[str] = []


class Override(Strict):
    """What a profile or a case changes in a variant: its training, and fields of its methods by method name."""

    training: Table = {}
    methods: dict[str, Table] = {}


class Settings(Strict):
    """What a profile or a case sets for all variants."""

    task: Table = {}
    training: Table = {}
    engine: Table = {}
    seeds: list[int] | None = None
    requests: list[str] | None = None
    measure_seconds: float | int | None = None
    time_training: bool | None = None
    variants: dict[str, Override] = {}

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds is not None and (not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= SEEDS):
            raise ValueError(f"give at least one seed, none twice, none negative or above {SEEDS - 1}")
        return seeds


class Case(Settings):
    """One of several tasks that a profile runs the question on."""

    name: Name


class Profile(Settings):
    """How much to run: seeds, data, training."""

    description: str = ""
    cases: list[Case] = []


class Benchmark(Strict):
    """A whole file."""

    title: str = Field(min_length=1)
    text: str = ""
    flagship: bool = False
    baseline: str | None = None
    task: Table
    training: Table = {}
    engine: Table = {}
    requests: list[str] = []
    variants: list[Variant] = Field(min_length=1)
    profiles: dict[Name, Profile] = Field(min_length=1)
    references: list[ReferenceTable] = []

    @model_validator(mode="after")
    def _names(self) -> Benchmark:
        names = [variant.name for variant in self.variants]
        _distinct("variants", names)
        for profile_name, profile in self.profiles.items():
            _distinct(f"cases of the profile {profile_name!r}", [case.name for case in profile.cases])
        combinations = len(names) * sum(max(1, len(profile.cases)) for profile in self.profiles.values())
        if combinations > COMBINATIONS:
            raise ValueError(f"{combinations} variants in all cases of all profiles; at most {COMBINATIONS}")
        mentioned = [("baseline", self.baseline)] if self.baseline is not None else []
        mentioned += [(f"variants.{v.name}.compare_with", other) for v in self.variants for other in v.compare_with]
        for profile_name, profile in self.profiles.items():
            for settings in (profile, *profile.cases):
                mentioned += [(f"profiles.{profile_name}.variants", name) for name in settings.variants]
        for key, name in mentioned:
            if name not in names:
                raise ValueError(f"{key}: no variant {name!r}; {suggest(str(name), names)}")
        return self


def _distinct(what: str, names: Sequence[str]) -> None:
    twice = next((name for name, count in collections.Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"two {what} are called {twice!r}")


@dataclasses.dataclass(frozen=True)
class Question:
    """A benchmark file that was read: its name (folder and stem), its path and its content."""

    name: str
    path: Path
    content: Benchmark


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the command line decides."""

    target: str = "xeon"
    profile: str = "smoke"
    seeds: tuple[int, ...] | None = None
    processes: int = 1
    model: str | None = None
    data: str | None = None
    cases: tuple[str, ...] = ()


def read(path: Path) -> Question:
    """Read and check a benchmark file; raises BenchmarkFileError on the first thing that is wrong."""
    try:
        content = Benchmark.model_validate(load(path))
    except ValidationError as error:
        raise BenchmarkFileError(path, *_first_problem(error)) from error
    question = Question(f"{path.absolute().parent.name}/{path.stem}", path, content)
    for profile in content.profiles:
        for _ in cases(question, Choices(profile=profile, seeds=(0,))):  # seeds differ in nothing else
            pass
    return question


def _first_problem(error: ValidationError) -> tuple[str, str]:
    """The key that is wrong, and what is."""
    problem = min(error.errors(), key=lambda p: p["type"] != "value_error")
    key = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            key += f"[{part}]"
        elif not part.startswith(("list[", "dict[", "Table", "[key]")):
            key += f".{part}" if key else part
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = "this key is required"
    elif problem["type"] != "value_error":
        message = f"{message} (found {shown(problem['input'], 60)})"
    return key, message


def cases(question: Question, choices: Choices) -> Iterator[tuple[str, list[RunSpec]]]:
    """Yield (name of the question and case, specifications of every variant and seed), seed by seed."""
    content = question.content
    if choices.profile not in content.profiles:
        problem = f"no profile {choices.profile!r}; {suggest(choices.profile, content.profiles)}"
        raise BenchmarkFileError(question.path, "profiles", problem)
    profile = content.profiles[choices.profile]
    known = [case.name for case in profile.cases]
    for name in choices.cases:
        if name not in known:
            raise BenchmarkFileError(question.path, f"profiles.{choices.profile}.cases", f"no {name!r}; known: {known}")
    for case in profile.cases or [None]:
        if case is not None and choices.cases and case.name not in choices.cases:
            continue
        name = question.name if case is None else f"{question.name}/{case.name}"
        layers: list[Settings] = [profile] if case is None else [profile, case]
        yield name, list(_specs(question, name, layers, choices))


def _specs(question: Question, name: str, layers: Sequence[Settings], choices: Choices) -> Iterator[RunSpec]:
    content = question.content
    seeds = choices.seeds or _last([layer.seeds for layer in layers], [0])
    where = f"profiles.{choices.profile}"
    task = merged(content.task, *(layer.task for layer in layers))
    task_ref = _task(question.path, where, task, choices)
    settings: Table = {"requests": tuple(_last([layer.requests for layer in layers], content.requests))}
    for field, default in (("measure_seconds", 5.0), ("time_training", True)):
        settings[field] = _last([getattr(layer, field) for layer in layers], default)
    for seed in seeds:
        for number, variant in enumerate(content.variants):
            key = f"variants[{number}]"
            engine = merged(content.engine, *(layer.engine for layer in layers), variant.engine)
            spec = _guard(
                question.path,
                key,
                RunSpec,
                question=name,
                variant=variant.name,
                stages=tuple(_stages(question, key, variant, layers)),
                task=task_ref,
                target=choices.target,
                profile=choices.profile,
                engine=_engine(question.path, key, engine, choices),
                seed=seed,
                baseline=content.baseline,
                rivals=tuple(variant.compare_with),
                **settings,
            )
            yield spec


def _stages(question: Question, key: str, variant: Variant, layers: Sequence[Settings]) -> Iterator[Stage]:
    path, content = question.path, question.content
    overrides = [layer.variants[variant.name] for layer in layers if variant.name in layer.variants]
    names = [other.name for other in content.variants]
    for number, given in enumerate(variant.stages):
        where = f"{key}.stages[{number}]"
        try:
            table = StageTable.model_validate({"methods": given} if isinstance(given, list) else given)
        except ValidationError as error:
            name, problem = _first_problem(error)
            raise BenchmarkFileError(path, f"{where}.{name}" if name else where, problem) from error
        if table.labels_from is not None and table.labels_from not in names:
            raise BenchmarkFileError(path, where, f"labels_from: {suggest(table.labels_from, names)}")
        training = merged(
            content.training,
            *(layer.training for layer in layers),
            variant.training,
            table.training,
            *(override.training for override in overrides),
        )
        methods = [
            _method(path, f"{where}[{i}]", merged(method, *_method_overrides(method, overrides)))
            for i, method in enumerate(table.methods)
        ]
        yield _guard(
            path,
            where,
            Stage,
            methods=tuple(methods),
            name=table.name,
            teacher=table.teacher,
            labels_from=table.labels_from,
            training=_training(path, f"{where}.training", training),
        )


def _method_overrides(method: Table, overrides: Sequence[Override]) -> list[Table]:
    name = str(method.get("method"))
    return [override.methods[name] for override in overrides if name in override.methods]


def _method(path: Path, key: str, table: Table) -> MethodSpec:
    fields = dict(table)
    name = fields.pop("method", None)
    if not isinstance(name, str):
        known = ", ".join(discover.available(discover.METHODS))
        raise BenchmarkFileError(path, f"{key}.method", f"name the method (known: {known}); found {shown(name, 60)}")
    _guard(path, key, lambda: discover.method_class(name).from_json(fields))
    return _guard(path, key, MethodSpec, name=name, fields=fields)


def _task(path: Path, where: str, table: Table, choices: Choices) -> TaskRef:
    fields = dict(table)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        known = ", ".join(discover.available(discover.TASKS))
        raise BenchmarkFileError(path, "task.name", f"name the task (known: {known}); found {shown(name, 60)}")
    cls = _guard(path, "task.name", lambda: discover.task_class(name))
    for option, value in (("model", choices.model), ("data", choices.data)):
        if value is not None:
            if option not in cls.field_names():
                raise ParetoError(f"--{option}: the task {name} has no such field; it has {cls.field_names()}")
            fields[option] = value
    key = f"task (with {where}.task)"
    _guard(path, key, lambda: cls.from_json(fields))
    return _guard(path, key, TaskRef, name=name, fields=fields)


def _training(path: Path, key: str, table: Table) -> Training:
    fields = dict(table)
    budget = {name: fields.pop(name) for name in Budget.field_names() if name in fields}
    if budget:
        fields["budget"] = budget
    for name in fields:
        if name not in Training.field_names():
            known = {*Training.field_names(), *Budget.field_names()} - {"budget"}
            raise BenchmarkFileError(path, f"{key}.{name}", f"no such field; {suggest(name, known)}")
    return _guard(path, key, lambda: Training.from_json(fields))


def _engine(path: Path, key: str, table: Table, choices: Choices) -> Engine:
    fields = dict(table)
    if choices.processes > 1 and fields.get("name", "deepspeed") == "deepspeed":
        fields["processes"] = choices.processes
    fields.setdefault("precision", discover.make_target(choices.target).default_precision)
    return _guard(path, f"{key}.engine", lambda: Engine.from_json(fields))


T = typing.TypeVar("T")


def _guard(path: Path, key: str, make: typing.Callable[..., T], **values: Any) -> T:
    try:
        return make(**values)
    except ConfigError as error:
        problem = f"{error.field} = {shown(error.value, 60)}: {error.allowed}"
        raise BenchmarkFileError(path, key, problem) from error
    except ParetoError as error:
        raise BenchmarkFileError(path, key, str(error)) from error


def _last(values: Sequence[Any], default: Any) -> Any:
    given = [value for value in values if value is not None]
    return given[-1] if given else default


def merged(*tables: Mapping[str, Any]) -> Table:
    """Overlay tables, the later on the earlier, key by key at the top level."""
    result: Table = {}
    for table in tables:
        result.update(table)
    return result

"""The fourth concept: a run specification, all that decides a result besides the machine and the code."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Literal

from pareto_core.config import Config

Precision = Literal["fp32", "bf16", "fp16"]
#: how many seeds there are: NumPy takes 32 bits
SEEDS = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSpec(Config):
    """A method by its entry-point name, with the fields that differ from its defaults."""

    name: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRef(Config):
    """A task by its entry-point name, with the fields that differ from its defaults."""

    name: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget(Config):
    """How long a stage trains: whichever of the two ends first; at least one is given."""

    epochs: float | None = None
    max_steps: int | None = None

    def validate(self) -> None:
        """Require a limit, and a positive one."""
        self.require("epochs", self.epochs is not None or self.max_steps is not None, "give epochs or max_steps")
        self.require("epochs", self.epochs is None or self.epochs > 0, "must be above 0")
        self.require("max_steps", self.max_steps is None or self.max_steps > 0, "must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Config):
    """Optimisation of one stage.

    ``batch_size`` is global, in items per optimizer step. ``warmup_steps`` rise linearly, then the rate falls linearly
    to 0 (``linear``), or stays (``constant``). ``select`` is ``best`` where the checkpoint with the best score on the
    task's selection split after any epoch is kept.
    """

    learning_rate: float = 1e-3
    batch_size: int = 32
    budget: Budget = dataclasses.field(default_factory=lambda: Budget(epochs=1.0))
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["linear", "constant"] = "linear"
    gradient_clipping: float = 1.0
    gradient_accumulation: int = 1
    select: Literal["last", "best"] = "last"

    def validate(self) -> None:
        """Check ranges."""
        self.require("learning_rate", self.learning_rate > 0, "must be above 0")
        self.require("batch_size", self.batch_size > 0, "must be above 0")
        self.require("gradient_accumulation", self.gradient_accumulation > 0, "must be above 0")
        self.require(
            "gradient_accumulation",
            self.batch_size % max(1, self.gradient_accumulation) == 0,
            f"must divide batch_size {self.batch_size}",
        )
        for field in ("weight_decay", "warmup_steps", "gradient_clipping"):
            self.require(field, getattr(self, field) >= 0, "must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Config):
    """One or more methods trained together: built in order, finished in order.

    ``teacher`` names an earlier stage (or ``backbone``) whose finished module guides this one; ``labels_from`` names
    another variant of the question whose records replace the training labels.
    """

    methods: tuple[MethodSpec, ...]
    name: str = ""
    teacher: str | None = None
    labels_from: str | None = None
    training: Training = dataclasses.field(default_factory=Training)

    def validate(self) -> None:
        """Require a method."""
        self.require("methods", len(self.methods) > 0, "a stage needs at least one method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(Config):
    """What runs the training loop: DeepSpeed, or the plain PyTorch loop that its cost is measured against."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Precision | None = None
    processes: int = 1

    def validate(self) -> None:
        """Check ranges."""
        self.require("processes", self.processes > 0, "must be above 0")
        plain = self.name == "torch"
        self.require("zero_stage", not (plain and self.zero_stage), "the torch engine has no ZeRO: use 0")
        self.require("processes", not (plain and self.processes > 1), "the torch engine runs one process")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec(Config):
    """One variant of one question, with one seed, on one target."""

    question: str
    variant: str
    stages: tuple[Stage, ...]
    task: TaskRef
    target: str
    profile: str = "smoke"
    engine: Engine = dataclasses.field(default_factory=Engine)
    seed: int = 0
    #: name of the variant whose labels, latency and outputs this one is compared with; None for the baseline itself
    baseline: str | None = None
    #: further variants that this one's times are compared with
    rivals: tuple[str, ...] = ()
    #: requests of the task that are measured (empty: all that have no fixed protocol)
    requests: tuple[str, ...] = ()
    #: seconds of sampling per request
    measure_seconds: float = 5.0
    #: whether training steps are timed in turns with the other variants'
    time_training: bool = True

    def validate(self) -> None:
        """Check ranges, and names that refer to each other."""
        self.require("stages", len(self.stages) > 0, "a variant needs at least one stage")
        self.require("measure_seconds", self.measure_seconds > 0, "must be above 0")
        self.require("seed", 0 <= self.seed < SEEDS, f"must be from 0 to {SEEDS - 1}")
        known = {"backbone"}
        for stage in self.stages:
            if stage.teacher is not None:
                self.require(
                    "stages",
                    stage.teacher in known,
                    f"teacher {stage.teacher!r} must be one of {sorted(known)}",
                )
            if stage.name:
                known.add(stage.name)

    def digest(self) -> str:
        """Hash of everything in the specification, 16 hexadecimal digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

"""The fifth and sixth concepts: a measurement, and a result, which is one row of every table."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pareto_core.config import Config
from pareto_core.spec import RunSpec

Status = Literal["ok", "failed", "unsupported"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Config):
    """One figure: ``low`` and ``high`` bound its spread (p10 and p90 of ``samples`` values) where it has one.

    ``kind`` is ``measured`` where a clock, a counter or a scorer saw it, ``compiled`` where a compiler computed it.
    """

    name: str
    value: float
    unit: str
    samples: int = 1
    low: float | None = None
    high: float | None = None
    kind: Literal["measured", "compiled"] = "measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Config):
    """A ratio to the baseline's figure, taken in turns with it, with a 95 % bootstrap interval and its verdict."""

    name: str
    baseline: str
    ratio: float
    low: float
    high: float
    pairs: int
    verdict: Literal["better", "worse", "inconclusive"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Config):
    """What a run gave: its specification, figures, machine and context, and how it ended."""

    spec: RunSpec
    status: Status
    reason: str = ""
    measurements: tuple[Measurement, ...] = ()
    #: name of the measurement that is the task's score, and which way it is better
    metric: str = ""
    higher_is_better: bool = True
    comparisons: tuple[Comparison, ...] = ()
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    context: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: training loss by optimizer step, and hashes of the data
    curve: tuple[tuple[int, float], ...] = ()
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    paper: dict[str, Any] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """A result that is not ok says why."""
        self.require("reason", self.status == "ok" or bool(self.reason), "a run that did not end well needs a reason")

    def value(self, name: str) -> float | None:
        """Return the value of the measurement ``name``, None where it was not taken."""
        return next((item.value for item in self.measurements if item.name == name), None)

    def measurement(self, name: str) -> Measurement | None:
        """Return the measurement ``name``, None where it was not taken."""
        return next((item for item in self.measurements if item.name == name), None)

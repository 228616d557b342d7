"""The fifth and sixth concepts: a measurement, and a result, which is one row of every table."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pareto_core.config import Config
from pareto_core.spec import RunSpec

Verdict = Literal["better", "worse", "inconclusive"]
Status = Literal["ok", "failed", "unsupported"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Config):
    """One figure: ``low`` and ``high`` bound its spread (p10 and p90 of ``samples`` values) where it has one.

    ``interval_low`` and ``interval_high`` bound the value itself with 95 % confidence, where the samples can carry
    such a statement. ``kind`` is ``measured`` where a clock, a counter or a scorer saw it, ``compiled`` where a
    compiler computed it.
    """

    name: str
    value: float
    unit: str
    samples: int = 1
    low: float | None = None
    high: float | None = None
    interval_low: float | None = None
    interval_high: float | None = None
    kind: Literal["measured", "compiled"] = "measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Config):
    """A ratio to the baseline's figure, taken in turns with it, with a 95 % bootstrap interval and its verdict.

    ``margin`` is the change of the ratio that this machine could not resolve at that time: a verdict needs an interval
    that lies wholly beyond 1 - margin or 1 + margin.
    """

    name: str
    baseline: str
    ratio: float
    low: float
    high: float
    pairs: int
    verdict: Verdict
    margin: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference(Config):
    """A score minus the baseline's, in the metric's unit, over the same records, with a 95 % interval and its verdict.

    The interval is the paired bootstrap over the records. ``p_value`` is McNemar's exact test where each record is
    right or wrong, None elsewhere.
    """

    name: str
    baseline: str
    difference: float
    low: float
    high: float
    records: int
    verdict: Verdict
    p_value: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Config):
    """What a run gave: its specification, figures, machine and context, and how it ended."""

    spec: RunSpec
    status: Status
    reason: str = ""
    #: hash of all that decides the result (specification, code, lock, data, machine); where it was not known, empty
    key: str = ""
    #: last lines of the log of a process that failed
    log: str = ""
    measurements: tuple[Measurement, ...] = ()
    #: name of the measurement that is the task's score, and which way it is better
    metric: str = ""
    higher_is_better: bool = True
    comparisons: tuple[Comparison, ...] = ()
    differences: tuple[Difference, ...] = ()
    #: the score over resampled records; the n-th of every result on one task drew the same records
    resampled: tuple[float, ...] = ()
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

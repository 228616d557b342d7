"""An experiment on the verdicts: equal processes that must not be told apart, and slow-downs that must be found.

Each pair is a question of its own: fresh processes of a workload that really computes, and of the baseline's control,
taking turns. The variant is either the same once more, or does a tenth more of the same work.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pareto_core import MethodSpec, ParetoError, Stage
from pareto_runner.compare import LEVEL
from pareto_runner.run import Artifact, prepare
from pareto_runner.selftest.checks import SILENCE, make_spec
from pareto_runner.turns import Crew

Kind = Literal["equal", "slower"]
#: multiplications in a call
MATMULS: dict[str, int] = {"baseline": 10, "equal": 10, "slower": 11}
#: a slow-down is to be found in so many seconds, starting the processes included, in this share of the pairs
FOUND_WITHIN, FOUND_SHARE = 60.0, 0.9


@dataclasses.dataclass(frozen=True)
class Pair:
    """What one pair gave; ``seconds`` of sampling, and of all with the start of the processes."""

    kind: Kind
    verdict: str
    ratio: float
    low: float
    high: float
    margin: float
    turns: int
    sampling_seconds: float
    seconds: float

    @property
    def right(self) -> bool:
        """Whether equal ones were not told apart, or the slow-down was found in time."""
        if self.kind == "equal":
            return self.verdict == "inconclusive"
        return self.verdict == "worse" and self.seconds <= FOUND_WITHIN


@dataclasses.dataclass(frozen=True)
class Summary:
    """Counts over all pairs, and what was asked."""

    equal: int
    false_verdicts: int
    false_verdicts_allowed: int
    slower: int
    found: int
    found_needed: int
    median_seconds: float
    longest_seconds: float

    @property
    def ok(self) -> bool:
        """Whether both counts are as asked."""
        return self.false_verdicts <= self.false_verdicts_allowed and self.found >= self.found_needed

    def to_json(self) -> dict[str, Any]:
        """All fields, and the verdict."""
        return {**dataclasses.asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        return (
            f"{self.false_verdicts} false verdicts in {self.equal} equal pairs (allowed: {self.false_verdicts_allowed})"
            f", {self.found} of {self.slower} slow-downs of 10 % found (needed: {self.found_needed}); "
            f"{self.median_seconds:.0f} s a pair, {self.longest_seconds:.0f} s at most"
        )


def run(
    directory: Path,
    pairs: int = 100,
    planted: int = 40,
    seconds: float = 2.0,
    on_pair: Callable[[Pair], None] = lambda _: None,
) -> Summary:
    """Take ``pairs`` equal and ``planted`` slowed-down pairs; each worker may be sampled for ``seconds``.

    Every pair is added to ``pairs.jsonl`` in ``directory`` once it is known. An experiment that was interrupted goes on
    from there; a fresh one needs a fresh directory.
    """
    artifacts = {name: _prepare(directory, name, seconds) for name in MATMULS}
    journal = directory / "pairs.jsonl"
    taken = list(_read(journal))
    counts: dict[Kind, int] = {"equal": pairs, "slower": planted}
    for kind, count in counts.items():
        for _ in range(count - sum(pair.kind == kind for pair in taken)):
            pair = _take(kind, [artifacts["baseline"], artifacts[kind]])
            _append(journal, pair)
            on_pair(pair)
            taken.append(pair)
    return summarise(taken)


def summarise(pairs: Sequence[Pair]) -> Summary:
    """Count what was right."""
    equal, slower = ([pair for pair in pairs if pair.kind == kind] for kind in ("equal", "slower"))
    seconds = sorted(pair.seconds for pair in pairs) or [0.0]
    return Summary(
        equal=len(equal),
        false_verdicts=sum(not pair.right for pair in equal),
        false_verdicts_allowed=allowed(len(equal)),
        slower=len(slower),
        found=sum(pair.right for pair in slower),
        found_needed=math.ceil(FOUND_SHARE * len(slower)),
        median_seconds=seconds[len(seconds) // 2],
        longest_seconds=seconds[-1],
    )


def allowed(count: int, level: float = LEVEL, certainty: float = 0.99) -> int:
    """The most false verdicts in ``count`` that a level of 95 % explains: more turn up in under 1 % of experiments."""
    rate, total = 1 - level, 0.0
    for false in range(count + 1):
        total += math.comb(count, false) * rate**false * (1 - rate) ** (count - false)
        if total >= certainty:
            return false
    return count


def _prepare(directory: Path, name: str, seconds: float) -> Artifact:
    place = directory / name
    method = MethodSpec(name="selftest.workload", fields={"log": str(place), "matmuls": MATMULS[name]})
    baseline = None if name == "baseline" else "baseline"
    stages = (Stage(methods=(method,)),)
    return prepare(make_spec("compute", place, seconds, variant=name, stages=stages, baseline=baseline), place)


def _take(kind: Kind, artifacts: Sequence[Artifact]) -> Pair:
    start = time.monotonic()
    with Crew(artifacts, SILENCE) as crew:
        crew.load()
        sampling = time.monotonic()
        for request in crew.requests():
            crew.time_request(request)
        results = crew.results()
    end = time.monotonic()
    for result in results:
        if result.status != "ok":
            raise ParetoError(f"experiment, {result.spec.variant}: {result.reason}\n{result.log}".rstrip())
    (found,) = results[1].comparisons
    return Pair(
        kind=kind,
        verdict=found.verdict,
        ratio=found.ratio,
        low=found.low,
        high=found.high,
        margin=found.margin,
        turns=found.pairs,
        sampling_seconds=round(end - sampling, 2),
        seconds=round(end - start, 2),
    )


def _append(journal: Path, pair: Pair) -> None:
    with journal.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(pair)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(journal: Path) -> Iterator[Pair]:
    """Yield the pairs of an earlier, interrupted experiment; a line that was cut short is one pair to take again."""
    for line in journal.read_text().splitlines() if journal.is_file() else []:
        try:
            yield Pair(**json.loads(line))
        except (ValueError, TypeError):
            continue

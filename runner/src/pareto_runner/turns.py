"""Workers of one question that are alive together and take turns, and what their times say."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from pareto_core import Comparison, Measurement, Result
from pareto_runner.compare import RESOLUTION, carried_quantile, median_interval, paired_ratio, resolution
from pareto_runner.discover import make_target
from pareto_runner.isolate import Child, ChildError, binding, environment, worker_command
from pareto_runner.run import Artifact

#: seconds of timed calls in one turn
SLOT = 0.05
#: sampling takes so many rounds whatever they cost, and looks after each further so many whether it knows enough
MIN_ROUNDS = 10
#: it does where half the width of every interval is at most this: a ratio's, and a median's relative to the median
TIGHT_RATIO, TIGHT_MEDIAN = 0.005, 0.01
#: warm-up ends when the medians of two rounds agree this well, with the last round, or with this share of the budget
SETTLED = 0.03
MIN_WARMUP, MAX_WARMUP, WARMUP_SHARE = 2, 10, 0.25
#: outputs of the loaded model may differ from those at the end of preparation by this much, relative
SAME_ANSWER = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}


@dataclasses.dataclass
class Findings:
    """What was found out about one variant."""

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    error: ChildError | None = None


@dataclasses.dataclass
class Member:
    """A variant's worker, and what it said in the current request, by the number of the round.

    Turns are compared by that number: a worker that missed a round shifts no other turn.
    """

    name: str
    artifact: Artifact
    child: Child
    control: bool = False
    turns: dict[int, dict[str, list[float]]] = dataclasses.field(default_factory=dict)

    def medians(self) -> dict[int, float]:
        """Median seconds of the calls of each turn."""
        return {number: statistics.median(turn["times"]) for number, turn in self.turns.items()}

    def measure(self, name: str, column: str = "times") -> Measurement:
        """What all turns say together of the times in ``column``."""
        return timing(name, [turn[column] for turn in self.turns.values()])


class Crew:
    """The workers of all variants, and a second one of the baseline as a control."""

    def __init__(self, artifacts: Sequence[Artifact], limit: float | None = None) -> None:
        self._artifacts, self._limit = artifacts, limit
        self.findings = {a.spec.variant: Findings() for a in artifacts}
        self._members: list[Member] = []
        self._known: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for member in self._members:
            member.child.close()

    @property
    def baseline(self) -> str | None:
        """Name of the variant that the others are compared with, if it is here."""
        names = {a.spec.variant for a in self._artifacts}
        return next((a.spec.baseline for a in self._artifacts if a.spec.baseline in names), None)

    def load(self) -> None:
        """Start the workers and let each load its finished model, all at once."""
        wanted = [(a, False) for a in self._artifacts]
        wanted += [(a, True) for a in self._artifacts if a.spec.variant == self.baseline]
        for artifact, control in wanted:
            log = artifact.directory / f"turns{'-control' if control else ''}.log"
            target = make_target(artifact.spec.target)
            variables = environment(1, target.deepspeed_accelerator) | (binding() if target.device == "cpu" else {})
            command = worker_command("turns", str(artifact.directory))
            child = Child(command, log, variables, self._limit)
            self._members.append(Member(artifact.spec.variant, artifact, child, control))
        for member, answer in self._all("load"):
            self._known = answer["requests"]
            self._note_peak(member, "load_peak_mib", answer["peak_mib"])

    def start_training(self) -> None:
        """Let each worker build its variant's first stage and start its engine, all at once.

        Those that train nothing leave: there is no step to time, and what was timed before stands.
        """
        for member, answer in list(self._all("train")):
            if not answer["trains"]:
                member.child.close()
                self._members.remove(member)

    def requests(self) -> list[str]:
        """Names of the requests that the specification asks for: by default those without a fixed protocol."""
        asked = self._artifacts[0].spec.requests
        return [name for name, about in self._known.items() if name in asked or (not asked and not about["repeats"])]

    def time_request(self, name: str) -> None:
        """Check every worker's answer to a request, then sample it in turns."""
        for member in list(self._members):
            for answer in self._attempt(member, "choose", request=name):
                self._check_answer(member, name, answer)
        repeats = self._known[name]["repeats"]
        if repeats:
            self._run_protocol(repeats)
        else:
            self._warm_up("turn", seconds=SLOT)
            self._sample("turn", seconds=SLOT)
        for member in list(self._members):
            for answer in self._attempt(member, "peak"):
                self._note_peak(member, "inference_peak_mib", answer["peak_mib"])
        for member in self._sampled():
            self._note(member, self._request_measurements(member, name))
        self._compare(f"latency_ms.{name}")

    def time_training(self) -> None:
        """Sample optimizer steps in turns; in a turn every worker takes the same steps over the same batches."""
        if not self._members:
            return
        self._warm_up("steps", count=1)
        slowest = max((list(member.medians().values())[-1] for member in self._members), default=SLOT)
        self._sample("steps", count=max(1, math.ceil(SLOT / slowest)))
        for member in self._sampled():
            self._note(member, [member.measure("train_step_ms")])
        self._compare("train_step_ms")

    def results(self) -> list[Result]:
        """Results of the artifacts with what was found out, in order."""
        finished = []
        for artifact in self._artifacts:
            found = self.findings[artifact.spec.variant]
            changes: dict[str, Any] = {
                "measurements": (*artifact.result.measurements, *found.measurements),
                "comparisons": tuple(found.comparisons),
            }
            if found.error:
                changes.update(status=found.error.kind, reason=str(found.error), log=found.error.log)
            finished.append(dataclasses.replace(artifact.result, **changes))
        return finished

    def _check_answer(self, member: Member, request: str, answer: dict[str, Any]) -> None:
        spec = member.artifact.spec
        allowed = SAME_ANSWER[spec.engine.precision or "fp32"]
        if answer["difference"] > allowed:
            reason = f"{request}: the loaded model answers differently, by {answer['difference']:.1e} relative"
            self._drop(member, ChildError(reason))
        else:
            self._note_peak(member, "inference_peak_mib", answer["peak_mib"])

    def _warm_up(self, do: str, **details: Any) -> None:
        """Take rounds that do not count, until every worker took as long in the last as in the one before."""
        self._forget()
        end = time.monotonic() + WARMUP_SHARE * self._budget()
        for number in range(MAX_WARMUP):
            self._round(number, do, **details)
            if number + 1 >= MIN_WARMUP and (self._settled(number) or time.monotonic() > end):
                break

    def _settled(self, number: int) -> bool:
        medians = [member.medians() for member in self._members]
        return all(abs(times[number] / times[number - 1] - 1) <= SETTLED for times in medians)

    def _sample(self, do: str, **details: Any) -> None:
        """Take rounds until every interval is tight, or the budget ends."""
        self._forget()
        end = time.monotonic() + self._budget()
        number = 0
        while self._members and (number < MIN_ROUNDS or time.monotonic() < end):
            self._round(number, do, **details)
            number += 1
            if number > MIN_ROUNDS and number % MIN_ROUNDS == 0 and self._tight():
                break

    def _budget(self) -> float:
        """Seconds of sampling for all workers together."""
        return self._artifacts[0].spec.measure_seconds * len(self._members)

    def _forget(self) -> None:
        for member in self._members:
            member.turns = {}

    def _round(self, number: int, do: str, **details: Any) -> None:
        count = len(self._members)
        for member in [self._members[(i + number) % count] for i in range(count)]:
            for answer in self._attempt(member, do, **details):
                member.turns[number] = answer

    def _run_protocol(self, repeats: int) -> None:
        self._forget()
        for number in range(repeats):
            for member in list(self._members):
                for answer in self._attempt(member, "protocol"):
                    member.turns[number] = answer

    def _tight(self) -> bool:
        for member in self._members:
            found = member.measure("check")
            low, high = found.interval_low, found.interval_high
            if low is None or high is None or (high - low) / 2 > TIGHT_MEDIAN * found.value:
                return False
        return all((found.high - found.low) / 2 <= TIGHT_RATIO for _, found in self._comparisons("check"))

    def _sampled(self) -> list[Member]:
        """The variants' own workers that are alive and took turns."""
        return [member for member in self._members if member.turns and not member.control]

    def _comparisons(self, name: str) -> Iterator[tuple[str, Comparison]]:
        """Yield a variant's name and its comparison; the control's comes first and gives the margin of the others."""
        alive = {member.name: member for member in self._sampled()}
        control = None
        for member in self._members:
            if member.control and self.baseline in alive:
                control = _compare_turns(f"control.{name}", member, alive[self.baseline], RESOLUTION)
        if control is not None:
            yield control.baseline, control
        for member in alive.values():
            spec = member.artifact.spec
            for other in dict.fromkeys([spec.baseline, *spec.rivals]):
                if other in alive and other != member.name:
                    found = _compare_turns(name, member, alive[other], resolution(control))
                    if found is not None:
                        yield member.name, found

    def _compare(self, name: str) -> None:
        for variant, comparison in self._comparisons(name):
            self.findings[variant].comparisons.append(comparison)

    def _request_measurements(self, member: Member, request: str) -> list[Measurement]:
        found = [member.measure(f"latency_ms.{request}")]
        if self._known[request]["repeats"]:
            average = 1000 * statistics.fmean(value for turn in member.turns.values() for value in turn["times"])
            found = [dataclasses.replace(found[0], value=average, interval_low=None, interval_high=None)]
        rate = 1000 * self._known[request]["batch_size"] / found[0].value
        found.append(Measurement(name=f"throughput.{request}", value=rate, unit="items/s", samples=found[0].samples))
        for column, label in (("first", "first_token_ms"), ("next", "next_token_ms")):
            if all(column in turn for turn in member.turns.values()):
                found.append(member.measure(f"{label}.{request}", column))
        return found

    def _note_peak(self, member: Member, name: str, peak_mib: float) -> None:
        """Keep the highest of the peaks called ``name``; the control's is the baseline's again, and is not kept."""
        if not member.control:
            known = [item.value for item in self.findings[member.name].measurements if item.name == name]
            self._note(member, [Measurement(name=name, value=max([peak_mib, *known]), unit="MiB")])

    def _note(self, member: Member, measurements: Sequence[Measurement]) -> None:
        found = self.findings[member.name]
        names = {item.name for item in measurements}
        found.measurements = [item for item in found.measurements if item.name not in names] + list(measurements)

    def _all(self, do: str) -> Iterator[tuple[Member, dict[str, Any]]]:
        """Send a command to every worker, then yield those that gave an answer, with it."""
        sent = []
        for member in list(self._members):
            try:
                member.child.send(do=do)
                sent.append(member)
            except ChildError as error:
                self._drop(member, error)
        for member in sent:
            try:
                yield member, member.child.answer()
            except ChildError as error:
                self._drop(member, error)

    def _attempt(self, member: Member, do: str, **details: Any) -> Iterator[dict[str, Any]]:
        try:
            yield member.child.ask(do=do, **details)
        except ChildError as error:
            self._drop(member, error)

    def _drop(self, member: Member, error: ChildError) -> None:
        member.child.close()
        self._members.remove(member)
        if not member.control:
            self.findings[member.name].error = error


def timing(name: str, turns: Sequence[Sequence[float]]) -> Measurement:
    """Median of the turns' medians, in milliseconds, with its interval, and p10 and p90 of all calls.

    The interval is made from the turns' medians: the calls of one turn share its conditions, so that the turns are what
    is independent, not the calls. What the turns or calls are too few to carry is not given.
    """
    medians = [1000 * statistics.median(turn) for turn in turns]
    calls = [1000 * seconds for turn in turns for seconds in turn]
    interval_low, interval_high = median_interval(medians) or (None, None)
    return Measurement(
        name=name,
        value=statistics.median(medians),
        unit="ms",
        samples=len(calls),
        low=carried_quantile(calls, 0.1),
        high=carried_quantile(calls, 0.9),
        interval_low=interval_low,
        interval_high=interval_high,
    )


def _compare_turns(name: str, member: Member, other: Member, margin: float) -> Comparison | None:
    """Compare two workers over the rounds that both took; None where there is no such round."""
    mine, theirs = member.medians(), other.medians()
    rounds = sorted(mine.keys() & theirs.keys())
    if not rounds:
        return None
    return paired_ratio(name, other.name, [mine[n] for n in rounds], [theirs[n] for n in rounds], margin)

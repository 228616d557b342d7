"""Workers of one question that are alive together and take turns, and what their times say."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from pareto_core import Comparison, Measurement, Result
from pareto_runner.compare import paired_ratio
from pareto_runner.discover import make_target
from pareto_runner.isolate import Child, ChildError, binding, environment, worker_command
from pareto_runner.run import Artifact

#: seconds of timed calls in one turn
SLOT = 0.05
MIN_ROUNDS, WARMUP_ROUNDS = 10, 2
#: sampling ends when every ratio is known this well (half the width of its interval)
TIGHT = 0.005
#: outputs of the loaded model may differ from those at the end of preparation by this much, relative
SAME_ANSWER = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}


@dataclasses.dataclass
class Findings:
    """What was found out about one variant."""

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    error: str = ""
    kind: str = "failed"


@dataclasses.dataclass
class Member:
    """A variant's worker and what it said in the current request, turn by turn."""

    name: str
    artifact: Artifact
    child: Child
    control: bool = False
    turns: list[dict[str, list[float]]] = dataclasses.field(default_factory=list)

    def medians(self, column: str = "times") -> list[float]:
        """Median seconds of each turn."""
        return [statistics.median(turn[column]) for turn in self.turns]

    def samples(self, column: str = "times") -> list[float]:
        """All seconds of all turns."""
        return [value for turn in self.turns for value in turn[column]]


class Crew:
    """The workers of all variants, and a second one of the baseline as a control."""

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self._artifacts = artifacts
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
            child = Child(worker_command("turns", str(artifact.directory)), log, variables)
            self._members.append(Member(artifact.spec.variant, artifact, child, control))
        for answer in self._all("load"):
            self._known = answer["requests"]

    def start_training(self) -> None:
        """Let each worker build its variant's first stage and start its engine, all at once."""
        for _ in self._all("train"):
            pass

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
            self._take_turns("turn", seconds=SLOT)
        for member in self._members:
            if member.turns and not member.control:
                self._note(member, self._request_measurements(member, name))
        self._compare(f"latency_ms.{name}")

    def time_training(self) -> None:
        """Sample optimizer steps in turns; in a turn every worker takes the same steps over the same batches."""
        self._warm_up("steps", count=1)
        slowest = max((m.medians()[-1] for m in self._members), default=SLOT)
        self._take_turns("steps", count=max(1, math.ceil(SLOT / slowest)))
        for member in self._members:
            if member.turns and not member.control:
                self._note(member, [spread("train_step_ms", member.samples())])
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
                changes.update(status=found.kind, reason=found.error)
            finished.append(dataclasses.replace(artifact.result, **changes))
        return finished

    def _check_answer(self, member: Member, request: str, answer: dict[str, Any]) -> None:
        spec = member.artifact.spec
        allowed = SAME_ANSWER[spec.engine.precision or "fp32"]
        if answer["difference"] > allowed:
            reason = f"{request}: the loaded model answers differently, by {answer['difference']:.1e} relative"
            self._drop(member, ChildError(reason))
        elif not member.control:
            peak = Measurement(name="inference_peak_mib", value=answer["peak_mib"], unit="MiB")
            self._note(member, [peak])

    def _warm_up(self, do: str, **details: Any) -> None:
        self._forget()
        for number in range(WARMUP_ROUNDS):
            self._round(number, do, **details)

    def _take_turns(self, do: str, **details: Any) -> None:
        self._warm_up(do, **details)
        self._forget()
        end = time.monotonic() + self._artifacts[0].spec.measure_seconds * len(self._members)
        rounds = 0
        while self._members and (rounds < MIN_ROUNDS or time.monotonic() < end):
            self._round(rounds, do, **details)
            rounds += 1
            if rounds >= 2 * MIN_ROUNDS and rounds % MIN_ROUNDS == 0 and self._tight():
                break

    def _forget(self) -> None:
        for member in self._members:
            member.turns = []

    def _round(self, number: int, do: str, **details: Any) -> None:
        count = len(self._members)
        for member in [self._members[(i + number) % count] for i in range(count)]:
            for answer in self._attempt(member, do, **details):
                member.turns.append(answer)

    def _run_protocol(self, repeats: int) -> None:
        self._forget()
        for _ in range(repeats):
            for member in list(self._members):
                for answer in self._attempt(member, "protocol"):
                    member.turns.append(answer)

    def _tight(self) -> bool:
        widths = [(c.high - c.low) / 2 for _, c in self._comparisons("check")]
        return bool(widths) and max(widths) < TIGHT

    def _comparisons(self, name: str) -> Iterator[tuple[str, Comparison]]:
        alive = {m.name: m for m in self._members if not m.control and m.turns}
        for member in self._members:
            spec = member.artifact.spec
            others = [self.baseline] if member.control else [spec.baseline, *spec.rivals]
            for other in others:
                if other in alive and (member.control or other != member.name) and member.turns:
                    rounds = min(len(member.turns), len(alive[other].turns))
                    label = f"control.{name}" if member.control else name
                    mine, theirs = member.medians()[:rounds], alive[other].medians()[:rounds]
                    yield member.name, paired_ratio(label, other, mine, theirs)

    def _compare(self, name: str) -> None:
        for variant, comparison in self._comparisons(name):
            self.findings[variant].comparisons.append(comparison)

    def _request_measurements(self, member: Member, request: str) -> list[Measurement]:
        found = [spread(f"latency_ms.{request}", member.samples())]
        if self._known[request]["repeats"]:
            average = 1000 * statistics.fmean(member.samples())
            found = [dataclasses.replace(found[0], value=average)]
        rate = 1000 * self._known[request]["batch_size"] / found[0].value
        found.append(Measurement(name=f"throughput.{request}", value=rate, unit="items/s", samples=found[0].samples))
        for column, label in (("first", "first_token_ms"), ("next", "next_token_ms")):
            if column in member.turns[0]:
                found.append(spread(f"{label}.{request}", member.samples(column)))
        return found

    def _note(self, member: Member, measurements: Sequence[Measurement]) -> None:
        found = self.findings[member.name]
        names = {item.name for item in measurements}
        found.measurements = [item for item in found.measurements if item.name not in names] + list(measurements)

    def _all(self, do: str) -> Iterator[dict[str, Any]]:
        """Send a command to every worker, then yield the answers of those that gave one."""
        sent = []
        for member in list(self._members):
            try:
                member.child.send(do=do)
                sent.append(member)
            except ChildError as error:
                self._drop(member, error)
        for member in sent:
            try:
                yield member.child.answer()
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
            self.findings[member.name].error = str(error)
            self.findings[member.name].kind = error.kind


def spread(name: str, seconds: Sequence[float]) -> Measurement:
    """Median in milliseconds, with p10 and p90 where there are at least ten samples."""
    times = np.asarray(seconds) * 1000
    low, high = (float(q) for q in np.quantile(times, [0.1, 0.9])) if len(times) >= 10 else (None, None)
    return Measurement(name=name, value=float(np.median(times)), unit="ms", samples=len(times), low=low, high=high)

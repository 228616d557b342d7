"""A suite: many questions, each variant and seed prepared, measured in turns, journalled and logged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pareto_core import Result, RunSpec
from pareto_core.cache import write_json
from pareto_runner.discover import make_target
from pareto_runner.isolate import Child, ChildError, binding, environment, worker_command
from pareto_runner.journal import Journal
from pareto_runner.machine import context, machine
from pareto_runner.run import Artifact, measure


class Watcher(Protocol):
    """Is told how a suite goes: the progress bars."""

    def begin(self, spec: RunSpec) -> None:
        """A variant is about to be prepared."""

    def step(self, step: int, steps: int, loss: float) -> None:
        """It has trained a step."""

    def note(self, text: str) -> None:
        """Something else is going on."""

    def end(self, result: Result) -> None:
        """A result is final."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Where a suite puts its files, and who is told."""

    directory: Path
    watcher: Watcher
    log: Callable[[Result], None]

    def run(self, cases: Sequence[tuple[str, Sequence[RunSpec]]]) -> list[Result]:
        """Run every specification; a failed one is a row, and the suite goes on."""
        journal = Journal(self.directory / "journal")
        results: list[Result] = []
        for _, specs in cases:
            for seed in dict.fromkeys(spec.seed for spec in specs):
                for result in self._together([spec for spec in specs if spec.seed == seed]):
                    journal.write(result)
                    self.log(result)
                    self.watcher.end(result)
                    results.append(result)
        return results

    def _together(self, specs: Sequence[RunSpec]) -> Iterator[Result]:
        """Prepare the variants of one question and seed, then measure them against each other."""
        with self._workplace(specs[0]) as place:
            artifacts: dict[str, Artifact] = {}
            failures: dict[str, Result] = {}
            for spec in label_order(specs):
                self.watcher.begin(spec)
                try:
                    artifacts[spec.variant] = self._prepare(spec, place, artifacts)
                except ChildError as error:
                    failures[spec.variant] = unfinished(spec, error)
            measured = measure(list(artifacts.values()), self.watcher.note)
            done = {result.spec.variant: result for result in measured} | failures
            yield from (done[spec.variant] for spec in specs)

    @contextlib.contextmanager
    def _workplace(self, spec: RunSpec) -> Iterator[Path]:
        """A directory for the artifacts of one question and seed; removed afterwards, but for the logs."""
        place = self.directory / "work" / f"{spec.question.replace('/', '-')}-{spec.seed}-{os.getpid()}"
        place.mkdir(parents=True, exist_ok=True)
        try:
            yield place
        finally:
            logs = self.directory / "logs" / place.name
            for log in place.rglob("*.log"):
                kept = logs / log.relative_to(place)
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, kept)
            shutil.rmtree(place, ignore_errors=True)

    def _prepare(self, spec: RunSpec, place: Path, done: dict[str, Artifact]) -> Artifact:
        target = make_target(spec.target)
        probe = target.probe()
        if not probe.available:
            raise ChildError(probe.reason, "unsupported")
        directory = place / spec.digest()
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "spec.json", spec.to_json())
        labels = ""
        for stage in spec.stages:
            if stage.labels_from is not None:
                if stage.labels_from not in done:
                    raise ChildError(f"its labels come from {stage.labels_from}, which did not succeed")
                labels = str(done[stage.labels_from].directory)
        processes = spec.engine.processes
        command = worker_command("prepare", str(directory / "spec.json"), str(directory), labels, processes=processes)
        variables = environment(processes, target.deepspeed_accelerator)
        if processes == 1 and target.device == "cpu":
            variables |= binding()
        with Child(command, directory / "prepare.log", variables) as child:
            for message in child.messages():
                if "error" in message:
                    raise ChildError(message["error"], message["kind"])
                if "step" in message:
                    self.watcher.step(message["step"], message["steps"], message["loss"])
                if "done" in message and child.wait() == 0:
                    return Artifact.read(directory)
            raise ChildError(child.post_mortem())


def label_order(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """Order variants so that those which give labels come before those which take them."""
    ordered: list[RunSpec] = []
    waiting = list(specs)
    while waiting:
        ready = [s for s in waiting if not _needs(s) & {w.variant for w in waiting if w is not s}]
        for spec in ready or waiting:
            ordered.append(spec)
            waiting = [other for other in waiting if other is not spec]
    return ordered


def _needs(spec: RunSpec) -> set[str]:
    return {stage.labels_from for stage in spec.stages if stage.labels_from is not None}


def unfinished(spec: RunSpec, error: ChildError) -> Result:
    """Turn an error into the row that stands in the place of the result."""
    status = "unsupported" if error.kind == "unsupported" else "failed"
    return Result(spec=spec, status=status, reason=str(error), machine=machine(), context=context())


def build_deepspeed_op(directory: Path, accelerator: str) -> float:
    """Let DeepSpeed compile what it compiles at its first start, outside every timing; returns the seconds.

    Raises ChildError with what the compiler said.
    """
    start = time.monotonic()
    log = directory / "logs" / "deepspeed.log"
    with Child(worker_command("warm", accelerator), log, environment(1, accelerator)) as child:
        for message in child.messages():
            if "error" in message:
                raise ChildError(message["error"], message["kind"])
            return time.monotonic() - start
        raise ChildError(child.post_mortem())


def versions() -> str:
    """One line that says what runs."""
    libraries = json.dumps(machine()["libraries"])
    return f"Python {sys.version.split()[0]}, {libraries}"

"""A suite: many questions, each variant and seed prepared, measured in turns, journalled and logged.

A suite can be cut short at any moment and run again: results that stand are not run again, prepared models are found,
training goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pareto_core import ParetoError, Result, RunSpec, Target
from pareto_core.cache import cache_directory, write_json
from pareto_core.result import Status
from pareto_runner.artifacts import Artifacts
from pareto_runner.discover import make_target, make_task
from pareto_runner.isolate import Child, ChildError, binding, environment, worker_command
from pareto_runner.journal import Journal, JournalError
from pareto_runner.machine import context, load, machine, packages_of
from pareto_runner.plan import Past, Planned
from pareto_runner.run import Artifact, measure

#: a process that says nothing for so long hangs
SILENCE = 3600.0


class Watcher(Protocol):
    """Is told how a suite goes: the progress bars."""

    def begin(self, spec: RunSpec) -> None:
        """A variant is about to be prepared."""

    def step(self, step: int, steps: int, loss: float) -> None:
        """It has trained a step."""

    def note(self, text: str) -> None:
        """Something else is going on."""

    def end(self, result: Result, reused: bool) -> None:
        """A result is final; ``reused`` where it stands from before."""


class Suite:
    """Where a suite puts its files, and who is told.

    ``log`` is called with the journal file of each result, new or standing. ``fresh`` lets no earlier result stand. A
    process that is silent for ``limit`` seconds is ended.
    """

    def __init__(
        self,
        directory: Path,
        watcher: Watcher,
        log: Callable[[Path], None] = lambda _: None,
        fresh: bool = False,
        limit: float = SILENCE,
    ) -> None:
        self._watcher, self._log, self._fresh, self._limit = watcher, log, fresh, limit
        self._directory = directory
        self._journal = Journal(directory / "journal")
        self._artifacts = Artifacts(directory / "artifacts")
        #: every result so far, standing ones included
        self.results: list[Result] = []
        #: results that no directory would take
        self.unstored: list[Result] = []

    def run(self, cases: Sequence[tuple[str, Sequence[RunSpec]]]) -> list[Result]:
        """Run every specification whose result does not stand; a failed one is a row, and the suite goes on.

        On an interruption the runs at work are stored as interrupted, and the exception passes on. Raises ParetoError
        where the results directory cannot be written.
        """
        with self._alone(cases):
            for path in self._journal.adopt():
                self._watcher.note(f"brought into the journal: {path.name}")
            for damaged in self._journal.set_aside():
                self._watcher.note(f"set aside: {damaged.path} is {damaged.reason}")
            past = Past(self._journal.entries())
            groups = [
                past.plan([spec for spec in specs if spec.seed == seed], self._fresh)
                for _, specs in cases
                for seed in dict.fromkeys(spec.seed for spec in specs)
            ]
            missing = [item.spec for group in groups for item in group if item.standing is None]
            self._make_ready(missing)
            self._start_deepspeed(missing)
            for group in groups:
                self._group(group)
            self._artifacts.trim()
        return self.results

    def _make_ready(self, specs: Sequence[RunSpec]) -> None:
        """Let tasks make what is made once, where it can be watched; what fails here fails again as a variant's row."""
        reachable = {name for name in {spec.target for spec in specs} if make_target(name).probe().available}
        tasks = {spec.task.canonical(): spec.task for spec in specs if spec.target in reachable}
        for task in tasks.values():
            with contextlib.suppress(ParetoError, ImportError):
                make_task(task).make_ready(self._watcher.note)

    def _start_deepspeed(self, specs: Sequence[RunSpec]) -> None:
        """Let DeepSpeed compile what it needs for these runs, outside every timing."""
        names = {spec.target for spec in specs if spec.engine.name == "deepspeed"}
        for target in (make_target(name) for name in sorted(names)):
            if target.probe().available and target.deepspeed_accelerator:
                self._watcher.note("DeepSpeed starts (the first time it compiles a C++ extension: up to two minutes)")
                seconds = build_deepspeed_op(self._directory, target.deepspeed_accelerator)
                self._watcher.note(f"DeepSpeed is ready ({seconds:.0f} s)")

    def _group(self, planned: Sequence[Planned]) -> None:
        """Run the variants of one question and seed whose results do not stand, beside those they are compared with."""
        missing = [item for item in planned if item.standing is None]
        for item in planned:
            if item.standing is not None:
                self.results.append(item.standing.result)
                self._log(item.standing.path)
                self._watcher.end(item.standing.result, reused=True)
        seconds: dict[str, float] = {}
        try:
            found = self._together(needed(missing, planned), seconds) if missing else {}
        except KeyboardInterrupt:
            stopped = ChildError("interrupted; the same command goes on from here")
            self._store([unfinished(item, stopped) for item in missing if item.spec.variant in seconds])
            raise
        self._store([found[item.spec.variant] for item in missing])

    def _together(self, wanted: Sequence[Planned], seconds: dict[str, float]) -> dict[str, Result]:
        """Prepare variants and measure them against each other; results by variant.

        ``seconds`` is filled, as they begin, with what each took.
        """
        before: dict[str, dict[str, Any]] = {}
        prepared: dict[str, Artifact] = {}
        found: dict[str, Result] = {}
        for item in label_order(wanted):
            variant, start = item.spec.variant, time.monotonic()
            seconds[variant], before[variant] = 0.0, context(packages_of(item.spec))
            self._watcher.begin(item.spec)
            try:
                prepared[variant] = self._prepare(item, prepared)
            except ChildError as error:
                found[variant] = unfinished(item, error)
            except OSError as error:
                found[variant] = unfinished(item, ChildError(f"its files could not be written: {error}"))
            seconds[variant] = time.monotonic() - start
        start = time.monotonic()
        try:
            for result in measure(list(prepared.values()), self._watcher.note, self._limit):
                found[result.spec.variant] = result
        except Exception as error:  # a fault of the runner itself costs this group, not the suite
            reason = f"the runner failed while it measured: {type(error).__name__}: {error}"
            failure = ChildError(reason, log=traceback.format_exc())
            found |= {item.spec.variant: unfinished(item, failure) for item in wanted if item.spec.variant in prepared}
        share = (time.monotonic() - start) / len(wanted)
        for item in wanted:
            variant = item.spec.variant
            self._keep_logs(item)
            if found[variant].status != "ok":
                self._forget_prepared(item)
            after = {**before[variant], "load_after": load(), "seconds": round(seconds[variant] + share, 1)}
            found[variant] = dataclasses.replace(found[variant], key=item.key, context=after)
        return found

    def _store(self, results: Sequence[Result]) -> None:
        """Write results to the journal, all before anything else sees one; what no directory takes is tried later."""
        self.results += results
        self.unstored += results
        paths = []
        for waiting in list(self.unstored):
            try:
                path = self._journal.write(waiting)
            except JournalError as error:
                self._watcher.note(str(error))
                break
            self.unstored.remove(waiting)
            if path.parent != self._journal.directory:
                self._watcher.note(f"the journal cannot be written; rescued to {path}, and brought back the next time")
            paths.append(path)
        for path in paths:
            self._log(path)
        for result in results:
            self._watcher.end(result, reused=False)

    def _prepare(self, item: Planned, done: dict[str, Artifact]) -> Artifact:
        """Prepare a variant in a process of its own, unless it is there from before."""
        target = make_target(item.spec.target)
        probe = target.probe()
        if not probe.available:
            raise ChildError(probe.reason, "unsupported")
        if self._fresh or not item.key:
            self._artifacts.forget(item.place)
        ready = self._artifacts.find(item.place)
        if ready is not None:
            self._watcher.note(f"{item.spec.variant} is prepared from before")
            return ready
        directory = self._artifacts.place(item.place)
        write_json(directory / "spec.json", item.spec.to_json())
        command, variables = self._command(item.spec, target, directory, labels_of(item.spec, done))
        done_well = False
        with Child(command, directory / "prepare.log", variables, self._limit) as child:
            for message in child.messages():
                child.check(message)
                if "note" in message:
                    self._watcher.note(message["note"])
                if "step" in message:
                    self._watcher.step(message["step"], message["steps"], message["loss"])
                done_well = done_well or "done" in message
            if not done_well or child.wait() != 0:
                raise child.post_mortem()
        return Artifact.read(directory)

    def _command(self, spec: RunSpec, target: Target, directory: Path, labels: str) -> tuple[list[str], dict[str, str]]:
        """Command and environment of the process that prepares a variant."""
        processes = spec.engine.processes
        command = worker_command("prepare", str(directory / "spec.json"), str(directory), labels, processes=processes)
        variables = environment(processes, target.deepspeed_accelerator)
        if processes == 1 and target.device == "cpu":
            variables |= binding()
        return command, variables

    def _forget_prepared(self, item: Planned) -> None:
        """Remove a prepared model that may be what failed; a checkpoint of unfinished training stays."""
        if self._artifacts.find(item.place) is not None:
            self._artifacts.forget(item.place)

    def _keep_logs(self, item: Planned) -> None:
        """Copy the logs of a variant's processes to where they outlive its files."""
        name = f"{item.spec.question.replace('/', '-')}-{item.spec.seed}"
        with contextlib.suppress(OSError):
            for log in self._artifacts.directory.glob(f"{item.place}/*.log"):
                kept = self._directory / "logs" / name / f"{item.place}-{log.name}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, kept)

    @contextlib.contextmanager
    def _alone(self, cases: Sequence[tuple[str, Sequence[RunSpec]]]) -> Iterator[None]:
        """Wait until no other suite uses this directory, nor measures on these CPUs or GPUs."""
        devices = sorted({spec.target for _, specs in cases for spec in specs})
        usable = f"{sorted(os.sched_getaffinity(0))} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {devices}"
        name = f"measuring-{hashlib.sha256(usable.encode()).hexdigest()[:12]}.lock"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / ".lock").touch()
        except OSError as error:
            raise ParetoError(
                f"cannot write to {self._directory}: {error.strerror}; choose another with --out"
            ) from error
        with waiting_for(self._directory / ".lock", self._watcher), waiting_for(lock_folder() / name, self._watcher):
            yield


@contextlib.contextmanager
def waiting_for(path: Path, watcher: Watcher) -> Iterator[None]:
    """Hold a lock file; says so where another process has it. It is free when its holder ends, however it ends."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            watcher.note(f"waiting: another suite (process {file.read().strip() or '?'}) is at work here")
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield


def lock_folder() -> Path:
    """A folder for locks that all suites of this user share."""
    for folder in (cache_directory() / "locks", Path(tempfile.gettempdir()) / f"pareto-{os.getuid()}"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".try").touch()
            return folder
    raise ParetoError("neither the cache nor the temporary directory can be written: set PARETO_CACHE to one that can")


def needed(missing: Sequence[Planned], planned: Sequence[Planned]) -> list[Planned]:
    """The variants to run: those that are missing, those they are compared with, and those that give them labels."""
    names = {item.spec.variant for item in missing}
    for item in missing:
        names |= {item.spec.baseline or "", *item.spec.rivals}
    while True:
        givers = {name for item in planned if item.spec.variant in names for name in _needs(item.spec)}
        if givers <= names:
            return [item for item in planned if item.spec.variant in names]
        names |= givers


def labels_of(spec: RunSpec, done: Mapping[str, Artifact]) -> str:
    """Directory of the artifact that gives a variant its labels, empty where none does."""
    labels = ""
    for name in sorted(_needs(spec)):
        if name not in done:
            raise ChildError(f"its labels come from {name}, which did not succeed")
        labels = str(done[name].directory)
    return labels


def label_order(items: Sequence[Planned]) -> list[Planned]:
    """Order variants so that those which give labels come before those which take them."""
    ordered: list[Planned] = []
    waiting = list(items)
    while waiting:
        names = {item.spec.variant for item in waiting}
        ready = [item for item in waiting if not _needs(item.spec) & (names - {item.spec.variant})]
        for item in ready or waiting:
            ordered.append(item)
            waiting = [other for other in waiting if other is not item]
    return ordered


def _needs(spec: RunSpec) -> set[str]:
    return {stage.labels_from for stage in spec.stages if stage.labels_from is not None}


def unfinished(item: Planned, error: ChildError) -> Result:
    """Turn an error into the row that stands in the place of the result."""
    status: Status = "unsupported" if error.kind == "unsupported" else "failed"
    about = {"machine": machine(), "context": context(packages_of(item.spec)), "key": item.key}
    return Result(spec=item.spec, status=status, reason=str(error), log=error.log, **about)


def build_deepspeed_op(directory: Path, accelerator: str) -> float:
    """Let DeepSpeed compile what it compiles at its first start, outside every timing; returns the seconds.

    Raises ChildError with what the compiler said.
    """
    start = time.monotonic()
    log = directory / "logs" / "deepspeed.log"
    with Child(worker_command("warm", accelerator), log, environment(1, accelerator), SILENCE) as child:
        child.answer()
    return time.monotonic() - start

"""Where a trial takes place: a folder with a benchmark file, results, store and cache of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pareto_core import Result
from pareto_runner.journal import Entry, Journal
from pareto_runner.tracking import ui_command

#: a command that takes longer than this is wedged
WEDGED = 300.0
FILE = """
title = "Faults"
[task]
name = "faults.workload"
[engine]
name = "torch"
[training]
batch_size = 16
max_steps = 12
learning_rate = 0.1
[[variants]]
name = "A"
stages = [[{ method = "faults.workload" }]]
[[variants]]
name = "B"
stages = [[{ method = "faults.workload" }]]
[profiles.smoke]
measure_seconds = 0.1
time_training = false
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (None: it was wedged and had to be killed), output and seconds."""

    code: int | None
    output: str
    seconds: float


class Running:
    """A suite at work, in a session of its own."""

    def __init__(self, command: list[str], variables: Mapping[str, str], folder: Path) -> None:
        self._start = time.monotonic()
        self._log = (folder / f"terminal-{time.monotonic_ns()}.log").open("w+", errors="replace")
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=dict(variables), cwd=folder, start_new_session=True
        )

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the suite's own process a signal; its workers must notice by themselves."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def workers(self) -> list[int]:
        """Process ids of its children."""
        with contextlib.suppress(OSError):
            tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
            return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        return []

    def output(self) -> str:
        """What it printed so far."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def wait(self) -> Ended:
        """Wait for its end, or for the time after which it counts as wedged."""
        code: int | None = None
        try:
            code = self.process.wait(WEDGED)
        except subprocess.TimeoutExpired:
            for pid in [self.process.pid, *self.workers()]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            self.process.wait()
        ended = Ended(code, self.output(), time.monotonic() - self._start)
        self._log.close()
        return ended


class Stage:
    """A trial's folder. Results go to ``out`` (default: ``results`` in it), runs to one sqlite store.

    The store begins as a copy of ``template``, since MLflow takes ten seconds to make one; None lets the suite make it.
    """

    def __init__(self, folder: Path, cpu: int, template: Path | None = None) -> None:
        self.folder, self._cpu = folder, cpu
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "faults" / "question.toml"
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(FILE)
        self.out = folder / "results"
        self.database = folder / "mlflow.db"
        self.uri = f"sqlite:///{self.database}"
        if template is not None:
            shutil.copyfile(template, self.database)
        self.fault = folder / "fault.json"
        #: those of the last suite that was started
        self.arguments: tuple[str, ...] = ()

    def start(self, *arguments: str, out: Path | None = None, **variables: str) -> Running:
        """Start ``pareto bench`` on this folder's file."""
        self.arguments = arguments
        command = ["taskset", "-c", str(self._cpu), sys.executable, "-m", "pareto_runner.cli", "bench", str(self.file)]
        places = ["--out", str(out or self.out), "--tracking-uri", self.uri]
        chosen = {
            **os.environ,
            "PARETO_CACHE": str(self.folder / "cache"),
            "PARETO_FAULT": str(self.fault),
            "PARETO_CHECKPOINT_SECONDS": "0",
            "COLUMNS": "200",
            **variables,
        }
        return Running([*command, *places, *arguments], chosen, self.folder)

    def run(self, *arguments: str, out: Path | None = None, **variables: str) -> Ended:
        """Run ``pareto bench`` to its end."""
        return self.start(*arguments, out=out, **variables).wait()

    def upload(self) -> Ended:
        """Run ``pareto upload``."""
        command = [sys.executable, "-m", "pareto_runner.cli", "upload", str(self.out), "--tracking-uri", self.uri]
        chosen = {**os.environ, "PARETO_CACHE": str(self.folder / "cache"), "COLUMNS": "200"}
        return Running(command, chosen, self.folder).wait()

    def journals(self) -> list[Journal]:
        """Every journal in the folder, those of rescued results included."""
        homes = {path.parent for path in self.folder.rglob("0*-*.json")}
        return [Journal(home) for home in sorted(homes)]

    def entries(self) -> list[Entry]:
        """Every result in the folder."""
        return [entry for journal in self.journals() for entry in journal.entries()]

    def results(self) -> list[Result]:
        """Every result in the folder."""
        return [entry.result for entry in self.entries()]

    def runs(self) -> dict[str, list[str]]:
        """Status of the store's runs, by the identity of the result that each holds."""
        query = (
            "select tags.value, runs.status from runs join tags on tags.run_uuid = runs.run_uuid "
            "where tags.key = 'pareto.id' and runs.lifecycle_stage = 'active'"
        )
        found: dict[str, list[str]] = {}
        if self.database.exists():
            with contextlib.closing(sqlite3.connect(self.database)) as connection:
                for identity, status in connection.execute(query):
                    found.setdefault(identity, []).append(status)
        return found


class TrackingServer:
    """MLflow's own server before a stage's store, which can be killed and started again at the same address."""

    def __init__(self, stage: Stage) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command, self._folder = ui_command(stage.uri, port), stage.folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it where it does not run, and return when it answers."""
        if self._process is not None:
            return
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        deadline = time.monotonic() + WEDGED
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.uri}/health"):
                return
            time.sleep(0.5)
        raise AssertionError(f"the tracking server did not start: {self._folder / 'server.log'}")

    def stop(self) -> None:
        """Kill it with all that it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def tracking_server(stage: Stage) -> Iterator[TrackingServer]:
    """Let the stage's suites log through a server, which has ended when this ends."""
    store, server = stage.uri, TrackingServer(stage)
    server.start()
    stage.uri = server.uri
    try:
        yield server
    finally:
        server.stop()
        stage.uri = store


def identity(path: Path) -> str:
    """What the store knows a journal file by."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def after(seconds: float, act: Callable[[], object]) -> threading.Timer:
    """Do something later, in a thread."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    return timer


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own at ``folder``, in memory; raises PermissionError where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        raise PermissionError("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@contextlib.contextmanager
def small_memory(mebibytes: int) -> Iterator[Path]:
    """A control group whose processes may use so much memory; raises PermissionError where none can be made."""
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    limits = ["memory.limit_in_bytes", "memory.max"]
    group = Path()
    for root, limit in zip(roots, limits, strict=True):
        group = root / f"pareto-faults-{os.getpid()}-{random.randrange(10**9)}"
        with contextlib.suppress(OSError):
            group.mkdir()
            (group / limit).write_text(str(mebibytes * 2**20))
            break
    else:
        raise PermissionError("limiting memory needs a control group that this user may make")
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()

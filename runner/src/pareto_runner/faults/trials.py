"""The faults: each breaks a suite in one way, lets it run again, and says what a row must tell about it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pareto_runner.faults.stage import Ended, Stage, after, small_disk, small_memory, tracking_server
from pareto_runner.faults.workload import PHASES

#: a trial breaks a suite on the stage, and yields after each command how it ended; ``row`` matches a failed result
Trial = Callable[[Stage, random.Random, int], Iterator[Ended]]
#: seconds that a suite of two variants takes here; faults at random moments fall within it
SUITE = 14.0
ONE_BY_ONE = ("--only", "A", "--seeds", "2")


def strike_file(path: Path, phase: str, action: str, nth: int = 1) -> None:
    """Let the workload misbehave, the ``nth`` time that it reaches a phase."""
    path.write_text(json.dumps({"phase": phase, "action": action, "after": nth}))


def in_phase(action: str, *arguments: str) -> Trial:
    """The workload itself misbehaves, in one phase after the other."""

    def trial(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
        phase = PHASES[number % len(PHASES)]
        strike_file(stage.fault, phase, action, rng.randint(1, 12) if phase == "train" else 1)
        alone = () if number // len(PHASES) % 2 else ("--only", "A")
        yield stage.run(*arguments, *alone)

    return trial


def memory(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """The kernel kills a worker for want of memory."""
    phase = PHASES[number % len(PHASES)]
    strike_file(stage.fault, phase, "memory")
    with small_memory(1500) as group:
        running = stage.start()
        (group / "cgroup.procs").write_text(str(running.process.pid))
        yield running.wait()


def not_a_number(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """The loss becomes NaN."""
    strike_file(stage.fault, "train", "nan", rng.randint(1, 10))
    yield stage.run()


def parent_killed(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """The suite's own process is killed at a random moment."""
    running = stage.start(*(ONE_BY_ONE if number % 2 else ("--only", "A")))
    after(rng.uniform(0, 1.2 * SUITE if number % 2 else 0.7 * SUITE), running.kill)
    yield running.wait()


def parent_stopped(kind: signal.Signals) -> Trial:
    """The suite is told to stop by a signal at a random moment."""

    def trial(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
        running = stage.start(*ONE_BY_ONE)
        after(rng.uniform(2, 1.2 * SUITE), lambda: running.kill(kind))
        yield running.wait()

    return trial


def any_worker_killed(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """Whatever child the suite has at a random moment is killed, the one that writes to the store included."""
    running = stage.start(*ONE_BY_ONE)

    def kill() -> None:
        workers = running.workers()
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)

    after(rng.uniform(1, 1.1 * SUITE), kill)
    yield running.wait()


def disk_full(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """The disk with the results fills up at a random moment, and is freed afterwards."""
    with on_small_disk(stage):
        ballast = stage.out / "ballast"

        def fill() -> None:
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                while True:
                    file.write(b"x" * 4096)
                    file.flush()

        after(rng.uniform(0.5, SUITE), fill)
        yield stage.run(*ONE_BY_ONE)
        ballast.unlink(missing_ok=True)
        yield stage.run(*ONE_BY_ONE)


def read_only(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """The folder with the results becomes read-only at a random moment, or is so from the start."""
    with on_small_disk(stage):
        at = 0.0 if number % 4 == 0 else rng.uniform(0.5, SUITE)
        if not at:
            remount(stage.out, "ro")
        after(at, lambda: remount(stage.out, "ro"))
        yield stage.run(*ONE_BY_ONE)
        remount(stage.out, "rw")
        yield stage.run(*ONE_BY_ONE)


@contextlib.contextmanager
def on_small_disk(stage: Stage) -> Iterator[None]:
    """Let the results lie on a file system of their own, and be copied home at the end."""
    disk = stage.folder / "disk"
    home = stage.out
    with small_disk(disk, 8):
        stage.out = disk
        try:
            yield
        finally:
            shutil.copytree(disk, home, dirs_exist_ok=True)
            stage.out = home


def remount(folder: Path, mode: str) -> None:
    """Make a mounted file system read-only or writable; files that are open for writing are cut off."""
    for _ in range(50):
        command = ["mount", "-o", f"remount,{mode}", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.05)


def journal_truncated(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """A journal file is cut off at a random byte."""
    yield stage.run()
    path = rng.choice(sorted((stage.out / "journal").glob("*.json")))
    os.truncate(path, rng.randrange(path.stat().st_size))


def checkpoint_corrupted(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """Training is killed, and a file of its checkpoint is cut off, changed or removed."""
    strike_file(stage.fault, "train", "kill", rng.randint(3, 12))
    yield stage.run("--only", "A")
    files = sorted(path for path in (stage.out / "artifacts").rglob("checkpoint/**/*") if path.is_file())
    if not files:
        raise AssertionError("the killed training left no checkpoint")
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    how = number % 3
    if how == 0 or not content:
        path.unlink()
    elif how == 1:
        os.truncate(path, rng.randrange(len(content)))
    else:
        content[rng.randrange(len(content))] ^= 0xFF
        path.write_bytes(content)


def store_locked(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """Another process holds the store's lock, from the start or from a random moment, for a while or to the end."""
    yield stage.run("--only", "B")
    with contextlib.closing(sqlite3.connect(stage.database, isolation_level=None, check_same_thread=False)) as other:
        running = stage.start("--only", "A")
        time.sleep(rng.choice([0.0, rng.uniform(1, 8)]))
        other.execute("begin exclusive")
        if number % 2:
            time.sleep(rng.uniform(1, 10))
            other.execute("rollback")
        yield running.wait()
        if not number % 2:
            other.execute("rollback")
    yield stage.upload()


def server_stopped(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """The tracking server is killed at a random moment, and started again after a while or when the suite has ended."""
    with tracking_server(stage) as server:
        running = stage.start(*ONE_BY_ONE)
        stopping = after(rng.uniform(1, SUITE), server.stop)
        if number % 2:
            stopping.join()
            time.sleep(rng.uniform(0, 5))
            server.start()
        yield running.wait()
        stopping.join()
        server.start()
        yield stage.upload()


def clock_back(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """The clock is an hour behind in the second run: as the standard library tells it.

    The process that writes to MLflow sees it by ``time`` alone: compiled libraries there crash on a replaced
    ``datetime``, which no stepping clock makes them do.
    """
    yield stage.run("--only", "A")
    shim = stage.folder / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(
        "import datetime, time\n"
        "real, start = time.time, time.monotonic()\n"
        f"back = lambda: 3600 if time.monotonic() - start > {rng.uniform(0, 2)} else 0\n"
        "time.time = lambda: real() - back()\n"
        "class Behind(datetime.datetime):\n"
        "    @classmethod\n"
        "    def now(cls, tz=None): return cls.fromtimestamp(time.time(), tz)\n"
        "import sys\n"
        "if 'pareto_runner.upload' not in sys.orig_argv: datetime.datetime = Behind\n"
    )
    path = os.pathsep.join([str(shim), *filter(None, [os.environ.get("PYTHONPATH")])])
    yield stage.run("--only", "A", "--fresh", PYTHONPATH=path)
    yield stage.run(PYTHONPATH=path)


def two_at_once(stage: Stage, rng: random.Random, number: int) -> Iterator[Ended]:
    """Two suites start at about the same time on one store: on one results folder, or each on its own."""
    other = stage.out if number % 2 else stage.folder / "others"
    first = stage.start()
    time.sleep(rng.uniform(0, 3))
    second = stage.start(out=other)
    yield first.wait()
    yield second.wait()


#: name: the trial, how many of 220, and what the failed row says (empty: there need not be one)
TRIALS: dict[str, tuple[Trial, int, str]] = {
    "worker killed, in each phase": (in_phase("kill"), 36, r"killed by SIGKILL"),
    "worker exits, in each phase": (in_phase("exit"), 8, r"ended with status 7"),
    "worker raises, in each phase": (in_phase("raise"), 8, r"a fault that nobody foresaw"),
    "worker hangs, in each phase": (in_phase("hang", "--limit", "0.2"), 8, r"hung"),
    "out of memory, in each phase": (memory, 8, r"out of memory"),
    "loss becomes NaN": (not_a_number, 6, r"loss is nan|not finite|NaN"),
    "any worker killed, random moment": (any_worker_killed, 20, ""),
    "suite killed, random moment": (parent_killed, 36, ""),
    "suite interrupted (Ctrl-C), random moment": (parent_stopped(signal.SIGINT), 10, ""),
    "suite terminated, random moment": (parent_stopped(signal.SIGTERM), 10, ""),
    "disk full, random moment": (disk_full, 10, ""),
    "results folder read-only, random moment": (read_only, 8, ""),
    "journal file cut off": (journal_truncated, 10, ""),
    "checkpoint corrupted": (checkpoint_corrupted, 9, r"killed by SIGKILL"),
    "store locked": (store_locked, 8, ""),
    "tracking server killed, random moment": (server_stopped, 8, ""),
    "clock steps back": (clock_back, 7, ""),
    "two suites at once on one store": (two_at_once, 10, ""),
}

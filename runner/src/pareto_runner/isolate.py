"""Child processes that talk in JSON lines: the parent blocks on their answers, and survives and explains their end.

No worker outlives its parent: each reads its standard input, and ends with its whole process group when that ends (the
writer to MLflow first completes the run that it is at). No descendant outlives a child: when it ends, so does its
group, and with it every pipe that the parent waits on.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pareto_core import ParetoError

#: begins each line of a child's output that is meant for the parent; all others are its log
MARK = "@pareto "
LOG_TAIL = 20
#: where processes of one training find each other: that of a child is never that of its parent
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ChildError(ParetoError):
    """A child that ended without finishing its work; the message says how in a line, ``log`` ends with its last words.

    ``kind`` is ``unsupported`` where the child found that the work cannot be done here, ``failed`` otherwise.
    """

    def __init__(self, message: str, kind: str = "failed", log: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.log = log


def environment(processes: int = 1, accelerator: str | None = None) -> dict[str, str]:
    """Variables for a child: its threads, no telemetry, no downloads' progress bars, DeepSpeed's accelerator.

    ``processes`` share the CPUs that this process may use.
    """
    chosen = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if accelerator:
        chosen["DS_ACCELERATOR"] = accelerator
    inherited = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    return {**inherited, **chosen}


def binding() -> dict[str, str]:
    """Variables that bind one thread to each CPU that this process may use.

    For a child that computes on the CPU and has it to itself: unbound threads wander, which makes equal processes
    differ by more than a percent.
    """
    places = ",".join(f"{{{cpu}}}" for cpu in sorted(os.sched_getaffinity(0)))
    return {"OMP_PROC_BIND": "true", "OMP_PLACES": places}


def say(message: Mapping[str, Any]) -> None:
    """Called in a child: send ``message`` to the parent."""
    sys.stdout.write(MARK + json.dumps(message) + "\n")
    sys.stdout.flush()


class Child:
    """A worker process. Its lines that begin with the mark are messages; everything else goes to ``log``.

    Where it says nothing for ``limit`` seconds while the parent waits, it is ended.
    """

    def __init__(
        self, command: Sequence[str], log: Path, variables: Mapping[str, str], limit: float | None = None
    ) -> None:
        self._log_path, self._limit = log, limit
        self._expired = ""
        self._out_of_memory_before = out_of_memory_kills()
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = log.open("wb", buffering=0)
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=dict(variables),
                start_new_session=True,
            )
        except OSError as error:
            raise ChildError(f"a process could not be started: {error}") from error
        self._warden = threading.Thread(target=self._end_group, daemon=True)
        self._warden.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id, which is the process group's too."""
        return self._process.pid

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield the child's messages until its output ends; blocks, never polls."""
        while line := self._line():
            if line.startswith(MARK):
                with contextlib.suppress(ValueError):  # a line that was cut short by the child's end
                    yield json.loads(line.removeprefix(MARK))
                    continue
            with contextlib.suppress(OSError):  # a full disk costs the log, not the run
                self._log.write(line.encode())

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; raises ChildError where the child ends or reports an error."""
        self.send(**command)
        return self.answer()

    def send(self, **command: Any) -> None:
        """Send a command without waiting; raises ChildError where the child has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(command) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.post_mortem() from None

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last command; raises ChildError where the child ends or reports an error."""
        for answer in self.messages():
            self.check(answer)
            return answer
        raise self.post_mortem()

    def check(self, message: Mapping[str, Any]) -> None:
        """Raise ChildError where ``message`` reports an error."""
        if "error" in message:
            raise ChildError(message["error"], message.get("kind", "failed"), self.tail())

    def wait(self) -> int:
        """Wait for the end of the child and its group; returns the exit status (negative: the signal)."""
        self._warden.join()
        return self._process.wait()

    def post_mortem(self) -> ChildError:
        """Say how the child ended."""
        status = self.wait()
        log = self.tail()
        how = f"ended with status {status}" + (f": {log.splitlines()[-1][:200]}" if log else "")
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL and out_of_memory_kills() > self._out_of_memory_before:
            how = "was killed by the kernel: out of memory"
        return ChildError(f"the process {self._expired or how}", log=log)

    def tail(self) -> str:
        """The last lines of the log."""
        with contextlib.suppress(OSError), self._log_path.open(errors="replace") as log:
            return "\n".join(collections.deque((line.rstrip() for line in log if line.strip()), LOG_TAIL))
        return ""

    def close(self) -> None:
        """End the child and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            # What was written to a child that is gone cannot be flushed.
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _line(self) -> str:
        """The next line of output, empty at its end."""
        assert self._process.stdout is not None
        timer = threading.Timer(self._limit, self._expire) if self._limit else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            return self._process.stdout.readline().decode(errors="replace")
        finally:
            if timer:
                timer.cancel()

    def _expire(self) -> None:
        self._expired = f"hung: it said nothing for {self._limit:g} s, and was ended"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _end_group(self) -> None:
        """Wait for the child's end, then end what is left of its group; not reaped yet, its id is still its own."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def out_of_memory_kills() -> int:
    """How often the kernel has killed a process for want of memory; 0 where it does not say.

    Of this process's control group, which its children share; of the whole machine where the group has no counter.
    """
    for path in (*memory_counters(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError), path.open() as lines:
            return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def memory_counters(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Where the kernel may count out-of-memory kills of this process's control group, of version 1 or 2."""
    with contextlib.suppress(OSError, ValueError):
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
        memory = [root / "memory" / path.strip("/") / "memory.oom_control" for kind, path in groups if kind == "memory"]
        return memory or [root / path.strip("/") / "memory.events" for kind, path in groups if not kind]
    return []


def worker_command(*arguments: str, processes: int = 1) -> list[str]:
    """Command of a worker; several processes are started by DeepSpeed's own launcher, on this host.

    The launcher's front end counts devices, and sees one CPU where ``numactl`` is missing; the launcher itself takes
    the ranks that it is given, so it is called directly.
    """
    module = ["pareto_runner.worker", *arguments]
    if processes == 1:
        return [sys.executable, "-m", *module]
    import base64
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(processes))}).encode()).decode()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    return [*launcher, "--master_addr=127.0.0.1", f"--master_port={port}", "--module", *module]

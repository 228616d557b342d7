"""Child processes that talk in JSON lines: the parent blocks on their answers and survives their end."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pareto_core import ParetoError

#: begins each line of a child's output that is meant for the parent; all others are its log
MARK = "@pareto "
LOG_TAIL = 12


class ChildError(ParetoError):
    """A child that ended without finishing its work; the message says how, with the tail of its log.

    ``kind`` is ``unsupported`` where the child found that the work cannot be done here, ``failed`` otherwise.
    """

    def __init__(self, message: str, kind: str = "failed") -> None:
        super().__init__(message)
        self.kind = kind


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
    return {**os.environ, **chosen}


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
    """A worker process. Its lines that begin with the mark are messages; everything else goes to ``log``."""

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log
        self._log = log.open("w")
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(variables),
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield the child's messages until its output ends; blocks, never polls."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                self._log.write(line)
                self._log.flush()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; raises ChildError where the child ends or reports an error."""
        self.send(**command)
        return self.answer()

    def send(self, **command: Any) -> None:
        """Send a command without waiting; raises ChildError where the child has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self.post_mortem()) from None

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last command; raises ChildError where the child ends or reports an error."""
        for answer in self.messages():
            if "error" in answer:
                raise ChildError(answer["error"], answer.get("kind", "failed"))
            return answer
        raise ChildError(self.post_mortem())

    def wait(self) -> int:
        """Wait for the end; returns the exit status (negative: the signal)."""
        return self._process.wait()

    def post_mortem(self) -> str:
        """Say how the child ended, with the tail of its log."""
        status = self.wait()
        how = f"ended with status {status}"
        if status < 0:
            name = signal.Signals(-status).name
            how = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"the process {how}; log: {self.tail()}"

    def tail(self) -> str:
        """The last lines of the log."""
        self._log.flush()
        with self._log_path.open(errors="replace") as log:
            lines = collections.deque((line.rstrip() for line in log if line.strip()), LOG_TAIL)
        return "\n".join(lines) or "(empty)"

    def close(self) -> None:
        """End the child and everything that it started."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGTERM)
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            # What was written to a child that is gone cannot be flushed.
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()


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

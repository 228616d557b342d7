"""Processes that hold one runtime each and answer requests, one JSON object per line each way."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pareto_core import DataError, ModelError


class Worker:
    """A runtime in a process of its own, bound to the first ``threads`` CPUs that this process may use.

    Raises :class:`ModelError` with the last of what the process said where it ends before it answers.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - kept open
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )
        self.ready: dict[str, Any] = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self._log.seek(0)
        last = " ".join(self._log.read().split("\n")[-4:]).strip()
        raise ModelError(f"{self.name} ended with code {self._process.wait()}: {last[-400:] or 'it said nothing'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._log.close()


def script(name: str) -> str:
    """Path of a worker's script, which any interpreter can run."""
    return str(Path(__file__).with_name(name))


def run_script(python: str, name: str, **asked: Any) -> None:
    """Run a script to its end under the interpreter ``python``; raises DataError with the last of what it said."""
    done = subprocess.run([python, script(name), json.dumps(asked)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise DataError(
            f"{name}: {last} (pip install llama-cpp-python gguf openvino, or name an interpreter by --python)"
        )

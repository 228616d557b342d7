"""A runtime over several processes: each computes a part of every matrix, and their sums meet in shared memory.

This process is rank 0: it has the head, chooses the tokens, and tells the workers which rows to run. A worker that
dies or hangs ends the call with an error, never with a wait. Each process computes on CPUs of its own alone: the thread
that calls rank 0 is bound to rank 0's for the time of each call of the native program.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pareto_core.errors import ConfigError, ParetoError, UnsupportedError
from pareto_cpu_runtime import memory
from pareto_cpu_runtime._library import native
from pareto_cpu_runtime.families.build import Builder, Built, Limits
from pareto_cpu_runtime.pool import bound_to, made_pool
from pareto_cpu_runtime.runtime import INT4, Runtime, open_source
from pareto_cpu_runtime.shard import cpu_sets, shard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pareto_cpu_runtime.sources import Source

RUN, COPY = b"R", b"C"
READY = b"+"
HEADER = struct.Struct("<cqqq")


class WorkerError(ParetoError, RuntimeError):
    """A process of a parallel runtime that died, or did not answer in time."""


class ParallelRuntime(Runtime):
    """A :class:`Runtime` whose matrices are split over ``ranks`` processes; a context manager, to be closed.

    Several threads may call it; one call of the native program runs at a time. It works in the process that made it: a
    child process (fork) gets :class:`WorkerError`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        ranks: int = 2,
        precision: Any = INT4,
        max_length: int | None = None,
        slots: int = 4,
        max_rows: int = 512,
        cache_dtype: str = "bf16",
        kernel: str = "auto",
        compute: str = "",
        timeout_s: float = 30.0,
    ) -> None:
        """Start the workers and load each process's part of the model in ``directory`` (packed or transformers').

        ``precision`` is "int4" or None, as in :meth:`Runtime.from_pretrained`. Every process gets an equal share of the
        CPUs, whole sockets first. ``timeout_s`` is how long a process waits for another within a step. Raises
        :class:`UnsupportedError` where heads do not divide or there are more processes than CPUs, and
        :class:`WorkerError` where a worker does not start.
        """
        if ranks < 1:
            raise ConfigError("ParallelRuntime", "ranks", ranks, "must be at least 1")
        if precision not in (INT4, None):
            raise ConfigError("ParallelRuntime", "precision", precision, 'expected "int4" or None')
        self.ranks, self._timeout_s = ranks, timeout_s
        self._workers: list[subprocess.Popen[bytes]] = []
        self._closing = False
        # What the workers are told and what this process runs must come in the same order in all of them.
        self._calls = threading.RLock()
        self._owner = os.getpid()
        self._sets = cpu_sets(memory.cpus(), sockets(), ranks)
        self._settings = {
            "directory": str(Path(directory).resolve()),
            "ranks": ranks,
            "precision": precision,
            "timeout_s": timeout_s,
        }
        source = open_source(directory, precision, "map")
        try:
            super().__init__(
                source,
                threads=len(self._sets[0]),
                max_length=max_length,
                slots=slots,
                max_rows=max_rows,
                cache_dtype=cache_dtype,
                kernel=kernel,
                compute=compute,
            )
            self._await_workers()
        except BaseException:
            self.close()
            raise

    def _pool(self) -> Any:
        return made_pool(self.threads, self._sets[0], bind_caller=True)

    def _build(self, source: Source, pool: Any, limits: Limits) -> Built:
        floats = limits.max_rows * self.decoder.width
        size = int(native().exchange_bytes(self.ranks, floats))
        self._shared = os.memfd_create("pareto-exchange")
        os.ftruncate(self._shared, size)
        settings = {**self._settings, "limits": vars(limits), "floats": floats}
        parts = [shard(self.decoder, rank, self.ranks) for rank in range(self.ranks)]
        for rank in range(1, self.ranks):
            self._workers.append(_start({**settings, "rank": rank, "cpus": self._sets[rank]}, self._shared))
        self._exchange = exchange_on(self._shared, self.ranks, 0, floats, self._timeout_s)
        for worker in self._workers:
            threading.Thread(target=self._watch, args=(worker,), daemon=True).start()
        return Builder(parts[0], source, pool, limits, exchange=self._exchange).build()

    def _watch(self, worker: subprocess.Popen[bytes]) -> None:
        """A worker that ends while it is needed stops everybody who waits for it."""
        worker.wait()
        if not self._closing:
            self._exchange.stop()

    def _await_workers(self) -> None:
        for rank, worker in enumerate(self._workers, start=1):
            assert worker.stdout is not None
            if worker.stdout.read(1) != READY:
                raise WorkerError(f"process {rank} of {self.ranks} did not start; its error is above")

    def _run(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        want: NDArray[np.int32],
        logits: NDArray[np.float32],
    ) -> None:
        # One call's rows at a time: a worker that hangs is noticed before the pipe to it is full.
        with self._together(HEADER.pack(RUN, len(tokens), 0, 0) + np.stack([tokens, slots, positions]).tobytes()):
            super()._run(tokens, slots, positions, want, logits)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """See :meth:`Runtime.copy_slot`."""
        with self._together(HEADER.pack(COPY, source, target, tokens)):
            super().copy_slot(source, target, tokens)

    @contextlib.contextmanager
    def _together(self, message: bytes) -> Iterator[None]:
        """The block is this process's part of what ``message`` tells the workers; no other call comes between."""
        if os.getpid() != self._owner:
            raise WorkerError(f"a runtime of process {self._owner} cannot run in its child: make a new one here")
        with self._calls:
            self._require_alive()
            try:
                self._tell(message)
                yield
            except BaseException:
                # The workers do their part of this call nevertheless: their next sums would be of other rows.
                self._exchange.stop()
                raise
            self._require_alive()

    def _tell(self, message: bytes) -> None:
        try:
            for worker in self._workers:
                assert worker.stdin is not None
                worker.stdin.write(message)
                worker.stdin.flush()
        except OSError:
            self._exchange.stop()
        self._require_alive()

    def _require_alive(self) -> None:
        if self._closing:
            raise WorkerError("the runtime is closed")
        if self._exchange.stopped:
            ended = [f"{rank}: exit {w.poll()}" for rank, w in enumerate(self._workers, 1) if w.poll() is not None]
            self.close()
            silent = f"did not answer within {self._timeout_s} s, or a call of it was interrupted"
            reason = f"ended ({', '.join(ended)})" if ended else silent
            raise WorkerError(f"a process of the parallel runtime {reason}; make a new runtime")

    def close(self) -> None:
        """End the workers, once the call that runs has ended. A closed runtime cannot run."""
        if os.getpid() != self._owner:  # a child process's copy: the workers are its parent's
            self._closing = True
            return
        with self._calls:
            self._close()

    def _close(self) -> None:
        if self._closing:
            return
        self._closing = True
        for worker in self._workers:
            if worker.stdin is not None:
                worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(timeout=5)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
        if hasattr(self, "_shared"):
            os.close(self._shared)

    def __enter__(self) -> ParallelRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self.close()


def _start(settings: dict[str, Any], shared: int) -> subprocess.Popen[bytes]:
    # Started on its CPUs, so that the threads of the libraries that it imports are bound to them, too.
    with bound_to(settings["cpus"]):
        return subprocess.Popen(
            [sys.executable, "-m", "pareto_cpu_runtime.parallel", str(shared), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(shared,),
        )


def exchange_on(shared: int, ranks: int, rank: int, floats: int, timeout_s: float) -> Any:
    """The native exchange on the shared memory behind the descriptor ``shared``."""
    block = mmap.mmap(shared, 0)
    return native().Exchange(np.frombuffer(block, dtype=np.uint8), ranks, rank, floats, timeout_s)


def sockets() -> dict[int, int]:
    """The socket of each CPU, as far as the kernel tells."""
    found = {}
    for cpu in memory.cpus():
        try:
            found[cpu] = int(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id").read_text())
        except (OSError, ValueError):
            found[cpu] = 0
    return found


def serve(shared: int, settings: dict[str, Any]) -> None:
    """What a worker does: load its part, say so, and run what it is told until its input ends."""
    limits = Limits(**settings["limits"])
    ranks, rank = settings["ranks"], settings["rank"]
    exchange = exchange_on(shared, ranks, rank, settings["floats"], settings["timeout_s"])
    source = open_source(settings["directory"], settings["precision"], "map")
    from pareto_cpu_runtime.families import describe

    decoder = shard(describe(source.config), rank, ranks)
    pool = made_pool(len(settings["cpus"]), settings["cpus"], bind_caller=True)
    built = Builder(decoder, source, pool, limits, exchange=exchange, head=False).build()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    nothing, no_logits = np.empty(0, dtype=np.int32), np.empty((0, 0), dtype=np.float32)
    while header := sys.stdin.buffer.read(HEADER.size):
        kind, first, second, third = HEADER.unpack(header)
        if kind == COPY:
            built.cache.copy(first, second, third)
            continue
        rows = np.frombuffer(sys.stdin.buffer.read(12 * first), dtype=np.int32).reshape(3, first)
        built.program.run(*rows, nothing, no_logits)
        if exchange.stopped:
            raise UnsupportedError("another process of the parallel runtime ended or did not answer")


if __name__ == "__main__":
    serve(int(sys.argv[1]), json.loads(sys.argv[2]))

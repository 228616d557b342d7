"""The threads of a runtime: how many, on which CPUs, and for how long.

A pool is the calling thread and workers. Workers run on the CPUs that they are given, each bound to one where there are
as many CPUs as threads; where there are more, none is bound to one, so that several small runtimes of a process do not
meet on the first CPUs. The calling thread stays where it is, but in tensor parallelism, where each process has CPUs of
its own, it is bound to them while the pool works.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from pareto_core.errors import ConfigError, UnsupportedError
from pareto_cpu_runtime import memory
from pareto_cpu_runtime._library import native


def thread_count(threads: int | None) -> int:
    """The threads to run on: those asked for, or torch's, at most one per CPU of the affinity."""
    if threads is not None:
        most = native().MOST_THREADS
        if not 1 <= threads <= most:
            reason = "threads wait for each other by spinning, so more than there are CPUs slow each other down"
            raise ConfigError("Runtime", "threads", threads, f"must be 1 to {most}: {reason}")
        return threads
    import torch

    return max(1, min(torch.get_num_threads(), len(memory.cpus())))


def made_pool(threads: int, cpus: list[int], *, bind_caller: bool = False) -> Any:
    """A native pool on ``cpus``; with ``bind_caller`` the calling thread stays on them, too, while the pool works.

    Raises :class:`UnsupportedError` where the system refuses a thread.
    """
    try:
        return native().Pool(threads, cpus, bind_caller)
    except RuntimeError as error:
        raise UnsupportedError(f"a runtime of {threads} threads cannot be made: {error}") from error


@contextlib.contextmanager
def bound_to(cpus: list[int]) -> Iterator[None]:
    """Bind the calling thread to ``cpus`` within the block; threads and processes that it starts there stay on them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

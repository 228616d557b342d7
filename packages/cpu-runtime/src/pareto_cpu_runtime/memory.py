"""Memory that weights lie in, and whether a model fits at all."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pareto_core.errors import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LINE = 64
HUGE_PAGE = 2 << 20
CHUNK = 256 << 20
MOVED = 2 << 20
#: threads that copy at most: more of them only wait for memory
COPIERS = 4


class Arena:
    """Hands out pieces of large anonymous mappings, on cache lines, in huge pages where the system grants them."""

    def __init__(self) -> None:
        self._chunk: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._used = 0

    def take(self, size: int) -> NDArray[np.uint8]:
        """``size`` bytes of zeros that live as long as the array that is returned."""
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _mapping(max(size, CHUNK)), 0
        piece = self._chunk[self._used : self._used + size]
        self._used += -(-size // LINE) * LINE
        return piece


def _mapping(size: int) -> NDArray[np.uint8]:
    block = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(block, dtype=np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + size]


def move(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """Copy from a file that is mapped and unchanged, letting its pages go on the way, so that none is held twice.

    ``source`` must be such a mapping, to the ends of its pages: other memory would be lost. The pages stay in the
    system's file cache. Several threads copy: most of the time goes into the kernel's clearing of new pages.
    """
    address = source.ctypes.data

    def release(start: int, end: int) -> None:
        first = (address + start) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(first, address + end - first, mmap.MADV_DONTNEED)

    def piece(start: int) -> None:
        end = min(start + MOVED, len(source))
        target[start:end] = source[start:end]
        release(start, end)

    starts = range(0, len(source), MOVED)
    with ThreadPoolExecutor(max(1, min(COPIERS, len(cpus()), len(starts)))) as pool:
        for _ in pool.map(piece, starts):  # raises what a thread raised
            pass
    if len(source):  # a thread's first and last bytes may have mapped a huge page of its neighbours again
        release(0, len(source))


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that a runtime takes: weights, the cache (when every slot is full), and activations with workspaces."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations


def available_bytes() -> int:
    """Bytes that new memory can take: what the kernel says is available, and what the control group leaves."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free
    return free


def require_memory(plan: MemoryPlan) -> None:
    """Raise :class:`UnsupportedError`, with both figures, where the plan is larger than what is available."""
    free = available_bytes()
    if plan.total > free:
        raise UnsupportedError(
            f"the model needs {plan.total / 2**20:,.0f} MiB (weights {plan.weights / 2**20:,.0f}, cache "
            f"{plan.cache / 2**20:,.0f}, activations {plan.activations / 2**20:,.0f}), and {free / 2**20:,.0f} MiB are "
            "available: use fewer bits, fewer slots or a smaller max_length"
        )


def cpus() -> list[int]:
    """CPUs that this process may run on: those of all its threads, since OpenMP may have bound each to one of them."""
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            found |= os.sched_getaffinity(int(thread))
    return sorted(found)

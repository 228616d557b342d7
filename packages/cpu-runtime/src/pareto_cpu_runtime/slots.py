"""Which slots of the cache are in use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from pareto_core.errors import UnsupportedError


class Slots:
    """Lends the slots 0 … count - 1, each to one user at a time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def take(self) -> int | None:
        """A free slot, None where there is none."""
        with self._lock:
            return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Give ``slot`` back."""
        with self._lock:
            self._free.append(slot)

    @contextlib.contextmanager
    def lend(self, count: int, purpose: str) -> Iterator[list[int]]:
        """Lend ``count`` slots for the time of the block. Raises :class:`UnsupportedError` where fewer are free."""
        with self._lock:
            if count > len(self._free):
                raise UnsupportedError(
                    f"{purpose} needs {count} slots of the cache, {len(self._free)} of {self.count} are free: make the "
                    f"runtime with slots={count} or more"
                )
            lent = [self._free.pop() for _ in range(count)]
        try:
            yield lent
        finally:
            with self._lock:
                self._free.extend(lent)

"""A pretended device: it works in a thread of its own while its caller goes on, and counts the memory it has given."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable


class Device:
    """Takes work at once and does it later, one piece after the other; :meth:`synchronize` waits for all of it."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[float, Callable[[float], None]]] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.allocated_bytes = 0
        self.peak_bytes = 0

    def launch(self, seconds: float, then: Callable[[float], None] = lambda _: None) -> None:
        """Ask for work that takes ``seconds``; at its end ``then`` is told the time. Returns at once."""
        if not self._thread.is_alive():
            self._thread.start()
        self._queue.put((seconds, then))

    def synchronize(self) -> None:
        """Wait until all work that was asked for is done."""
        self._queue.join()

    def allocate(self, size: int) -> None:
        """Give ``size`` bytes."""
        self.allocated_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def free(self, size: int) -> None:
        """Take ``size`` bytes back."""
        self.allocated_bytes -= size

    def reset_peak(self) -> None:
        """Let the peak be what is allocated now."""
        self.peak_bytes = self.allocated_bytes

    def _work(self) -> None:
        while True:
            seconds, then = self._queue.get()
            time.sleep(seconds)
            then(time.perf_counter())
            self._queue.task_done()


#: the only one of this process
DEVICE = Device()

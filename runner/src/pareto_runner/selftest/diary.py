"""What the workloads write down while they run, and what it says: the truth that the instruments are held against."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

MIB = 2**20
#: how many times as long as the others the first calls of each kind take
COLD = (5.0, 4.2, 3.4, 2.6, 1.8)
STRETCH = 0.05


@dataclasses.dataclass(frozen=True)
class Event:
    """The ``number``-th call of one kind of work, with bytes in use at its peak (0: not counted).

    ``times`` are seconds of the monotonic clock: its start, those at which tokens came, one each, and its end.
    """

    what: str
    number: int
    peak_bytes: int
    times: tuple[float, ...]


class Diary:
    """A file of its own.

    Writing to the disk would be part of the call that the instruments time and not of what the workload times, so it is
    left to the next call, which does it on its own time. What a process that is killed did last is not in its diary.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, _ = tempfile.mkstemp(dir=directory, suffix=".txt")
        self._file = os.fdopen(descriptor, "w")

    def write(self, what: str, number: int, peak_bytes: int, *times: float) -> None:
        """Add an event."""
        self._file.write(f"{what} {number} {peak_bytes} {' '.join(map(repr, times))}\n")

    def keep(self) -> None:
        """Put on the disk what was written."""
        self._file.flush()


class Facts:
    """Reads the diaries of a directory; each reading gives what was written since the one before."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Path, int] = {}

    def read(self, counts: Mapping[str, int] | None = None) -> Truth:
        """Return the new events; ``counts`` says how many calls of a kind were reported on, which are the last ones."""
        events = []
        for path in sorted(self._directory.glob("*.txt")):
            lines = path.read_text().splitlines()
            events += [_event(line) for line in lines[self._read.get(path, 0) :]]
            self._read[path] = len(lines)
        return Truth(events, counts or {})


def _event(line: str) -> Event:
    what, number, peak, *times = line.split()
    return Event(what, int(number), int(peak), tuple(map(float, times)))


class Truth:
    """What events say of the calls of one kind, without the first ones, which take longer.

    A median is that of the medians of all stretches of :data:`STRETCH` seconds: each moment counts the same, as it does
    where the instruments take turns, and not more for having been a fast one.
    """

    def __init__(self, events: Sequence[Event], counts: Mapping[str, int]) -> None:
        self._events, self._counts = events, counts

    def calls(self, what: str) -> list[Event]:
        """The calls of one kind that were not among the first: all, or as many of the last as were reported on."""
        found = [event for event in self._events if event.what == what and event.number >= len(COLD)]
        return found[-self._counts.get(what, len(found)) :]

    def latency_ms(self, what: str) -> float:
        """Milliseconds of a call."""
        return self._median_ms(what, lambda times: times[-1] - times[0])

    def first_token_ms(self, what: str) -> float:
        """Milliseconds to the first token."""
        return self._median_ms(what, lambda times: times[1] - times[0])

    def next_token_ms(self, what: str) -> float:
        """Milliseconds from one token to the next, over all tokens after the first."""
        return self._median_ms(what, lambda times: (times[-2] - times[1]) / (len(times) - 3))

    def _median_ms(self, what: str, seconds: Callable[[tuple[float, ...]], float]) -> float:
        stretches: dict[int, list[float]] = {}
        for event in self.calls(what):
            stretches.setdefault(int(event.times[0] / STRETCH), []).append(seconds(event.times))
        return 1000 * statistics.median(statistics.median(stretch) for stretch in stretches.values())

    def items_per_second(self, what: str, items: int) -> float:
        """Items of all calls in the seconds of all calls; each has ``items``."""
        calls = self.calls(what)
        return items * len(calls) / sum(event.times[-1] - event.times[0] for event in calls)

    def total_seconds(self, what: str) -> float:
        """Seconds from the start of the first call of a kind to the end of the last, whatever lay between."""
        times = [time for event in self._events if event.what == what for time in event.times]
        return max(times) - min(times)

    def count(self, what: str) -> int:
        """Number of calls of a kind."""
        return sum(event.what == what for event in self._events)

    def peak_mib(self, what: str, above: str | None = None) -> float:
        """Highest memory in any call of a kind, in MiB; above what was in use at the event ``above``, where given."""
        peak = max(event.peak_bytes for event in self._events if event.what == what)
        base = next(event.peak_bytes for event in self._events if event.what == above) if above else 0
        return (peak - base) / MIB

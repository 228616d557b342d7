"""Time and peak memory of each phase of a preparation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pareto_core import Measurement, Target
from pareto_runner.memory import resident_host_bytes

MIB = 2**20


class Phases:
    """Times phases and reads the peak memory of each; a phase entered again adds up."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._base = 0
        self._running: list[str] = []
        self._start = 0.0
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._others: dict[str, Measurement] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run the body as the phase ``name``; a phase around it stands still: the body is none of its time and peak."""
        if self._running:
            self._book()
        self._running.append(name)
        self._begin()
        yield
        self._book()
        self._running.pop()
        if self._running:
            self._begin()

    def _begin(self) -> None:
        self._target.reset_peak_memory()
        self._start = time.perf_counter()

    def _book(self) -> None:
        """Add what the running phase has used since it began, or went on."""
        self._target.synchronize()
        name = self._running[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - self._start
        self._peaks[name] = max(self._peaks.get(name, 0), self._target.peak_memory())

    def start_from_here(self) -> None:
        """Take what the process holds now (libraries, data) as the base that host peaks are counted from."""
        self._peaks.clear()
        idle = resident_host_bytes()
        self._base = idle if self._target.device == "cpu" else 0
        self.add([Measurement(name="idle_mib", value=idle / MIB, unit="MiB")])

    def so_far(self, *names: str) -> dict[str, dict[str, float]]:
        """Seconds and bytes above the base of the phases ``names``, for :meth:`go_on_from` in a later process."""
        known = [name for name in names if name in self._seconds]
        return {
            "seconds": {name: self._seconds[name] for name in known},
            "peaks": {name: self._peaks[name] - self._base for name in known},
        }

    def go_on_from(self, earlier: Mapping[str, Mapping[str, Any]]) -> None:
        """Take what an earlier process had measured in place of what this one has: it includes all that came before."""
        self._seconds.update(earlier["seconds"])
        for name, peak in earlier["peaks"].items():
            self._peaks[name] = max(self._peaks.get(name, 0), int(peak) + self._base)

    def add(self, measurements: Sequence[Measurement]) -> None:
        """Keep ``measurements``; a later one of the same name replaces the earlier."""
        self._others.update({item.name: item for item in measurements})

    def measurements(self) -> list[Measurement]:
        """Everything noted, with the seconds of each phase, and the peak of each since :meth:`start_from_here`."""
        found = [Measurement(name=f"time_s.{name}", value=value, unit="s") for name, value in self._seconds.items()]
        for name, peak in self._peaks.items():
            found.append(Measurement(name=f"{name}_peak_mib", value=(peak - self._base) / MIB, unit="MiB"))
        return [*self._others.values(), *found]

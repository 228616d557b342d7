"""How long a packed model takes to load, and what memory loading and generating take beyond its weights."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from pareto_cpu_runtime.peers import packed_model
from pareto_cpu_runtime.peers.compare import LONG_PROMPT, NEW
from pareto_cpu_runtime.peers.geometry import Geometry
from pareto_cpu_runtime.peers.workers import Worker

#: group size, and whether the file is read or mapped
CASES = ((32, "read"), (32, "map"), (128, "read"), (128, "map"))


@dataclasses.dataclass
class Loaded:
    """One way to load; a process gives its seconds and bytes: ``weights``, ``cache``, peaks above what was held."""

    group: int
    memory: str
    runs: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def peak(self, phase: str) -> float:
        """Highest peak of ``loading`` or ``generating``, the cache taken off, over the weights' bytes."""
        return max((run[phase] - run["cache"]) / run["weights"] for run in self.runs)


@dataclasses.dataclass
class Loading:
    """All cases with one thread count."""

    threads: int
    cases: list[Loaded]

    def to_json(self) -> dict[str, Any]:
        """Every figure, process by process."""
        return dataclasses.asdict(self)


def loading(geometry: Geometry, folder: Path, threads: int, turns: int) -> Loading:
    """Load and generate ``turns`` times in each way, every time in a process of its own."""
    for group in sorted({group for group, _ in CASES}):
        if not (folder / f"packed-{group}").exists():
            packed_model.write(geometry, group, folder / f"packed-{group}")
    found = Loading(threads, [Loaded(group, memory) for group, memory in CASES])
    module = [sys.executable, "-m", "pareto_cpu_runtime.peers.load_worker"]
    for number in range(turns):
        for case in found.cases:
            asked = map(str, (threads, case.memory, LONG_PROMPT + 4 * NEW, LONG_PROMPT, NEW))
            command = [*module, str(folder / f"packed-{case.group}"), *asked]
            with Worker(f"loading, group {case.group}", command, threads) as worker:
                case.runs.append(worker.ready)
        print(f"loading, {threads} threads: {number + 1}/{turns}", file=sys.stderr)
    return found

"""What the models of the self-test can be asked for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

Workload = Literal["host", "device", "cuda", "compute"]


def sleep_until(end: float) -> None:
    """Leave the processor to others until ``end``."""
    time.sleep(max(0.0, end - time.perf_counter()))


def spin_until(end: float) -> None:
    """Keep the processor busy until ``end``."""
    while time.perf_counter() < end:
        pass


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call does: it lasts ``seconds``, and every ``spike_every``-th call holds ``spike_mib`` for a moment.

    A generation says its first token after ``seconds``, then ``burst`` tokens after each ``gap`` seconds, ``tokens`` in
    all.
    """

    seconds: float
    batch_size: int = 1
    until: Callable[[float], None] = sleep_until
    spike_mib: int = 0
    spike_every: int = 0
    tokens: int = 0
    gap: float = 0.0
    burst: int = 1


#: requests by workload: what the instruments time
REQUESTS: dict[Workload, dict[str, Work]] = {
    "host": {
        "sleep1": Work(0.001),
        "sleep10": Work(0.01),
        "sleep100": Work(0.1),
        "spin10": Work(0.01, until=spin_until),
        "items8": Work(0.04, batch_size=8),
        "tokens": Work(0.04, tokens=17, gap=0.005),
        "bursts": Work(0.04, tokens=17, gap=0.02, burst=4),
        "spikes": Work(0.002, spike_mib=48, spike_every=10),
    },
    "device": {"kernel": Work(0.02), "stream": Work(0.04, tokens=9, gap=0.01)},
    "cuda": {"block": Work(0.0)},
    "compute": {"matmuls": Work(0.0, batch_size=64)},
}
#: what training, evaluation, and looking whether a model still answers the same do
STEPS = {
    "train": Work(0.06, batch_size=8, spike_mib=32, spike_every=7),
    "evaluate": Work(0.005, spike_mib=40, spike_every=4),
    "probe": Work(0.001),
}
WORK = {**STEPS, **{name: work for works in REQUESTS.values() for name, work in works.items()}}
#: a request carries the index of its name
NAMES = tuple(WORK)

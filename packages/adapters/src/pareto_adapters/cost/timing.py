"""Times taken in turns, and intervals of what is computed from them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

#: seconds that the timed calls of one turn take together, where they are shorter than that
TURN = 0.02
#: seconds from which a call is so long that what the call before it left in the caches makes no difference
LONG = 0.25
RESAMPLES = 2000

Calls = Mapping[str, Callable[[], object]]
Times = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, by the percentile bootstrap over turns."""

    value: float
    low: float
    high: float


def synchronize(device: str) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def take_turns(calls: Calls, rounds: int, device: str = "cpu", done: Callable[[float], None] | None = None) -> Times:
    """Seconds per call of each case in each of ``rounds`` turns, whose order rotates; ``done`` is told the share.

    A turn of a case is one call that is not counted (unless calls are long) and as many as fill a fiftieth of a second.
    What disturbs the machine for a while hits all cases of a round, so ratios are taken round by round.
    """
    names = list(calls)
    lengths = {name: _length(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if lengths[name] < LONG:
                calls[name]()
            times[name].append(_timed(calls[name], max(1, math.ceil(TURN / lengths[name])), device))
        if done is not None:
            done((number + 1) / rounds)
    return {name: np.array(values) for name, values in times.items()}


def rounds_within(calls: Calls, seconds: float, device: str = "cpu", fewest: int = 12) -> int:
    """How many rounds of :func:`take_turns` fit into ``seconds``, at least ``fewest``."""
    lengths = [_length(call, device) for call in calls.values()]
    one = sum(length if length >= LONG else length + max(length, TURN) for length in lengths)
    return max(fewest, round(seconds / one))


def estimate(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> Estimate:
    """``statistic`` of ``columns`` (turns), which are resampled together; it reduces the last axis of its arguments."""
    picks = np.random.default_rng(0).integers(0, len(columns[0]), (RESAMPLES, len(columns[0])))
    low, high = np.quantile(statistic(*(column[picks] for column in columns)), [0.025, 0.975])
    return Estimate(float(statistic(*columns)), float(low), float(high))


def median(times: np.ndarray) -> np.ndarray:
    """Median over turns."""
    return np.median(times, axis=-1)


def ratio(times: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Median over turns of a case's time to the base's."""
    return np.median(times / base, axis=-1)


def extra_ratio(times: np.ndarray, other: np.ndarray, base: np.ndarray) -> np.ndarray:
    """What ``times`` have above ``base``, to what ``other`` has above it."""
    return np.median(times - base, axis=-1) / np.median(other - base, axis=-1)


def _length(call: Callable[[], object], device: str) -> float:
    call()
    return max(_timed(call, 1, device), 1e-9)


def _timed(call: Callable[[], object], times: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / times

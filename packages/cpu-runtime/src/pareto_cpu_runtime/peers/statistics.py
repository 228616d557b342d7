"""Ratios of medians over turns, with bootstrap intervals that keep the turns paired."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

RESAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio_of_medians(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Interval:
    """Median of ``above`` over the median of ``below``; turn i of both was measured one after the other.

    Turns are drawn with replacement, both sides together. Raises ValueError where the lengths differ or are zero.
    """
    import numpy as np

    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} and {len(below)} turns: equal counts above 0 are needed")
    a, b = np.asarray(above, float), np.asarray(below, float)
    drawn = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))

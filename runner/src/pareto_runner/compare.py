"""Paired statistics: the ratio of two variants that took turns, with a bootstrap interval and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pareto_core import Comparison

Verdict = Literal["better", "worse", "inconclusive"]
RESAMPLES = 2000


def paired_ratio(
    name: str, baseline: str, values: Sequence[float], baseline_values: Sequence[float], level: float = 0.95
) -> Comparison:
    """Compare two lists of per-turn times, item by item: below 1 is faster than the baseline.

    The ratio is the median over turns; its interval is the percentile bootstrap over turns, so that a drift that
    hits both members of a turn cancels. The random numbers are seeded: the same times give the same interval.
    Raises ValueError on lists of different length, without items, or with times that are not positive.
    """
    a, b = np.asarray(values, float), np.asarray(baseline_values, float)
    if a.shape != b.shape or a.size == 0 or not ((a > 0).all() and (b > 0).all()):
        raise ValueError("paired_ratio needs two equally long lists of positive times")
    ratios = a / b
    picks = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return Comparison(
        name=name,
        baseline=baseline,
        ratio=float(np.median(ratios)),
        low=float(low),
        high=float(high),
        pairs=len(ratios),
        verdict=verdict(float(low), float(high)),
    )


def verdict(low: float, high: float) -> Verdict:
    """Say whether an interval of a ratio of times lies below 1 (better), above (worse), or around it."""
    return "better" if high < 1 else "worse" if low > 1 else "inconclusive"

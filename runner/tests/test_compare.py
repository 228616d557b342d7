"""Paired ratios: by hand, under drift that only pairing removes, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest

from pareto_runner.compare import paired_ratio, verdict


def test_hand_computed_ratio() -> None:
    found = paired_ratio("latency", "base", [2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert found.ratio == 2.0
    assert (found.low, found.high) == (2.0, 3.0)
    assert (found.pairs, found.verdict, found.baseline) == (3, "worse", "base")


def test_a_drift_that_hits_both_cancels() -> None:
    rng = np.random.default_rng(1)
    drift = np.linspace(1, 3, 60)
    base = drift * rng.normal(1, 0.01, 60)
    faster = 0.9 * drift * rng.normal(1, 0.01, 60)
    found = paired_ratio("latency", "base", faster, base)
    assert found.verdict == "better"
    assert found.ratio == pytest.approx(0.9, rel=0.01)
    assert found.high - found.low < 0.02


def test_equal_variants_are_rarely_told_apart() -> None:
    rng = np.random.default_rng(2)
    verdicts = [
        paired_ratio("l", "b", rng.lognormal(0, 0.05, 40), rng.lognormal(0, 0.05, 40)).verdict for _ in range(200)
    ]
    false = sum(v != "inconclusive" for v in verdicts)
    # 5 % of 200 is 10; the binomial's 99.9 % point is 21.
    assert false <= 21


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.8, 0.9, "better"), (1.1, 1.2, "worse"), (0.9, 1.1, "inconclusive")]
)
def test_verdicts(low: float, high: float, word: str) -> None:
    assert verdict(low, high) == word


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_bad_times_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="positive times"):
        paired_ratio("l", "b", a, b)

"""Statistics: what a sample can carry, intervals, ratios of times taken in turns, differences of scores, verdicts.

- A quantile is given only where order statistics of the sample bound it with 95 % confidence (:func:`carries`).
- A median's interval is made of two order statistics, which supposes nothing of the distribution.
- Times are compared by the ratio within each turn, with a bootstrap over turns; the verdict leaves room for what two
  equal processes differ by on this machine (:func:`resolution`).
- Scores are compared over the same records. All results on one task are resampled with the same random numbers, so any
  two are paired by construction, in every seed, without their records at hand.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np

from pareto_core import Comparison, DataError, Difference, Record, Result, Task

Verdict = Literal["better", "worse", "inconclusive"]
LEVEL = 0.95
#: resamples of turns, and of records: as many as the time allows, within these bounds
RESAMPLES = 2000
REPLICATES, FEWEST_REPLICATES = 1000, 100
#: smallest change of a ratio that is believed: equal processes differ by up to 0.6 %, each having its own memory layout
RESOLUTION = 0.01
#: how often a resample is drawn again on which the metric is undefined, before there are no resampled scores at all
REDRAWS = 20


def carries(count: int, quantile: float, level: float = LEVEL) -> bool:
    """Say whether ``count`` values can carry a quantile: whether two of them bound it at ``level``, with equal tails.

    The sample's extremes are the widest bounds there are. They miss the quantile where all values fall on one side of
    it, so the probability of that may not exceed the share of one tail: 6 values carry a median, 36 carry p10 and p90.
    """
    return count > 0 and max(quantile, 1 - quantile) ** count <= (1 - level) / 2


def carried_quantile(values: Sequence[float], quantile: float) -> float | None:
    """The quantile of ``values``, None where they are too few to carry it."""
    return float(np.quantile(np.asarray(values, float), quantile)) if carries(len(values), quantile) else None


def median_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Bound the median of what the independent ``values`` were drawn from; None where they are too few (under 6)."""
    rank = _median_rank(len(values), level)
    ordered = sorted(values)
    return (float(ordered[rank]), float(ordered[-1 - rank])) if rank is not None else None


@functools.cache
def _median_rank(count: int, level: float) -> int | None:
    """Index of the largest order statistic that lies above the median with a probability of at most one tail."""
    below, term, rank, all_of_them = 0, 1, None, 2**count
    for index in range(count // 2):
        below += term
        if below / all_of_them > (1 - level) / 2:
            break
        rank, term = index, term * (count - index) // (index + 1)
    return rank


def paired_ratio(
    name: str, baseline: str, values: Sequence[float], baseline_values: Sequence[float], margin: float = RESOLUTION
) -> Comparison:
    """Compare two lists of per-turn times, item by item: below 1 is faster than the baseline.

    The ratio is the median over turns; its interval is the percentile bootstrap over turns, so that a drift that
    hits both members of a turn cancels. The random numbers are seeded: the same times give the same interval. Turns
    that are too few to carry a median give no verdict. Raises ValueError on lists of different length, without items,
    or with times that are not positive.
    """
    a, b = np.asarray(values, float), np.asarray(baseline_values, float)
    if a.shape != b.shape or a.size == 0 or not ((a > 0).all() and (b > 0).all()):
        raise ValueError("paired_ratio needs two equally long lists of positive times")
    ratios = a / b
    picks = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = _percentile_interval(np.median(ratios[picks], axis=1))
    return Comparison(
        name=name,
        baseline=baseline,
        ratio=float(np.median(ratios)),
        low=low,
        high=high,
        pairs=len(ratios),
        verdict=verdict(low, high, margin) if carries(len(ratios), 0.5) else "inconclusive",
        margin=margin,
    )


def verdict(low: float, high: float, margin: float) -> Verdict:
    """Say whether an interval of a ratio of times lies wholly below 1 - margin (better) or above 1 + margin (worse)."""
    return "better" if high < 1 - margin else "worse" if low > 1 + margin else "inconclusive"


def resolution(control: Comparison | None) -> float:
    """The change of a ratio that could not be told from none: how far the control's interval reaches from 1.

    The control is a second worker of the baseline in the same turns; without one, :data:`RESOLUTION`.
    """
    return max([RESOLUTION] + ([abs(control.low - 1), abs(control.high - 1)] if control else []))


def resample_scores(task: Task, records: Sequence[Record], seconds: float = 5.0) -> tuple[float, ...]:
    """Scores of ``task`` over bootstrap resamples of ``records``: 1,000, fewer (at least 100) where scoring is slow.

    The records that the n-th resample draws depend on nothing but n and the number of records. A resample on which the
    metric is undefined is drawn again; where that does not help, there are no resampled scores. Nor are there any of a
    single record, whose resamples are all alike: an interval without width would claim certainty.
    """
    if len(records) < 2:
        return ()
    end = time.perf_counter() + seconds
    scores: list[float] = []
    for number in range(REPLICATES):
        if number >= FEWEST_REPLICATES and time.perf_counter() > end:
            break
        score = _resampled_score(task, records, number)
        if score is None:
            return ()
        scores.append(round(score, 6))
    return tuple(scores)


def _resampled_score(task: Task, records: Sequence[Record], number: int) -> float | None:
    random = np.random.default_rng([number, len(records)])
    for _ in range(REDRAWS):
        picks = random.integers(0, len(records), len(records))
        try:
            score = task.score([records[index] for index in picks])[task.primary_metric.name]
        except DataError:
            continue
        if math.isfinite(score):
            return score
    return None


def paired_difference(
    result: Result, baseline: Result, records: Sequence[Record], baseline_records: Sequence[Record]
) -> Difference | None:
    """Compare the scores of two results of one seed; None where they were not taken over the same records.

    The interval is the percentile bootstrap over records: it speaks of these two trained models. Where each record is
    right or wrong, McNemar's test is added.
    """
    same = [(r.id, r.label) for r in records] == [(r.id, r.label) for r in baseline_records]
    if not (same and comparable(result, baseline)):
        return None
    found = seeds_difference([result], [baseline])
    judged = result.metric == "accuracy" and all(_is_judged(record) for record in [*records, *baseline_records])
    if found is None or not judged:
        return found
    right, theirs = ([r.prediction == r.label for r in items] for items in (records, baseline_records))
    fields = {**found.to_json(), "p_value": mcnemar(right, theirs)}
    return Difference.from_json(fields)


def seeds_difference(results: Sequence[Result], baselines: Sequence[Result]) -> Difference | None:
    """Compare the scores of two variants over their common seeds, from the resampled scores alone.

    The records are the same in all seeds, so each bootstrap replicate resamples them in all seeds alike. With several
    seeds their scatter comes on top, by Student's distribution: resampling two or three seeds would hardly show it.
    Seeds whose data or number of records differ are left out; None where nothing is left. One seed that was compared
    already gives that comparison.
    """
    others = {baseline.spec.seed: baseline for baseline in baselines}
    pairs = [(result, others[result.spec.seed]) for result in results if result.spec.seed in others]
    pairs = [(result, baseline) for result, baseline in pairs if comparable(result, baseline)]
    if not pairs:
        return None
    first, other = pairs[0]
    known = [item for item in first.differences if (item.name, item.baseline) == (first.metric, other.spec.variant)]
    if len(pairs) == 1 and known:
        return known[0]
    count = min(len(item.resampled) for pair in pairs for item in pair)
    replicates = np.array([np.subtract(a.resampled[:count], b.resampled[:count]) for a, b in pairs])
    differences = [_score(result) - _score(baseline) for result, baseline in pairs]
    low, high = _percentile_interval(_with_scatter(replicates.mean(axis=0), differences))
    return Difference(
        name=first.metric,
        baseline=other.spec.variant,
        difference=round(float(np.mean(differences)), 6),
        low=round(low, 6),
        high=round(high, 6),
        records=_record_count(first),
        verdict=difference_verdict(low, high, first.higher_is_better),
    )


def _with_scatter(means: np.ndarray, differences: Sequence[float]) -> np.ndarray:
    """Add to each replicate of the mean over seeds what that mean scatters by, drawn from Student's distribution."""
    if len(differences) == 1:
        return means
    error = np.std(differences, ddof=1) / math.sqrt(len(differences))
    return means + error * np.random.default_rng(0).standard_t(len(differences) - 1, len(means))


def comparable(result: Result, baseline: Result) -> bool:
    """Say whether two results were scored by one metric on the same data, and were resampled."""
    return (
        bool(result.resampled and baseline.resampled)
        and result.metric == baseline.metric
        and result.data == baseline.data
        and _record_count(result) == _record_count(baseline)
    )


def difference_verdict(low: float, high: float, higher_is_better: bool) -> Verdict:
    """Say whether an interval of a difference of scores lies on the better side of 0, on the worse, or around it."""
    if low <= 0 <= high:
        return "inconclusive"
    return "better" if (low > 0) == higher_is_better else "worse"


def mcnemar(right: Sequence[bool], baseline_right: Sequence[bool]) -> float:
    """Exact two-sided p-value of McNemar's test: is who is right where only one is right the toss of a coin?"""
    gained = sum(mine and not other for mine, other in zip(right, baseline_right, strict=True))
    lost = sum(other and not mine for mine, other in zip(right, baseline_right, strict=True))
    tosses = gained + lost
    tail = sum(math.comb(tosses, heads) for heads in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def _is_judged(record: Record) -> bool:
    return record.prediction is not None and record.label is not None


def _score(result: Result) -> float:
    value = result.value(result.metric)
    assert value is not None, f"a result of {result.metric} holds no such measurement"
    return value


def _record_count(result: Result) -> int:
    found = result.measurement(result.metric)
    return found.samples if found else 0


def _percentile_interval(replicates: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)

"""Statistics against independent truth: by hand, by SciPy, and by simulated coverage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from pareto_core import (
    Budget,
    Comparison,
    DataError,
    Engine,
    Measurement,
    MethodSpec,
    Metric,
    Record,
    Result,
    RunSpec,
    Stage,
    Task,
    TaskRef,
    Training,
)
from pareto_core.testing import TinyTask
from pareto_runner.compare import (
    carried_quantile,
    carries,
    mcnemar,
    median_interval,
    paired_difference,
    paired_ratio,
    resample_scores,
    resolution,
    seeds_difference,
    verdict,
)
from pareto_runner.run import Artifact, add_differences, prepare


@pytest.mark.parametrize(("quantile", "fewest"), [(0.5, 6), (0.1, 36), (0.9, 36), (0.99, 368)])
def test_a_quantile_needs_so_many_values_that_the_extremes_bound_it(quantile: float, fewest: int) -> None:
    assert carries(fewest, quantile)
    assert not carries(fewest - 1, quantile)
    # All values on one side of the quantile: the sample's extremes miss it, with at most a tail's probability.
    assert max(binom.pmf(0, fewest, quantile), binom.pmf(fewest, fewest, quantile)) <= 0.025
    assert not carries(0, quantile)


def test_a_quantile_that_is_not_carried_is_not_given() -> None:
    assert carried_quantile(range(35), 0.9) is None
    assert carried_quantile(range(101), 0.9) == 90.0


@pytest.mark.parametrize("count", [6, 7, 20, 31, 100, 1001])
def test_the_medians_interval_is_the_tightest_pair_of_order_statistics_that_covers_it(count: int) -> None:
    found = median_interval([float(value) for value in reversed(range(count))])
    assert found is not None
    rank = int(found[0])
    assert found[1] == count - 1 - rank
    assert binom.cdf(rank, count, 0.5) <= 0.025 < binom.cdf(rank + 1, count, 0.5)


def test_the_medians_interval_covers_it_whatever_the_distribution() -> None:
    rng = np.random.default_rng(3)
    for draw, median in ((rng.exponential, np.log(2)), (rng.standard_cauchy, 0.0)):
        found = [median_interval(draw(size=25)) for _ in range(400)]
        covered = sum(interval is not None and interval[0] <= median <= interval[1] for interval in found)
        # The stated level is 95 % at least: below this count with probability 0.1 %.
        assert covered >= binom.ppf(0.001, 400, 0.95)


def test_too_few_values_have_no_interval_of_the_median() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert median_interval([]) is None


def test_hand_computed_ratio() -> None:
    found = paired_ratio("latency", "base", [2.0, 4.0, 9.0] * 2, [1.0, 2.0, 3.0] * 2)
    assert found.ratio == 2.0
    assert (found.low, found.high) == (2.0, 3.0)
    assert (found.pairs, found.verdict, found.baseline, found.margin) == (6, "worse", "base", 0.01)


def test_five_turns_carry_no_verdict() -> None:
    assert paired_ratio("latency", "base", [2.0] * 5, [1.0] * 5).verdict == "inconclusive"
    assert paired_ratio("latency", "base", [2.0] * 6, [1.0] * 6).verdict == "worse"


def test_a_drift_that_hits_both_cancels() -> None:
    rng = np.random.default_rng(1)
    drift = np.linspace(1, 3, 60)
    base = drift * rng.normal(1, 0.01, 60)
    faster = 0.9 * drift * rng.normal(1, 0.01, 60)
    found = paired_ratio("latency", "base", faster, base)
    assert found.verdict == "better"
    assert found.ratio == pytest.approx(0.9, rel=0.01)
    assert found.high - found.low < 0.02


def test_equal_variants_are_rarely_told_apart_even_without_a_margin() -> None:
    rng = np.random.default_rng(2)
    verdicts = [
        paired_ratio("l", "b", rng.lognormal(0, 0.05, 40), rng.lognormal(0, 0.05, 40), margin=0.0).verdict
        for _ in range(200)
    ]
    false = sum(v != "inconclusive" for v in verdicts)
    assert false <= binom.ppf(0.999, 200, 0.05)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.8, 0.94, "better"),
        (1.06, 1.2, "worse"),
        (0.9, 1.1, "inconclusive"),
        (0.8, 0.96, "inconclusive"),
        (1.04, 1.2, "inconclusive"),
    ],
)
def test_a_verdict_needs_the_whole_interval_beyond_the_margin(low: float, high: float, word: str) -> None:
    assert verdict(low, high, 0.05) == word


def test_the_control_says_what_can_be_resolved_but_never_less_than_a_percent() -> None:
    control = Comparison(name="c", baseline="b", ratio=1.01, low=0.97, high=1.02, pairs=20, verdict="inconclusive")
    assert resolution(control) == pytest.approx(0.03)
    assert resolution(dataclasses.replace(control, low=0.999, high=1.002)) == 0.01
    assert resolution(None) == 0.01


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_bad_times_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="positive times"):
        paired_ratio("l", "b", a, b)


def records(right: Sequence[bool]) -> list[Record]:
    return [Record(str(number), "yes" if good else "no", "yes") for number, good in enumerate(right)]


def test_resamples_of_different_models_draw_the_same_records() -> None:
    right = np.random.default_rng(4).random(90) < 0.7
    mine = resample_scores(TinyTask(), records(right))
    opposite = resample_scores(TinyTask(), records(~right))
    assert len(mine) == 1000
    assert [a + b for a, b in zip(mine, opposite, strict=True)] == pytest.approx([100.0] * 1000, abs=2e-6)
    # The binomial's own deviation, which the bootstrap of a proportion estimates.
    share = right.mean()
    assert np.std(mine) == pytest.approx(100 * np.sqrt(share * (1 - share) / 90), rel=0.1)


def test_slow_scoring_gives_the_first_of_the_same_resamples() -> None:
    right = records(np.random.default_rng(5).random(50) < 0.6)
    few = resample_scores(TinyTask(), right, seconds=0.0)
    assert len(few) == 100
    assert few == resample_scores(TinyTask(), right)[:100]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap(Task):
    """The mean score of the ones less that of the zeros: undefined where either is missing."""

    name: ClassVar[str] = "gap"
    metric: ClassVar[Metric] = Metric("gap", unit="")
    raises: bool = False

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        ones, zeros = ([float(r.score or 0) for r in records if r.label == label] for label in (1.0, 0.0))
        if self.raises and not (ones and zeros):
            raise DataError("one class only")
        with np.errstate(invalid="ignore"):
            return {"gap": float(np.divide(sum(ones), len(ones)) - np.divide(sum(zeros), len(zeros)))}


def test_one_record_has_no_interval() -> None:
    assert resample_scores(TinyTask(), records(np.array([True]))) == ()
    assert len(resample_scores(TinyTask(), records(np.array([True, False])))) == 1000


@pytest.mark.parametrize("raises", [False, True])
def test_a_resample_without_a_defined_metric_is_drawn_again(raises: bool) -> None:
    # Three in a hundred resamples of these draw one class alone.
    few = [Record(str(i), label=float(i < 2), score=float(i)) for i in range(6)]
    with np.errstate(all="ignore"):
        found = resample_scores(Gap(raises=raises), few)
        assert len(found) == 1000
        assert np.isfinite(found).all()
        assert resample_scores(Gap(raises=raises), few[:1]) == ()


def result(seed: int, score: float, resampled: Sequence[float], variant: str = "v", **changes: Any) -> Result:
    spec = RunSpec(
        question="q",
        variant=variant,
        stages=(Stage(methods=(MethodSpec(name="m"),)),),
        task=TaskRef(name="t"),
        target="xeon",
        seed=seed,
    )
    measured = Measurement(name="accuracy", value=score, unit="%", samples=changes.pop("count", 100))
    values: dict[str, Any] = {"metric": "accuracy", "data": {"sha256": "1"}, "measurements": (measured,)}
    return Result(spec=spec, status="ok", resampled=tuple(resampled), **{**values, **changes})


def scored(seed: int, right: Sequence[bool], variant: str = "v", **changes: Any) -> Result:
    items = records(right)
    score = TinyTask().score(items)["accuracy"]
    return result(seed, score, resample_scores(TinyTask(), items), variant, count=len(items), **changes)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 3), (9, 1), (1, 9), (40, 20), (0, 5)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    mine = [True] * gained + [False] * lost + [True] * 7
    other = [False] * gained + [True] * lost + [True] * 7
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(mine, other) == pytest.approx(expected)


def test_scores_over_the_same_records_are_compared_in_pairs() -> None:
    rng = np.random.default_rng(6)
    baseline = rng.random(400) < 0.6
    better = baseline | (rng.random(400) < 0.15)
    found = paired_difference(scored(0, better), scored(0, baseline, "base"), records(better), records(baseline))
    assert found is not None
    assert found.difference == pytest.approx(100 * (better.mean() - baseline.mean()))
    assert (found.name, found.baseline, found.records, found.verdict) == ("accuracy", "base", 400, "better")
    # No record got worse, so the paired difference has the deviation of one proportion, not of two.
    gain = (better & ~baseline).mean()
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(100 * np.sqrt(gain * (1 - gain) / 400), rel=0.1)
    assert found.p_value == mcnemar(better, baseline)
    turned = paired_difference(scored(0, baseline), scored(0, better, "base"), records(baseline), records(better))
    assert turned is not None
    assert turned.verdict == "worse"


def test_a_metric_that_is_better_below_turns_the_verdict_and_has_no_mcnemar() -> None:
    low, high = [False] * 60 + [True] * 40, [False] * 20 + [True] * 80
    error = {"metric": "eer", "higher_is_better": False}
    measured = [Measurement(name="eer", value=value, unit="%", samples=100) for value in (40.0, 80.0)]
    mine = scored(0, low, measurements=(measured[0],), **error)
    other = scored(0, high, measurements=(measured[1],), **error)
    found = paired_difference(mine, other, records(low), records(high))
    assert found is not None
    assert (found.difference, found.verdict, found.p_value) == (-40.0, "better", None)


@pytest.mark.parametrize(
    "changes", [{"count": 99}, {"data": {"sha256": "2"}}, {"resampled": ()}, {"metric": "f1", "measurements": ()}]
)
def test_what_was_not_scored_on_the_same_records_is_not_compared(changes: dict[str, Any]) -> None:
    mine = result(0, 70.0, [70.0, 71.0])
    other = result(0, 60.0, **{"resampled": [60.0, 61.0], "variant": "base", **changes})
    assert seeds_difference([mine], [other]) is None
    assert paired_difference(mine, other, records([True]), records([True])) is None


def test_records_of_other_items_are_not_compared_and_seeds_are_matched() -> None:
    mine, other = result(0, 70.0, [70.0, 71.0]), result(0, 60.0, [60.0, 61.0], "base")
    assert paired_difference(mine, other, [Record("1", "a", "a")], [Record("2", "a", "a")]) is None
    assert seeds_difference([mine], [result(1, 60.0, [60.0, 61.0], "base")]) is None
    both = seeds_difference([mine, result(1, 64.0, [65.0, 64.0])], [other, result(2, 0.0, [0.0, 0.0], "base")])
    assert both is not None
    assert both.difference == 10.0


def test_one_seed_keeps_what_was_found_when_its_records_were_at_hand() -> None:
    right = [True] * 70 + [False] * 30
    mine, other = scored(0, right), scored(0, right[::-1], "base")
    known = paired_difference(mine, other, records(right), records(right[::-1]))
    assert known is not None
    assert known.p_value == 1.0
    assert seeds_difference([dataclasses.replace(mine, differences=(known,))], [other]) == known


def test_the_interval_over_seeds_covers_the_true_difference() -> None:
    """Three seeds that scatter widely, over one draw of the records; resampling three seeds would cover it in 80 %."""
    rng = np.random.default_rng(7)
    runs, size, covered = 300, 120, 0
    picks = [np.random.default_rng([number, size]).integers(0, size, size) for number in range(150)]
    for _ in range(runs):
        hardness = rng.normal(0, 1, size)
        mine, theirs = [], []
        for seed in range(3):
            for results, shift, name in ((mine, 0.3, "v"), (theirs, 0.0, "base")):
                skill = shift + rng.normal(0, 0.5)
                right = 100.0 * (skill + rng.normal(0, 1, size) > hardness)
                results.append(result(seed, right.mean(), [right[pick].mean() for pick in picks], name, count=size))
        found = seeds_difference(mine, theirs)
        assert found is not None
        covered += found.low <= TRUE_GAIN <= found.high
    assert covered >= binom.ppf(0.001, runs, 0.95)


def _true_gain() -> float:
    from scipy.stats import norm

    spread = np.sqrt(2 + 0.5**2)
    return float(100 * (norm.cdf(0.3 / spread) - norm.cdf(0)))


TRUE_GAIN = _true_gain()


def test_prepared_variants_are_compared_over_the_records_that_they_left(tmp_path: Path) -> None:
    artifacts = [prepared(tmp_path, "full", 30), prepared(tmp_path, "untrained", 1)]
    results = [artifact.result for artifact in artifacts]
    spec = dataclasses.replace(results[1].spec, variant="failed")
    results.append(dataclasses.replace(results[1], spec=spec, status="failed", reason="a worker died"))
    full, untrained, failed = add_differences([*artifacts, artifacts[1]], results)
    assert (full.differences, failed.differences) == ((), ())
    (found,) = untrained.differences
    right = [[r.prediction == r.label for r in artifact.records()] for artifact in artifacts]
    assert (found.name, found.baseline, found.records) == ("accuracy", "full", 64)
    assert found.difference == pytest.approx(100 * (np.mean(right[1]) - np.mean(right[0])))
    only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in (right[:2], right[1::-1])]
    assert found.p_value == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    assert found.low < found.difference < found.high
    assert len(full.resampled) == 1000
    assert full.value("time_s.resample") > 0  # type: ignore[operator]


def prepared(folder: Path, variant: str, steps: int) -> Artifact:
    training = Training(learning_rate=1e-2, batch_size=16, budget=Budget(max_steps=steps))
    spec = RunSpec(
        question="q",
        variant=variant,
        stages=(Stage(methods=(MethodSpec(name="full"),), training=training),),
        task=TaskRef(name="core.tiny"),
        target="xeon",
        engine=Engine(name="torch", precision="fp32"),
        baseline=None if variant == "full" else "full",
        rivals=("full", variant, "absent"),
    )
    return prepare(spec, folder / variant)

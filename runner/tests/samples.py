"""Results as a benchmark would give them, for the tests that read or show results; read with ``runpy.run_path``."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from hypothesis import strategies as st

from pareto_core import Budget, Comparison, Engine, Measurement, MethodSpec, Result, RunSpec, Stage, TaskRef, Training
from pareto_core.result import Difference

MACHINE = {
    "cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
    "isa": ["avx2", "avx512f", "amx_bf16"],
    "cores": 2,
    "affinity": 2,
    "memory_gib": 7.7,
    "libraries": {"torch": "2.11.0", "transformers": "5.17.0"},
}
PAPER = {"title": "KronA", "authors": "Edalati et al.", "year": 2022, "url": "https://arxiv.org/abs/2212.10650"}
#: variant: method, fields, accuracy, trainable, latency ratio, step ms, training MiB
VARIANTS: dict[str, tuple[str, dict[str, Any], float, int, float, float, float]] = {
    "Full fine-tuning": ("adapters.full", {}, 71.2, 22_713_216, 1.0, 182.0, 1010.0),
    "BitFit": ("adapters.bitfit", {}, 63.4, 46_000, 1.0, 121.0, 690.0),
    "LoRA r=1": ("adapters.lora", {"rank": 1}, 67.9, 17_000, 1.0, 135.0, 705.0),
    "KronA (24, 16)": ("adapters.krona", {"a_shape": [24, 16]}, 68.8, 17_001, 1.002, 139.0, 708.0),
}


def spec(variant: str, seed: int = 0, **changes: Any) -> RunSpec:
    """A run of one of :data:`VARIANTS`, or of any other name as KronA."""
    method, fields = VARIANTS.get(variant, VARIANTS["KronA (24, 16)"])[:2]
    training = Training(learning_rate=2e-3, budget=Budget(epochs=3.0))
    values: dict[str, Any] = {
        "question": "adapters/krona_vs_lora",
        "variant": variant,
        "stages": (Stage(methods=(MethodSpec(name=method, fields=fields),), training=training),),
        "task": TaskRef(name="core.docstrings", fields={"classes": 20}),
        "target": "xeon",
        "engine": Engine(precision="fp32"),
        "seed": seed,
        "baseline": None if variant == "Full fine-tuning" else "Full fine-tuning",
        "rivals": ("LoRA r=1",) if variant.startswith("KronA") else (),
    }
    return RunSpec(**{**values, **changes})


def score(variant: str, seed: int) -> float:
    """Accuracy of a run."""
    return round(VARIANTS[variant][2] + 0.4 * (seed - 1), 2)


def resampled(variant: str, seed: int, count: int = 200) -> tuple[float, ...]:
    """The score over resampled test items: most of the scatter is common to all variants and seeds."""
    common, own = random.Random(0), random.Random(f"{variant} {seed}")
    return tuple(round(score(variant, seed) + common.gauss(0, 1.3) + own.gauss(0, 0.5), 6) for _ in range(count))


def difference(variant: str, seed: int, baseline: str = "Full fine-tuning") -> Difference:
    """The difference of two accuracies, with an interval of one point to both sides."""
    value = round(score(variant, seed) - score(baseline, seed), 6)
    verdict = "better" if value > 1 else "worse" if value < -1 else "inconclusive"
    ends = {"low": value - 1, "high": value + 1, "p_value": 0.04}
    return Difference(name="accuracy", baseline=baseline, difference=value, records=1200, verdict=verdict, **ends)


def measurements(variant: str, seed: int) -> tuple[Measurement, ...]:
    """Figures that wobble a little with the seed."""
    trainable, ratio, step, peak = VARIANTS[variant][3:]
    latency = 4.0 * ratio + 0.02 * seed

    def spread(name: str, value: float) -> Measurement:
        ends = {"low": 0.97 * value, "high": 1.06 * value, "interval_low": 0.99 * value, "interval_high": 1.02 * value}
        return Measurement(name=name, value=value, unit="ms", samples=300, **ends)

    return (
        Measurement(name="accuracy", value=score(variant, seed), unit="%", samples=1200),
        Measurement(name="majority_accuracy", value=11.0, unit="%"),
        Measurement(name="trainable_parameters", value=trainable, unit="parameters"),
        Measurement(name="trainable_percent", value=100 * trainable / 22_713_216, unit="%"),
        Measurement(name="total_parameters", value=22_713_216, unit="parameters"),
        Measurement(name="weight_mib", value=86.6, unit="MiB"),
        spread("latency_ms.batch1", latency),
        spread("latency_ms.batch32", 19 * latency),
        Measurement(name="inference_peak_mib", value=512.0 + seed, unit="MiB"),
        Measurement(name="train_peak_mib", value=peak, unit="MiB"),
        spread("train_step_ms", step),
        Measurement(name="samples_per_second", value=32_000 / step, unit="items/s"),
        *(
            Measurement(name=f"time_s.{phase}", value=seconds, unit="s")
            for phase, seconds in (
                ("prepare", 0.1),
                ("build", 0.2),
                ("train", 31.0),
                ("finish", 0.1),
                ("evaluate", 4.0),
            )
        ),
        Measurement(name="training_steps", value=120, unit="steps"),
    )


def compare(name: str, ratio: float, half: float = 0.01, baseline: str = "Full fine-tuning") -> Comparison:
    """A comparison whose interval reaches ``half`` to both sides, where changes of 1 % are told apart."""
    low, high = ratio - half, ratio + half
    verdict = "better" if high < 0.99 else "worse" if low > 1.01 else "inconclusive"
    ends = {"low": low, "high": high, "verdict": verdict, "margin": 0.01}
    return Comparison(name=name, baseline=baseline, ratio=ratio, pairs=100, **ends)


def ok(variant: str, seed: int = 0, **changes: Any) -> Result:
    """A run that ended well."""
    _, _, _, _, ratio, step, _ = VARIANTS[variant]
    step_ratio = step / 182.0
    differences: tuple[Difference, ...] = ()
    if variant == "Full fine-tuning":
        comparisons: tuple[Comparison, ...] = (compare("control.latency_ms.batch1", 1.001),)
    else:
        comparisons = (
            compare("latency_ms.batch1", ratio + 0.001 * seed),
            compare("latency_ms.batch32", ratio),
            compare("train_step_ms", step_ratio),
        )
        differences = (difference(variant, seed),)
        if variant.startswith("KronA"):
            comparisons += (compare("train_step_ms", 1.03, baseline="LoRA r=1"),)
            differences += (difference(variant, seed, "LoRA r=1"),)
    floor = 3.4 - VARIANTS[variant][2] / 30
    curve = tuple((i, floor + 2.0 * math.exp(-i / 30) + 0.05 * math.sin(i * (seed + 3))) for i in range(1, 121))
    values: dict[str, Any] = {
        "spec": spec(variant, seed),
        "status": "ok",
        "measurements": measurements(variant, seed),
        "comparisons": comparisons,
        "differences": differences,
        "resampled": resampled(variant, seed),
        "machine": MACHINE,
        "context": {"commit": "9ac75cef00d", "dirty": False, "load": 0.4, "time": f"2025-11-21T14:0{seed}:00+00:00"},
        "curve": curve,
        "data": {"corpus": "8c3fa1"},
        "paper": PAPER,
        "metric": "accuracy",
    }
    return Result(**{**values, **changes})


def failed(variant: str, reason: str, seed: int = 0, status: str = "failed", log: str = "", **changes: Any) -> Result:
    """A run that did not end well."""
    return Result(spec=spec(variant, seed, **changes), status=status, reason=reason, log=log, machine=MACHINE)


def suite(seeds: int = 3) -> list[Result]:
    """Every variant with every seed."""
    return [ok(variant, seed) for seed in range(seeds) for variant in VARIANTS]


def odd_results() -> st.SearchStrategy[list[Result]]:
    """Results of two variants and seeds, whose figures and facts are whatever JSON can hold."""
    huge = st.one_of(
        st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([0.0, 1.7e308, -1.7e308, 5e-324])
    )
    odd = st.one_of(st.none(), huge, st.text(max_size=5), st.lists(st.integers(), max_size=2), st.booleans())
    facts = st.dictionaries(st.text(max_size=5), odd, max_size=3)
    names = st.sampled_from(["accuracy", "latency_ms.batch1", "train_peak_mib", "weight_mib", "trainable_parameters"])
    ends = dict.fromkeys(("low", "high", "interval_low", "interval_high"), st.one_of(st.none(), huge))
    units = st.sampled_from(["%", "ms", ""])
    figure = st.builds(Measurement, name=names, value=huge, unit=units, **ends)
    ratio = st.builds(
        Comparison,
        name=names,
        baseline=st.just("Full fine-tuning"),
        **dict.fromkeys(("ratio", "low", "high", "margin"), huge),
        pairs=st.integers(),
        verdict=st.sampled_from(["better", "worse", "inconclusive"]),
    )
    odd_one = st.fixed_dictionaries(
        {
            "measurements": st.lists(figure, max_size=5).map(tuple),
            "comparisons": st.lists(ratio, max_size=3).map(tuple),
            "resampled": st.lists(huge, max_size=3).map(tuple),
            "curve": st.lists(st.tuples(st.integers(), huge), max_size=4).map(tuple),
            "machine": st.sampled_from([{}, MACHINE]),
            "context": facts,
            "paper": facts,
        }
    )
    runs = [(variant, seed) for variant in ("Full fine-tuning", "BitFit") for seed in (0, 1)]
    return st.tuples(*[odd_one] * len(runs)).map(
        lambda values: [dataclasses.replace(ok(*run), **one) for run, one in zip(runs, values, strict=True)]
    )

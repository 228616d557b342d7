"""Results as a benchmark would give them, for the tests of report and tracking; read with ``runpy.run_path``."""

from __future__ import annotations

import math
from typing import Any

from pareto_core import Budget, Comparison, Engine, Measurement, MethodSpec, Result, RunSpec, Stage, TaskRef, Training

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
    }
    return RunSpec(**{**values, **changes})


def measurements(variant: str, seed: int) -> tuple[Measurement, ...]:
    """Figures that wobble a little with the seed."""
    _, _, accuracy, trainable, ratio, step, peak = VARIANTS[variant]
    latency = 4.0 * ratio + 0.02 * seed

    def spread(name: str, value: float) -> Measurement:
        return Measurement(name=name, value=value, unit="ms", samples=300, low=0.97 * value, high=1.06 * value)

    return (
        Measurement(name="accuracy", value=round(accuracy + 0.4 * (seed - 1), 2), unit="%", samples=1200),
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
    """A comparison whose interval reaches ``half`` to both sides."""
    low, high = ratio - half, ratio + half
    verdict = "better" if high < 1 else "worse" if low > 1 else "inconclusive"
    return Comparison(name=name, baseline=baseline, ratio=ratio, low=low, high=high, pairs=100, verdict=verdict)


def ok(variant: str, seed: int = 0, **changes: Any) -> Result:
    """A run that ended well."""
    _, _, _, _, ratio, step, _ = VARIANTS[variant]
    step_ratio = step / 182.0
    if variant == "Full fine-tuning":
        comparisons: tuple[Comparison, ...] = (compare("control.latency_ms.batch1", 1.001),)
    else:
        comparisons = (
            compare("latency_ms.batch1", ratio + 0.001 * seed),
            compare("latency_ms.batch32", ratio),
            compare("train_step_ms", step_ratio),
        )
        if variant.startswith("KronA"):
            comparisons += (compare("train_step_ms", 1.03, baseline="LoRA r=1"),)
    floor = 3.4 - VARIANTS[variant][2] / 30
    curve = tuple((i, floor + 2.0 * math.exp(-i / 30) + 0.05 * math.sin(i * (seed + 3))) for i in range(1, 121))
    values: dict[str, Any] = {
        "spec": spec(variant, seed),
        "status": "ok",
        "measurements": measurements(variant, seed),
        "comparisons": comparisons,
        "machine": MACHINE,
        "context": {"commit": "9ac75cef00d", "dirty": False, "load": 0.4, "time": f"2025-11-21T14:0{seed}:00+00:00"},
        "curve": curve,
        "data": {"corpus": "8c3fa1"},
        "paper": PAPER,
        "metric": "accuracy",
    }
    return Result(**{**values, **changes})


def failed(variant: str, reason: str, seed: int = 0, status: str = "failed", **changes: Any) -> Result:
    """A run that did not end well."""
    return Result(spec=spec(variant, seed, **changes), status=status, reason=reason, machine=MACHINE)


def suite(seeds: int = 3) -> list[Result]:
    """Every variant with every seed."""
    return [ok(variant, seed) for seed in range(seeds) for variant in VARIANTS]

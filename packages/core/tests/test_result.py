from __future__ import annotations

import json
from typing import Any

import pytest

from pareto_core import Comparison, ConfigError, Measurement, MethodSpec, Result, RunSpec, Stage, TaskRef

SPEC = RunSpec(
    question="q",
    variant="v",
    stages=(Stage(methods=(MethodSpec(name="m"),)),),
    task=TaskRef(name="t"),
    target="xeon",
)


def test_round_trip_and_look_up() -> None:
    latency = Measurement(name="latency_ms", value=1.5, unit="ms", samples=40, low=1.4, high=1.9)
    compiled = Measurement(name="flops", value=3, unit="1", kind="compiled")
    result = Result(
        spec=SPEC,
        status="ok",
        measurements=(latency, compiled),
        comparisons=(
            Comparison(name="latency_ms", baseline="b", ratio=1.0, low=0.9, high=1.1, pairs=8, verdict="inconclusive"),
        ),
        machine={"cpu": "x", "cores": 2, "isa": ["avx2"]},
        curve=((1, 0.5), (2, 0.25)),
        data={"sha256": "00"},
    )
    again = Result.from_json(json.loads(json.dumps(result.to_json())))
    assert again == result
    assert again.value("latency_ms") == 1.5
    assert again.measurement("flops") == compiled
    assert again.value("energy_j") is None
    assert again.measurement("energy_j") is None


def test_a_run_that_failed_says_why() -> None:
    with pytest.raises(ConfigError, match=r"Result\.reason = '': a run that did not end well needs a reason"):
        Result(spec=SPEC, status="failed")
    assert Result(spec=SPEC, status="unsupported", reason="no TPU").reason == "no TPU"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": "x", "value": float("nan"), "unit": "ms"}, "value"),
        ({"name": "x", "value": 1.0, "unit": "ms", "kind": "guessed"}, "kind"),
        ({"name": "x", "value": 1.0, "unit": "ms", "samples": 1.5}, "samples"),
        ({"name": "x", "value": 1.0}, "unit"),
    ],
)
def test_measurements_refuse(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Measurement.from_json(values)
    assert caught.value.field == field

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest

from pareto_core import Budget, ConfigError, Engine, MethodSpec, RunSpec, Stage, TaskRef, Training

METHOD = MethodSpec(name="krona", fields={"a_shape": [24, 16], "scale": 1.0})


def run(**changes: Any) -> RunSpec:
    values: dict[str, Any] = {
        "question": "q",
        "variant": "v",
        "stages": (Stage(methods=(METHOD,)),),
        "task": TaskRef(name="core.tiny", fields={"items": 8}),
        "target": "xeon",
    }
    return RunSpec(**{**values, **changes})


def test_round_trip() -> None:
    spec = run(
        stages=(Stage(methods=(METHOD, METHOD), name="first"), Stage(methods=(METHOD,), teacher="first")),
        engine=Engine(zero_stage=2, precision="bf16", processes=2),
        baseline="full",
        requests=("batch1",),
    )
    again = RunSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.stages[1].teacher == "first"
    assert again.engine.precision == "bf16"


def test_digest_is_the_sha256_of_the_sorted_json() -> None:
    text = json.dumps(run().to_json(), sort_keys=True, separators=(",", ":"))
    assert run().digest() == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "change",
    [
        {"question": "r"},
        {"variant": "w"},
        {"seed": 1},
        {"target": "gpu"},
        {"profile": "full"},
        {"baseline": "v0"},
        {"engine": Engine(name="torch")},
        {"task": TaskRef(name="core.tiny", fields={"items": 9})},
        {"stages": (Stage(methods=(dataclasses.replace(METHOD, fields={"scale": 2.0}),)),)},
        {"stages": (Stage(methods=(METHOD,), training=Training(learning_rate=2e-3)),)},
    ],
)
def test_digest_changes_with_every_part(change: dict[str, Any]) -> None:
    assert run(**change).digest() != run().digest()


@pytest.mark.parametrize(
    ("cls", "values", "field"),
    [
        (Budget, {}, "epochs"),
        (Budget, {"epochs": 0.0}, "epochs"),
        (Budget, {"epochs": 1.0, "max_steps": 0}, "max_steps"),
        (Training, {"learning_rate": 0.0}, "learning_rate"),
        (Training, {"batch_size": 0}, "batch_size"),
        (Training, {"batch_size": 10, "gradient_accumulation": 3}, "gradient_accumulation"),
        (Training, {"gradient_accumulation": 0}, "gradient_accumulation"),
        (Training, {"warmup_steps": -1}, "warmup_steps"),
        (Training, {"weight_decay": -0.1}, "weight_decay"),
        (Training, {"optimizer": "lion"}, "optimizer"),
        (Stage, {"methods": []}, "methods"),
        (Engine, {"name": "torch", "zero_stage": 1}, "zero_stage"),
        (Engine, {"name": "torch", "processes": 2}, "processes"),
        (Engine, {"processes": 0}, "processes"),
        (Engine, {"zero_stage": 4}, "zero_stage"),
    ],
)
def test_ranges(cls: Any, values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cls.from_json(values)
    assert caught.value.field == field
    assert caught.value.owner == cls.__name__


def test_seeds_are_those_that_every_generator_takes() -> None:
    assert run(seed=2**32 - 1).seed == 2**32 - 1
    for seed in (-1, 2**32, 10**300):
        with pytest.raises(ConfigError, match=r"RunSpec\.seed = .*: must be from 0 to 4294967295"):
            run(seed=seed)


def test_accumulation_that_divides_the_batch_is_accepted() -> None:
    assert Training(batch_size=12, gradient_accumulation=3).gradient_accumulation == 3


def test_a_teacher_must_be_an_earlier_stage() -> None:
    named = Stage(methods=(METHOD,), name="first")
    run(stages=(named, Stage(methods=(METHOD,), teacher="first")))
    run(stages=(Stage(methods=(METHOD,), teacher="backbone"),))
    with pytest.raises(ConfigError, match=r"teacher 'first' must be one of \['backbone'\]"):
        run(stages=(Stage(methods=(METHOD,), teacher="first"), named))
    with pytest.raises(ConfigError, match="at least one stage"):
        run(stages=())

"""Results on disk: they come back equal, the newest counts, and a broken file is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pareto_core import Measurement, MethodSpec, ParetoError, Result, RunSpec, Stage, TaskRef
from pareto_runner.journal import Journal, key, latest


def result(variant: str = "A", seed: int = 0, time: str = "2026-01-01", value: float = 1.0) -> Result:
    spec = RunSpec(
        question="q/one",
        variant=variant,
        stages=(Stage(methods=(MethodSpec(name="full"),)),),
        task=TaskRef(name="core.tiny"),
        target="xeon",
        seed=seed,
    )
    measurements = (Measurement(name="accuracy", value=value, unit="%"),)
    return Result(spec=spec, status="ok", measurements=measurements, context={"time": time, "code": "x"})


def test_results_come_back_equal_and_in_the_order_of_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    late, early = result("B", time="2026-02-01"), result("A")
    for item in (late, early):
        path = journal.write(item)
        assert path.name.startswith("q-one-")
    assert journal.read() == [early, late]


def test_the_same_run_again_replaces_the_file_and_other_code_does_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(result(value=1.0))
    journal.write(result(value=2.0))
    assert [r.value("accuracy") for r in journal.read()] == [2.0]
    other = dataclasses.replace(result(value=3.0), context={"time": "2026-03-01", "code": "y"})
    journal.write(other)
    assert len(journal.read()) == 2
    assert [r.value("accuracy") for r in latest(journal.read())] == [3.0]
    assert key(other) != key(result())


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"spec": 3')
    with pytest.raises(ParetoError, match=r"bad\.json"):
        Journal(tmp_path).read()

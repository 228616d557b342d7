"""What MLflow shows of a result: valid names, finite figures, what differs from the baseline, the end of a log."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import pytest

from pareto_core import Measurement
from pareto_core.result import Difference
from pareto_runner import fields

SAMPLES = runpy.run_path(str(Path(__file__).with_name("samples.py")))
ok, failed = SAMPLES["ok"], SAMPLES["failed"]


def difference(baseline: str, value: float) -> Difference:
    return Difference(
        name="accuracy",
        baseline=baseline,
        difference=value,
        low=value - 0.5,
        high=value + 0.5,
        records=1200,
        verdict="inconclusive",
        p_value=0.4,
    )


def test_compiled_figures_have_a_name_of_their_own_and_odd_names_are_made_valid() -> None:
    result = dataclasses.replace(
        ok("BitFit"),
        measurements=(
            Measurement(name="hbm_mib", value=3.0, unit="MiB", kind="compiled"),
            Measurement(name="f1 (macro)/é", value=1.0, unit="%"),
            Measurement(name="time_s.build", value=1.0, unit="s"),
        ),
        comparisons=(),
        differences=(),
    )
    assert fields.run_metrics(result) == {"compiled.hbm_mib": 3.0, "f1 _macro___": 1.0}
    assert fields.run_tags(result)["kind"] == "compiled"


def test_values_that_are_not_finite_are_dropped() -> None:
    item = Measurement(name="accuracy", value=1.0, unit="%")
    object.__setattr__(item, "value", float("inf"))
    result = dataclasses.replace(ok("BitFit"), comparisons=(), differences=())
    object.__setattr__(result, "measurements", (item,))
    assert fields.run_metrics(result) == {}


def test_differences_to_the_baseline_are_metrics_and_all_are_described() -> None:
    gaps = (difference("Full fine-tuning", -2.4), difference("LoRA r=1", 0.5))
    result = dataclasses.replace(ok("KronA (24, 16)"), differences=gaps)
    metrics = fields.run_metrics(result)
    assert metrics["difference.accuracy"] == -2.4
    assert 12 <= len(metrics) <= 22
    note = fields.note(result)
    assert "| accuracy against Full fine-tuning | -2.4 [-2.9, -1.9] %, inconclusive |" in note
    assert "| accuracy against LoRA r=1 | +0.5 [+0, +1] %, inconclusive |" in note


def test_the_largest_margin_to_the_baseline_is_a_tag() -> None:
    result = ok("KronA (24, 16)")
    margins = [dataclasses.replace(item, margin=0.01 * n) for n, item in enumerate(result.comparisons)]
    own = [item.margin for item in margins if item.baseline == "Full fine-tuning"]
    tags = fields.run_tags(dataclasses.replace(result, comparisons=tuple(margins)))
    assert float(tags["margin"]) == pytest.approx(max(own))
    assert max(own) < max(item.margin for item in margins)
    assert "margin" not in fields.run_tags(ok("Full fine-tuning"))


def test_a_failed_result_shows_the_end_of_its_log_and_its_key() -> None:
    log = "\n".join(f"line {n}" for n in range(500))
    result = dataclasses.replace(failed("BitFit", "it was killed"), log=log, key="0123456789abcdef")
    tags = fields.run_tags(result)
    assert tags["log"].endswith("line 499")
    assert len(tags["log"]) == fields.LOG_LENGTH
    assert tags["pareto.key"] == "0123456789abcdef"
    assert tags["mlflow.note.content"].endswith("failed: it was killed\n\n```\n" + tags["log"] + "\n```")
    assert not {"log", "pareto.key"} & set(fields.run_tags(ok("BitFit")))


def test_the_view_is_ordered_by_the_score_and_shows_results_alone() -> None:
    view = fields.table_view(ok("BitFit"), "accuracy")
    assert view["orderByKey"] == "metrics.`accuracy`"
    assert view["searchFilter"] == "tags.`pareto.kind` = 'result'"
    assert "metrics.`latency_ms.batch1`" in view["selectedColumns"]

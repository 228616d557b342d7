"""What reaches the MLflow store: names, figures, parameters, tags, statuses, and nothing that is not finite."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pareto_core import Measurement
from pareto_runner import tracking

SAMPLES = runpy.run_path(str(Path(__file__).with_name("samples.py")))
ok, failed = SAMPLES["ok"], SAMPLES["failed"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One suite: a result that is ok, one that failed, one that is unsupported, one with 2,500 points."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    long = dataclasses.replace(ok("LoRA r=1"), curve=tuple((i, 1 / i) for i in range(1, 2501)))
    results = {
        "ok": ok("KronA (24, 16)"),
        "failed": failed("KronA (7, 5)", "7 does not divide 384"),
        "unsupported": failed("BitFit", "no TPU", status="unsupported", target="tpu"),
        "long": long,
    }
    with tracking.Tracker(uri) as tracker:
        parent = tracker.suite("adapters · smoke", {"profile": "smoke"})
        ids = {name: tracker.log(result) for name, result in results.items()}
    client = MlflowClient(tracking_uri=uri)
    runs = {name: client.get_run(run) for name, run in ids.items()}
    return {"uri": uri, "client": client, "runs": runs, "parent": client.get_run(parent), "results": results}


def test_the_suite_is_the_parent_and_fails_with_a_result(store: dict[str, Any]) -> None:
    parent = store["parent"]
    assert (parent.info.run_name, parent.info.status) == ("adapters · smoke", "FAILED")
    assert {run.data.tags["mlflow.parentRunId"] for run in store["runs"].values()} == {parent.info.run_id}


def test_a_result_that_is_ok(store: dict[str, Any]) -> None:
    run = store["runs"]["ok"]
    assert run.info.run_name == "KronA (24, 16) · seed 0 · xeon"
    assert run.info.status == "FINISHED"
    metrics, params, tags = run.data.metrics, run.data.params, run.data.tags
    assert metrics["accuracy"] == pytest.approx(68.4)
    assert metrics["ratio.train_step_ms"] == 0.763736
    assert metrics["latency_ms.batch1"] == pytest.approx(4.008)
    assert 12 <= len(metrics) <= 22
    assert params["krona.a_shape"] == "(24, 16)"
    assert params["methods"] == "adapters.krona"
    assert params["docstrings.classes"] == "20"
    assert (params["learning_rate"], params["batch_size"], params["epochs"]) == ("0.002", "32", "3.0")
    assert tags["cpu"].startswith("Intel(R) Xeon")
    assert tags["paper_url"] == "https://arxiv.org/abs/2212.10650"
    assert tags["commit"] == "9ac75cef00d"
    assert "| accuracy | 68.4 % |" in tags["mlflow.note.content"]


def test_results_that_did_not_end_well(store: dict[str, Any]) -> None:
    run = store["runs"]["failed"]
    assert (run.info.status, run.data.tags["status"]) == ("FAILED", "failed")
    assert run.data.tags["reason"] == "7 does not divide 384"
    run = store["runs"]["unsupported"]
    assert (run.info.status, run.data.tags["status"], run.data.metrics) == ("KILLED", "unsupported", {})


def test_the_whole_curve_is_logged(store: dict[str, Any]) -> None:
    history = store["client"].get_metric_history(store["runs"]["long"].info.run_id, "train_loss")
    assert {point.step: point.value for point in history} == {i: 1 / i for i in range(1, 2501)}


def test_the_result_itself_is_an_artifact(store: dict[str, Any], tmp_path: Path) -> None:
    path = store["client"].download_artifacts(store["runs"]["ok"].info.run_id, "result.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == store["results"]["ok"].to_json()
    place = Path(tracking.sqlite_path(store["uri"]) or "").parent / "mlartifacts"
    assert list(place.rglob("result.json"))


def test_the_store_knows_the_columns_to_show(store: dict[str, Any]) -> None:
    tags = store["client"].get_experiment_by_name("pareto").tags
    view = json.loads(tags["mlflow.sharedViewState.pareto"])
    assert tags["mlflow.experiment.primaryMetric.name"] == "accuracy"
    assert "metrics.`latency_ms.batch1`" in view["selectedColumns"]
    assert tracking.find_experiment(store["uri"]) in tracking.ui_page("1")


def test_a_second_tracker_adds_to_the_experiment(store: dict[str, Any]) -> None:
    with tracking.Tracker(store["uri"]) as tracker:
        run = tracker.log(ok("BitFit", 1))
    found = store["client"].get_run(run)
    assert found.info.experiment_id == store["parent"].info.experiment_id
    assert "mlflow.parentRunId" not in found.data.tags


def test_an_interrupted_suite_is_killed(store: dict[str, Any]) -> None:
    tracker = tracking.Tracker(store["uri"]).__enter__()
    parent = tracker.suite("interrupted")
    tracker.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert store["client"].get_run(parent).info.status == "KILLED"


def test_compiled_figures_have_a_name_of_their_own_and_odd_names_are_made_valid() -> None:
    result = dataclasses.replace(
        ok("BitFit"),
        measurements=(
            Measurement(name="hbm_mib", value=3.0, unit="MiB", kind="compiled"),
            Measurement(name="f1 (macro)/é", value=1.0, unit="%"),
            Measurement(name="time_s.build", value=1.0, unit="s"),
        ),
        comparisons=(),
    )
    assert tracking.run_metrics(result) == {"compiled.hbm_mib": 3.0, "f1 _macro___": 1.0}
    assert tracking.run_tags(result)["kind"] == "compiled"


def test_values_that_are_not_finite_are_dropped() -> None:
    item = Measurement(name="accuracy", value=1.0, unit="%")
    object.__setattr__(item, "value", float("inf"))
    result = dataclasses.replace(ok("BitFit"), comparisons=())
    object.__setattr__(result, "measurements", (item,))
    assert tracking.run_metrics(result) == {}


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says" * 50)
    with pytest.raises(tracking.TrackingError, match=r"cannot open the tracking store sqlite:.*mlflow\.db"):
        tracking.Tracker(f"sqlite:///{tmp_path}/mlflow.db").__enter__()
    with pytest.raises(tracking.TrackingError, match="with statement"):
        tracking.Tracker("sqlite:///never.db").suite("x")


def test_where_results_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri() == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking.tracking_uri() == "http://127.0.0.1:1"
    assert tracking.tracking_uri("sqlite:///x.db") == "sqlite:///x.db"
    assert tracking.artifact_directory("http://127.0.0.1:1") is None
    assert tracking.find_experiment(f"sqlite:///{tmp_path}/none.db") is None
    assert not (tmp_path / "none.db").exists()


def test_the_ui_binds_to_loopback_with_telemetry_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "false")
    command = tracking.ui_command("sqlite:////srv/pareto/mlflow.db", 5123)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5123"
    assert command[command.index("--artifacts-destination") + 1] == "/srv/pareto/mlartifacts"
    assert (os.environ["MLFLOW_DISABLE_TELEMETRY"], os.environ["DO_NOT_TRACK"]) == ("true", "true")


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = (
        "import sys, pareto_runner.tracking; print([m for m in ('mlflow', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

"""What reaches the MLflow store: figures, parameters, tags, statuses; and each result once, whoever writes or dies."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pareto_core import Result
from pareto_runner import tracking
from pareto_runner.journal import Journal

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
        tracker.suite("adapters · smoke", {"profile": "smoke"})
        ids = {name: tracker.log(result) for name, result in results.items()}
        parent = tracker.parent_id
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
    tracker.suite("interrupted")
    run = store["client"].get_run(tracker.log(ok("BitFit", 2)))
    tracker.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert store["client"].get_run(run.data.tags["mlflow.parentRunId"]).info.status == "KILLED"


def test_a_suite_without_a_new_result_leaves_no_run(store: dict[str, Any]) -> None:
    known = store["runs"]["ok"].info.run_id
    with tracking.Tracker(store["uri"]) as tracker:
        tracker.suite("nothing new")
        assert tracker.log(store["results"]["ok"]) == known
        assert tracker.parent_id is None
    assert not runs_of(tracker, "attributes.run_name = 'nothing new'")


def test_a_suite_is_taken_up_again_by_its_identity(store: dict[str, Any]) -> None:
    with tracking.Tracker(store["uri"]) as tracker:
        tracker.suite("in two parts", identity="feedfacefeedface")
        first = tracker.log(ok("BitFit", 3))
    with tracking.Tracker(store["uri"]) as tracker:
        tracker.suite("in two parts", identity="feedfacefeedface")
        second = tracker.log(failed("BitFit", "no memory", 4))
    runs = [store["client"].get_run(run) for run in (first, second)]
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs}) == 1
    assert store["client"].get_run(runs[0].data.tags["mlflow.parentRunId"]).info.status == "FAILED"


def test_a_suite_whose_process_is_gone_is_marked_and_a_living_one_is_not(store: dict[str, Any]) -> None:
    with tracking.Tracker(store["uri"]) as gone, tracking.Tracker(store["uri"]) as alive:
        gone.suite("gone", process="4194305-17")  # larger than any process id
        alive.suite("alive")
        gone.log(ok("BitFit", 5))
        alive.log(ok("BitFit", 6))
        alive.end_abandoned()
        assert store["client"].get_run(gone.parent_id).info.status == "KILLED"
        assert store["client"].get_run(alive.parent_id).info.status == "RUNNING"


def test_a_run_tells_when_its_result_was_measured(store: dict[str, Any]) -> None:
    result = ok("BitFit", 7)
    result = dataclasses.replace(result, context={"time": "2025-11-21T14:00:00+00:00", "seconds": 12.5})
    with tracking.Tracker(store["uri"]) as tracker:
        info = store["client"].get_run(tracker.log(result)).info
    assert (info.start_time, info.end_time) == (1763733600000, 1763733612500)
    for context in ({}, {"time": "yesterday"}, {"time": 7}):
        start, end = tracking.period(dataclasses.replace(result, context=context))
        assert start == end > 1763733600000


def test_a_result_is_known_by_the_bytes_of_its_journal_file(store: dict[str, Any], tmp_path: Path) -> None:
    path = Journal(tmp_path / "journal").write(ok("BitFit", 8))
    result, content = ok("BitFit", 8), path.read_bytes() + b"\n"
    with tracking.Tracker(store["uri"]) as tracker:
        ids = [tracker.log(result), tracker.log(result, path.read_bytes()), tracker.log(result, content)]
        found, page = tracker.present()
    assert ids[0] == ids[1] != ids[2]
    assert {tracking.identity_of(path.read_bytes()), tracking.identity_of(content)} < found
    assert page is None
    saved = store["client"].download_artifacts(ids[2], "result.json", str(tmp_path))
    assert Path(saved).read_bytes() == content


def test_identities_are_read_page_by_page(store: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.Tracker(store["uri"]) as tracker:
        whole, _ = tracker.present()
        monkeypatch.setattr(tracking, "PAGE", 2)
        first, page = tracker.present()
        rest: set[str] = set()
        while page:
            more, page = tracker.present(page)
            rest |= more
    assert len(first) == 2
    assert first | rest == whole


def test_a_result_that_a_store_cannot_hold_is_refused_and_leaves_nothing(store: dict[str, Any]) -> None:
    odd = dataclasses.replace(ok("BitFit", 9), curve=((2**70, 1.0),))  # no database has such integers
    with tracking.Tracker(store["uri"]) as tracker:
        with pytest.raises(tracking.RefusedError, match="cannot log to the tracking store sqlite:"):
            tracker.log(odd)
        assert not runs_of(tracker, "attributes.status = 'RUNNING' and tags.`pareto.kind` = 'result'")
        assert tracker.log(ok("BitFit", 9))


def runs_of(tracker: tracking.Tracker, wanted: str) -> list[Any]:
    """The runs of the experiment that a filter names; deleted ones are left out."""
    return list(tracker.client.search_runs([tracker.experiment_id], wanted))


def copies(tracker: tracking.Tracker, result: Result) -> list[str]:
    """Statuses of the runs of one result."""
    content = json.dumps(result.to_json(), indent=1, ensure_ascii=False).encode()
    wanted = f"tags.`pareto.id` = '{tracking.identity_of(content)}'"
    return [run.info.status for run in runs_of(tracker, wanted)]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs, to be copied: making one takes seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    tracking.create_sqlite(path)
    return path


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path) -> str:
    """A store of the test's own. This process must not open it before it forks: connections are not for sharing."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


def forked(function: Any, *arguments: Any) -> multiprocessing.Process:
    """Start a process that has MLflow imported already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def log_and_die(uri: str, result: Result, method: str, after: bool) -> None:
    """Log a result and be killed by the kernel's hand when the client is about to call a method, or just has."""
    with tracking.Tracker(uri) as tracker:
        tracker.suite("a suite")
        real = getattr(tracker.client, method)

        def fatal(*arguments: Any, **options: Any) -> Any:
            if after:
                real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(tracker.client, method, fatal)
        tracker.log(result)


def test_a_writer_that_is_killed_at_any_step_leaves_one_whole_run_in_the_end(uri: str) -> None:
    steps = [
        (name, after) for name in ("create_run", "log_batch", "log_artifact", "set_terminated") for after in (0, 1)
    ]
    results = [ok("BitFit", seed) for seed in range(len(steps))]
    for result, (method, after) in zip(results, steps, strict=True):
        process = forked(log_and_die, uri, result, method, bool(after))
        process.join()
        assert process.exitcode == -signal.SIGKILL
    with tracking.Tracker(uri) as tracker:
        before = [copies(tracker, result) for result in results]
        for result in results:
            tracker.log(result)
        after_all = [copies(tracker, result) for result in results]
    # nothing yet (the kill came with the suite's run), begun, …, begun, whole
    assert before == [[], [], *[["RUNNING"]] * 5, ["FINISHED"]]
    assert after_all == [["FINISHED"]] * len(results)


def log_all(uri: str, results: list[Result]) -> None:
    with tracking.Tracker(uri) as tracker:
        for result in results:
            tracker.log(result)


def test_several_writers_at_once_lose_and_repeat_nothing(uri: str) -> None:
    results = [ok("LoRA r=1", seed) for seed in range(12)]
    writers = [forked(log_all, uri, results[first : first + 6]) for first in (0, 3, 6)]
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0, 0, 0]
    with tracking.Tracker(uri) as tracker:
        assert [copies(tracker, result) for result in results] == [["FINISHED"]] * 12


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the lock be another one at each use, as for writers on several machines."""
    import contextlib

    names = iter(range(10**6))

    @contextlib.contextmanager
    def other(uri: str) -> Iterator[str]:
        yield f"lock {next(names)}"

    monkeypatch.setattr(tracking, "store_lock", other)
    monkeypatch.setattr(tracking, "sqlite_path", lambda uri: None)


def test_of_two_whole_runs_from_two_machines_the_same_one_stays(store: dict[str, Any], elsewhere: None) -> None:
    result = ok("BitFit", 10)
    with tracking.Tracker(store["uri"]) as here, tracking.Tracker(store["uri"]) as there:
        real = here.client.create_run
        between: list[str] = []

        def create_run(*arguments: Any) -> Any:
            if not between:
                between.append(there.log(result))  # it began and ended after our look and before our run
            return real(*arguments)

        here.client.create_run = create_run
        kept = here.log(result)
        assert copies(here, result) == ["FINISHED"]
        assert kept == there.log(result) == here.log(result)


def test_what_another_machine_has_begun_is_left_to_it(store: dict[str, Any], elsewhere: None) -> None:
    result = ok("BitFit", 11)
    with tracking.Tracker(store["uri"]) as here, tracking.Tracker(store["uri"]) as there:
        real = there.client.set_terminated

        def set_terminated(*arguments: Any) -> None:
            there.client.set_terminated = real
            here.log(result)  # another machine brings in the same while this run is unfinished
            real(*arguments)

        there.client.set_terminated = set_terminated
        there.log(result)
        assert copies(here, result) == ["FINISHED"]


def test_a_store_whose_making_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    half = tmp_path / ".mlflow.db.new"
    half.write_bytes(b"SQLite format 3\x00 and no more")
    with tracking.Tracker(f"sqlite:///{path}") as tracker:
        tracker.log(ok("BitFit"))
    assert path.exists()
    assert not half.exists()


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says" * 50)
    for place in (f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db/below.db", "nonsense://there"):
        with pytest.raises(tracking.TrackingError, match=rf"^cannot open the tracking store {place}: "):
            tracking.Tracker(place).open()
    with pytest.raises(tracking.TrackingError, match="names no file"):
        tracking.Tracker(f"sqlite:///{tmp_path}").open()
    with pytest.raises(tracking.TrackingError, match="with statement"):
        tracking.Tracker(f"sqlite:///{tmp_path}/never.db").log(ok("BitFit"))


def test_messages_show_no_password() -> None:
    assert tracking.shown("postgresql://me:secret@db/runs") == "postgresql://…@db/runs"
    assert tracking.shown("sqlite:////srv/a@b.db") == "sqlite:////srv/a@b.db"


def test_a_lock_keeps_its_name_and_a_server_does_without_where_none_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    names = []
    for _ in range(2):
        with tracking.store_lock("http://127.0.0.1:1") as name:
            names.append(name)
    with tracking.store_lock("http://127.0.0.1:2") as other:
        assert names[0] == names[1] != other
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "plain"))
    (tmp_path / "plain").write_text("")
    with tracking.store_lock("http://127.0.0.1:1") as name:
        assert name == ""
    with pytest.raises(OSError, match="plain"), tracking.store_lock(f"sqlite:///{tmp_path}/plain/mlflow.db"):
        pass


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

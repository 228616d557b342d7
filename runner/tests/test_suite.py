"""Whole suites in real processes: rows, comparisons, what runs again and what stands, and ways of being cut short."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from pareto_core import ModelError, ParetoError, Result, RunSpec
from pareto_runner import suite
from pareto_runner.artifacts import Artifacts, clean
from pareto_runner.benchfile import Choices, cases, read
from pareto_runner.cli import main
from pareto_runner.faults.stage import FILE
from pareto_runner.faults.trials import strike_file
from pareto_runner.faults.workload import FaultyTask
from pareto_runner.isolate import ChildError
from pareto_runner.journal import Journal
from pareto_runner.plan import Past, Planned


class Heard:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.steps = 0
        self.notes: list[str] = []
        self.reused: list[str] = []

    def begin(self, spec: RunSpec) -> None:
        self.begun.append(spec.variant)

    def step(self, step: int, steps: int, loss: float) -> None:
        self.steps += 1

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self, result: Result, reused: bool) -> None:
        if reused:
            self.reused.append(result.spec.variant)


@dataclasses.dataclass
class Ran:
    results: list[Result]
    heard: Heard
    logged: list[Path]


def run(path: Path, out: Path, fresh: bool = False, limit: float = 100, **choices: Any) -> Ran:
    ran = Ran([], Heard(), [])
    suite_ = suite.Suite(out, ran.heard, ran.logged.append, fresh, limit)
    ran.results = suite_.run(list(cases(read(path), Choices(**choices))))
    assert suite_.unstored == []
    assert [json.loads(file.read_text())["spec"]["variant"] for file in ran.logged] == [
        result.spec.variant for result in ran.results
    ]
    return ran


@pytest.fixture
def quick_file(tmp_path: Path) -> Path:
    """A benchmark file whose workers need no transformers: variants A and B, which misbehave on demand."""
    path = tmp_path / "faults" / "question.toml"
    path.parent.mkdir()
    path.write_text(FILE)
    return path


def test_a_suite_end_to_end(tiny_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    full, krona = run(tiny_file, out).results
    assert (full.status, krona.status) == ("ok", "ok"), (full.reason, krona.reason)
    for result in (full, krona):
        latency = result.measurement("latency_ms.batch1")
        assert latency is not None
        assert latency.samples >= 10
        assert latency.interval_low <= latency.value <= latency.interval_high  # type: ignore[operator]
        assert result.value("train_step_ms") > 0  # type: ignore[operator]
        assert result.value("inference_peak_mib") > 0  # type: ignore[operator]
        assert result.value("train_peak_mib") > 0  # type: ignore[operator]
        assert result.machine["cpu"]
        assert result.context["seconds"] > 0
    compared = {(c.name, c.baseline) for c in krona.comparisons}
    assert {("latency_ms.batch1", "Full"), ("latency_ms.batch8", "Full"), ("train_step_ms", "Full")} == compared
    assert {(d.name, d.baseline) for d in krona.differences} == {("accuracy", "Full")}
    assert {c.name for c in full.comparisons} == {
        "control.latency_ms.batch1",
        "control.latency_ms.batch8",
        "control.train_step_ms",
    }
    assert {item.result.spec.variant for item in Journal(out / "journal").entries()} == {"Full", "KronA"}
    again = run(tiny_file, out)
    assert again.heard.begun == []
    assert again.heard.reused == ["Full", "KronA"]
    assert again.results == [full, krona]


def test_what_is_made_once_is_made_where_it_can_be_watched(
    quick_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FaultyTask, "make_ready", lambda _, say: say("training the backbone: step 1 of 2"))
    ran = run(quick_file, tmp_path / "results")
    assert ran.heard.notes.count("training the backbone: step 1 of 2") == 1
    assert "training the backbone: step 1 of 2" not in run(quick_file, tmp_path / "results").heard.notes

    def fails(_: Any, say: Any) -> None:
        raise ModelError("no space left")

    monkeypatch.setattr(FaultyTask, "make_ready", fails)
    assert [result.status for result in run(quick_file, tmp_path / "results", fresh=True).results] == ["ok", "ok"]


def test_only_what_changed_runs_again(quick_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    first = run(quick_file, out)
    assert [result.status for result in first.results] == ["ok", "ok"], first.results[0].reason
    text = quick_file.read_text()
    quick_file.write_text(text.replace('name = "B"', 'name = "B"\ntraining = { max_steps = 6 }'))
    changed = run(quick_file, out)
    assert changed.heard.begun == ["B"]
    assert changed.heard.reused == ["A"]
    quick_file.write_text(text)
    assert run(quick_file, out).heard.begun == []
    fresh = run(quick_file, out, fresh=True)
    assert fresh.heard.begun == ["A", "B"]
    assert fresh.heard.steps == 24
    assert len(Journal(out / "journal").entries()) == 5


def test_a_new_variant_is_measured_beside_the_baseline_without_training_it_again(
    quick_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    text = quick_file.read_text().replace("[task]", 'baseline = "A"\n[task]')
    quick_file.write_text(text)
    run(quick_file, out)
    quick_file.write_text(text + '[[variants]]\nname = "C"\nstages = [[{ method = "faults.workload" }]]\n')
    ran = run(quick_file, out)
    assert ran.heard.begun == ["A", "C"]
    assert ran.heard.steps == 12
    assert "A is prepared from before" in ran.heard.notes
    [c] = [result for result in ran.results if result.spec.variant == "C"]
    assert [(item.name, item.baseline) for item in c.comparisons] == [("latency_ms.batch1", "A")]
    assert len(Journal(out / "journal").entries()) == 3
    assert clean(out) > 0
    assert run(quick_file, out).heard.begun == []


@pytest.mark.parametrize(
    ("phase", "action", "reason"),
    [
        ("train", "nan", "not finite|nan"),
        ("load", "kill", "SIGKILL"),
        ("finish", "hang", "hung"),
        ("call", "raise", "foresaw"),
    ],
)
def test_a_run_that_fails_is_a_row_with_its_reason_and_the_suite_goes_on(
    phase: str, action: str, reason: str, quick_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARETO_FAULT", str(tmp_path / "fault.json"))
    monkeypatch.setenv("PARETO_CHECKPOINT_SECONDS", "0")
    strike_file(tmp_path / "fault.json", phase, action, 3 if phase == "train" else 1)
    out = tmp_path / "results"
    ran = run(quick_file, out, limit=20)
    statuses = sorted(result.status for result in ran.results)
    assert statuses == ["failed", "ok"]
    [failed] = [result for result in ran.results if result.status == "failed"]
    assert re.search(reason, failed.reason), failed.reason
    again = run(quick_file, out)
    assert [result.status for result in again.results] == ["ok", "ok"]
    assert again.heard.begun == [failed.spec.variant]


def test_an_interruption_marks_what_was_at_work_and_is_passed_on(quick_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    heard = Heard()
    stopped = suite.Suite(out, heard)

    def stop(step: int, steps: int, loss: float) -> None:
        if heard.begun == ["A", "B"]:
            raise KeyboardInterrupt

    heard.step = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run(list(cases(read(quick_file), Choices(seeds=(0, 1)))))
    assert [(r.spec.variant, r.spec.seed, r.status) for r in stopped.results] == [
        ("A", 0, "failed"),
        ("B", 0, "failed"),
    ]
    assert all("interrupted" in result.reason for result in stopped.results)
    assert Journal(out / "journal").read() == stopped.results
    again = run(quick_file, out)
    assert [result.status for result in again.results] == ["ok", "ok"]
    assert "A is prepared from before" in again.heard.notes


def test_a_fault_of_the_measuring_itself_costs_its_group_alone(
    quick_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = suite.measure
    calls: list[int] = []

    def broken(*arguments: Any) -> list[Result]:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("no time at all")
        return measure(*arguments)

    monkeypatch.setattr(suite, "measure", broken)
    quick_file.write_text(
        quick_file.read_text().replace('[[variants]]\nname = "B"\nstages = [[{ method = "faults.workload" }]]\n', "")
    )
    first, second = run(quick_file, tmp_path / "results", seeds=(0, 1)).results
    assert (first.status, second.status) == ("failed", "ok")
    assert "ZeroDivisionError: no time at all" in first.reason
    assert "Traceback" in first.log


def test_a_target_that_is_not_here_gives_rows_with_the_reason(tiny_file: Path, tmp_path: Path) -> None:
    results = run(tiny_file, tmp_path / "results", target="tpu").results
    assert {r.status for r in results} == {"unsupported"}
    assert all("DeepSpeed" in r.reason for r in results)


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(quick_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ParetoError, match="--out"):
        run(quick_file, tmp_path / "file" / "results")


def test_a_second_suite_waits_for_the_first(tmp_path: Path) -> None:
    heard = Heard()
    entered = threading.Event()

    def enter() -> None:
        with suite.waiting_for(tmp_path / "lock", heard):
            entered.set()

    with (tmp_path / "lock").open("w") as first:
        first.write("4711")
        first.flush()
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=enter)
        second.start()
        assert not entered.wait(0.3)
    assert entered.wait(5)
    second.join()
    assert heard.notes == ["waiting: another suite (process 4711) is at work here"]
    assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_the_plan_says_what_runs_and_why(quick_file: Path, tmp_path: Path) -> None:
    [(_, specs)] = cases(read(quick_file), Choices())
    journal = Journal(tmp_path / "journal")
    [first, _] = plan(journal, specs)
    assert (first.standing, first.why, first.seconds) == (None, "not run yet", None)
    facts = {"machine": suite.machine(), "context": {**suite.context(), "seconds": 12.0}}
    done = Result(spec=specs[0], status="ok", key=first.key, **facts)
    journal.write(done)
    journal.write(Result(spec=specs[1], status="failed", reason="it was Monday\nand late", key="k"))
    a, b = plan(journal, specs)
    assert a.standing is not None
    assert (a.why, a.seconds) == ("unchanged", 12.0)
    assert b.why == "last time failed: it was Monday"
    assert [item.why for item in Past(journal.entries()).plan(specs, fresh=True)] == ["asked for afresh"] * 2
    other = dataclasses.replace(specs[0], measure_seconds=9.0)
    assert "specification" in plan(journal, [other])[0].why


def plan(journal: Journal, specs: list[RunSpec]) -> list[Planned]:
    return Past(journal.entries()).plan(specs)


def test_prepared_models_are_trimmed_oldest_first(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    for age, name in enumerate(("new", "middle", "old")):
        place = artifacts.place(name)
        (place / "weights").write_bytes(b"x" * 1000)
        os.utime(place, (10_000 - age, 10_000 - age))
    artifacts.trim(keep=2500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]


def test_the_command_writes_report_store_and_exit_code(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["pareto", "bench", str(tiny_file), "--only", "Full", "--tracking-uri", f"sqlite:///{tmp_path}/store.db"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    assert (tmp_path / "store.db").is_file()
    for name in ("report.html", "report.md"):
        assert "Full" in (tmp_path / "results" / name).read_text()
    monkeypatch.setattr(
        "sys.argv", ["pareto", "report", "--out", str(tmp_path / "results"), "--benchmarks", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_what_gives_labels_is_prepared_first(tiny_file: Path) -> None:
    text = tiny_file.read_text().replace(
        'stages = [[{ method = "full" }]]', 'stages = [{ methods = [{ method = "full" }], labels_from = "KronA" }]'
    )
    tiny_file.write_text(text)
    [(_, specs)] = cases(read(tiny_file), Choices())
    items = [Planned(spec, spec.variant, None, "", None) for spec in specs]
    assert [item.key for item in items] == ["Full", "KronA"]
    assert [item.key for item in suite.label_order(items)] == ["KronA", "Full"]
    assert [item.key for item in suite.needed(items[:1], items)] == ["Full", "KronA"]


def test_a_deepspeed_op_that_does_not_build_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "worker_command", lambda *_: ["sh", "-c", "echo no compiler here >&2; exit 1"])
    with pytest.raises(ChildError, match="status 1") as caught:
        suite.build_deepspeed_op(tmp_path, "cpu")
    assert "no compiler here" in caught.value.log

"""Whole suites in real processes: rows, comparisons, failures that stay rows, and the command line around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pareto_core import Result
from pareto_runner import suite
from pareto_runner.benchfile import Choices, cases, read
from pareto_runner.cli import main
from pareto_runner.isolate import ChildError


class Silent:
    """A watcher that only counts."""

    def __init__(self) -> None:
        self.steps = 0

    def begin(self, spec: object) -> None: ...

    def step(self, step: int, steps: int, loss: float) -> None:
        self.steps += 1

    def note(self, text: str) -> None: ...

    def end(self, result: object) -> None: ...


def run(path: Path, out: Path, **choices: object) -> list[Result]:
    logged: list[Result] = []
    results = suite.Suite(out, Silent(), logged.append).run(list(cases(read(path), Choices(**choices))))  # type: ignore[arg-type]
    assert logged == results
    return results


def test_a_suite_end_to_end(tiny_file: Path, tmp_path: Path) -> None:
    full, krona = run(tiny_file, tmp_path / "results")
    assert (full.status, krona.status) == ("ok", "ok"), (full.reason, krona.reason)
    for result in (full, krona):
        latency = result.measurement("latency_ms.batch1")
        assert latency is not None
        assert latency.samples >= 10
        assert latency.low <= latency.value <= latency.high  # type: ignore[operator]
        assert result.value("train_step_ms") > 0  # type: ignore[operator]
        assert result.value("inference_peak_mib") > 0  # type: ignore[operator]
        assert result.machine["cpu"]
    compared = {(c.name, c.baseline) for c in krona.comparisons}
    assert {("latency_ms.batch1", "Full"), ("latency_ms.batch8", "Full"), ("train_step_ms", "Full")} == compared
    assert {c.name for c in full.comparisons} == {
        "control.latency_ms.batch1",
        "control.latency_ms.batch8",
        "control.train_step_ms",
    }
    stored = [json.loads(path.read_text()) for path in (tmp_path / "results" / "journal").glob("*.json")]
    assert {item["spec"]["variant"] for item in stored} == {"Full", "KronA"}
    assert not list((tmp_path / "results" / "work").iterdir())


def test_a_variant_that_fails_is_a_row_and_the_suite_goes_on(tiny_file: Path, tmp_path: Path) -> None:
    text = tiny_file.read_text().replace("compare_with", "training = { learning_rate = 1e30 }\ncompare_with")
    text = text.replace('stages = [[{ method = "krona", a_shape = [8, 6] }]]', 'stages = [[{ method = "full" }]]')
    tiny_file.write_text(text.replace("max_steps = 4", "max_steps = 8"))
    full, broken = run(tiny_file, tmp_path / "results")
    assert full.status == "ok"
    assert broken.status == "failed"
    assert "learning_rate" in broken.reason


def test_a_target_that_is_not_here_gives_rows_with_the_reason(tiny_file: Path, tmp_path: Path) -> None:
    results = run(tiny_file, tmp_path / "results", target="tpu")
    assert {r.status for r in results} == {"unsupported"}
    assert all("DeepSpeed" in r.reason for r in results)


def test_two_processes_train_like_one(tiny_file: Path, tmp_path: Path) -> None:
    text = tiny_file.read_text() + '\n[profiles.alone]\ntime_training = false\nrequests = ["batch1"]\n'
    tiny_file.write_text(text + "measure_seconds = 0.1\n")
    curves = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        [(name, specs)] = cases(read(tiny_file), Choices(profile="alone", processes=processes))
        results = suite.Suite(out, Silent(), lambda r: None).run([(name, specs[:1])])
        assert results[0].status == "ok", results[0].reason
        curves.append([loss for _, loss in results[0].curve])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


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
    assert [spec.variant for spec in specs] == ["Full", "KronA"]
    assert [spec.variant for spec in suite.label_order(specs)] == ["KronA", "Full"]


def test_a_deepspeed_op_that_does_not_build_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "worker_command", lambda *_: ["sh", "-c", "echo no compiler here >&2; exit 1"])
    with pytest.raises(ChildError, match="no compiler here"):
        suite.build_deepspeed_op(tmp_path, "cpu")

"""The command line: choices, messages, exit codes."""

from __future__ import annotations

import runpy
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from pareto_core import ConfigError
from pareto_runner.cli import interruptible, main
from pareto_runner.journal import Journal
from pareto_runner.questions import matches, parse_seeds
from pareto_runner.terminal import duration


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int | str | None, str]:
    monkeypatch.setattr("sys.argv", ["pareto", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out + captured.err


@pytest.mark.parametrize(("text", "seeds"), [("3", (0, 1, 2)), ("0,7,42", (0, 7, 42)), ("5,", (5,)), (None, None)])
def test_seeds(text: str | None, seeds: tuple[int, ...] | None) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "-1", "1,1", "x", "", "1,-2", ",", "1,,"])
def test_bad_seeds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="count"):
        parse_seeds(text)


def test_only_matches_parts_and_patterns() -> None:
    assert matches("lora", "LoRA r=1")
    assert matches("KronA*", "KronA (24, 16)")
    assert not matches("kron*b", "KronA (24, 16)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "adapters/krona_vs_laura"], "adapters/krona_vs_lora"),
        (["bench", "--only", "nobody"], "nobody"),
        (["bench", "--profile", "ful", "--dry-run"], "'full'"),
        (["bench", "--target", "gpus", "--dry-run"], "'gpu'"),
        (["bench", "--seeds", "none"], "--seeds"),
        (["bench", "missing.toml"], "cannot be read"),
        (["bench", "adapters/krona_vs_lora", "--profile", "glue", "--case", "wnli", "--dry-run"], "'rte'"),
        (["report", "--out", "nowhere"], "pareto bench"),
        (["list", "--benchmarks", "nowhere"], "not a folder"),
        (["bench", "--nproc", "0"], "nproc"),
        (["bench", "--limit", "0"], "limit"),
        (["upload", "nowhere"], "pareto bench"),
    ],
)
def test_bad_input_ends_with_one_message_and_code_2(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    code, text = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert words in text
    assert "Traceback" not in text


def test_a_damaged_file_is_named_and_the_report_written_without_it(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "out" / "journal"
    journal.mkdir(parents=True)
    (journal / "000001-old.json").write_text("{}")
    samples = runpy.run_path(str(Path(__file__).with_name("samples.py")))
    Journal(journal).write(samples["ok"]("BitFit"))
    places = ["--out", str(tmp_path / "out"), "--benchmarks", str(tmp_path)]
    code, text = command(monkeypatch, capsys, "report", *places)
    assert "000001-old.json" in text
    assert "left out" in text
    assert "Traceback" not in text
    assert code in (0, None)
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_dry_run_says_what_would_run_and_why(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pareto_runner.cli.console", Console(width=250))
    code, text = command(monkeypatch, capsys, "bench", str(tiny_file), "--dry-run", "--out", str(tmp_path / "out"))
    assert not code
    assert text.count("not run yet") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.4, "0 s"), (119, "119 s"), (300, "5 min"), (7300, "2.0 h")]
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_clean_frees_what_is_not_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "artifacts" / "key").mkdir(parents=True)
    (tmp_path / "artifacts" / "key" / "weights").write_bytes(b"x" * 3 * 2**20)
    (tmp_path / "journal").mkdir()
    code, text = command(monkeypatch, capsys, "clean", "--out", str(tmp_path))
    assert not code
    assert "3 MiB freed" in text
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_a_signal_ends_like_ctrl_c_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_list_and_targets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("COLUMNS", "200")
    code, text = command(monkeypatch, capsys, "list")
    assert not code
    assert "adapters/krona_vs_lora" in text
    assert "krona" in text
    code, text = command(monkeypatch, capsys, "targets")
    assert not code
    assert "tpu" in text
    assert "DeepSpeed has no TPU" in text


def test_versions_of_what_is_installed(monkeypatch, capsys) -> None:
    code, text = command(monkeypatch, capsys, "--version")
    assert not code
    assert f"pareto-runner {version('pareto-runner')}\n" in text
    assert f"pareto-core {version('pareto-core')}\n" in text


def test_help_imports_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys; sys.argv = ['pareto', '--help']\n"
        "from pareto_runner.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'mlflow', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("[]")

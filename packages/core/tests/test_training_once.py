from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pareto_core import ModelError, training_once
from pareto_core.byte_llama import Recipe, tokenizer, untrained
from pareto_core.training_once import fit, rate, run_command, save_whole, shuffled_windows, trained_once

SMALL = Recipe(width=16, layers=1, heads=2, kv_heads=1, inner=32, positions=32, window=4, batch=2, steps=7, warmup=2)


def test_one_process_trains_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    commands = []

    def run(command: list[str], *_: Any) -> None:
        commands.append(command)
        path = Path(command[-1])
        path.mkdir()
        (path / "config.json").write_text("{}")

    monkeypatch.setattr(training_once, "_run", run)
    path = tmp_path / "models" / "key"
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: trained_once(path, "some.module", "the model", "small", "a moment"), range(8)))
    assert found == {path}
    assert commands == [[sys.executable, "-m", "some.module", "--model", "small", str(path)]]
    assert capsys.readouterr().err.count("training the model, once: a moment") == 1


def test_progress_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_model.py").write_text("print('step 1 of 2')\nprint('step 2 of 2')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said: list[str] = []
    trained_once(tmp_path / "key", "a_model", "the model", "small", "a moment", said.append)
    assert said[0].startswith("training the model, once: a moment")
    assert said[1:] == ["training the model: step 1 of 2", "training the model: step 2 of 2"]


def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"training the model failed: .*No module named .*no_such_module"):
        trained_once(tmp_path / "key", "no_such_module", "the model", "small", "a moment")
    assert not (tmp_path / "key").exists()


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero() -> None:
    rates = [rate(step, SMALL) for step in range(SMALL.steps)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_every_window_comes_once_before_any_comes_again() -> None:
    torch.manual_seed(0)
    batches = list(shuffled_windows(torch.arange(4 * 6 + 3), SMALL))
    assert [tuple(batch.shape) for batch in batches] == [(2, 4)] * SMALL.steps
    first = torch.cat(batches[:3])[:, 0].tolist()
    assert sorted(first) == [0, 4, 8, 12, 16, 20]
    assert all(torch.equal(row, torch.arange(4) + row[0]) for batch in batches for row in batch)


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_whole(untrained(SMALL), tokenizer(), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    save_whole(untrained(SMALL), tokenizer(), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_prints_what_is_kept_or_trains_where_it_is_told(tmp_path, monkeypatch, capsys):
    trained: list[tuple[str, Path]] = []

    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["model", *arguments])
        run_command(
            "pareto_core.model",
            ("small", "large"),
            lambda name, directory: trained.append((name, directory)),
            lambda name: tmp_path / name,
        )
        return capsys.readouterr().out.strip()

    assert command() == str(tmp_path / "small")
    assert command("--model", "large") == str(tmp_path / "large")
    assert not trained
    command("--model", "large", str(tmp_path / "new"))
    assert trained == [("large", tmp_path / "new")]
    with pytest.raises(SystemExit, match="2"):
        command("--model", "huge")
    assert "small" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        command("--help")
    assert "python -m pareto_core.model" in capsys.readouterr().out
    assert len(trained) == 1


def test_training_says_how_far_it_is(capsys) -> None:
    fit(
        untrained(SMALL),
        ({"input_ids": ids, "labels": ids} for ids in shuffled_windows(torch.arange(64), SMALL)),
        SMALL,
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == SMALL.steps
    assert lines[-1].startswith("step 7 of 7: loss ")
    assert lines[-1].endswith(" 0 min left")

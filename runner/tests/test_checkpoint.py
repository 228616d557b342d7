"""Checkpoints that are damaged, foreign, unfinished, malicious or impossible to write: always a note, never a crash."""

from __future__ import annotations

import builtins
import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pareto_core import Budget, ConfigError, Engine, MethodSpec, RunSpec, Stage, TaskRef, Training, TrainingError
from pareto_core.cache import write_json
from pareto_core.testing import TinyTask
from pareto_runner import checkpoint as c
from pareto_runner.engines import make_loop
from pareto_runner.phases import Phases
from pareto_runner.randomness import seed_everything
from pareto_runner.targets.xeon import XeonTarget
from pareto_runner.train import TrainingRun, train

STEPS = 6


class Killed(Exception):
    """Stands for a kill: nothing of the process remains but its files."""


def run(
    directory: Path,
    engine: Any = "torch",
    stop: int = 0,
    identity: str = "ours",
    seconds: float = 0,
    keep_trained: bool = False,
    on_step: Callable[[int], None] = lambda _: None,
) -> tuple[TrainingRun, list[str]]:
    """Train six steps with a checkpoint after each, or fewer: as if killed at step ``stop``. Returns the notes too."""
    chosen = Engine(name="torch") if engine == "torch" else Engine(zero_stage=engine)
    settings = Training(learning_rate=1e-2, batch_size=16, budget=Budget(max_steps=STEPS))
    notes: list[str] = []

    def after(step: int, steps: int, loss: float) -> None:
        on_step(step)
        if step == stop:
            raise Killed

    seed_everything(0)
    model: Any = TinyTask().backbone()
    loop = make_loop(model, settings, chosen, "fp32", "cpu", "cpu", TinyTask().backbone)
    checkpoints = c.Checkpoints(directory, identity, Phases(XeonTarget()), notes.append, seconds, keep_trained)
    try:
        return train(loop, model, TinyTask(), (), settings, 0, after, checkpoints), notes
    except Killed:
        return TrainingRun(), notes
    finally:
        if stop:
            loop.finish()


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The losses of the training that nothing cuts short."""
    return run(tmp_path_factory.mktemp("whole"), seconds=math.inf)[0].curve


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """The checkpoints of a training that was killed at its fifth step: one, after the fourth."""
    run(tmp_path, stop=5)
    assert [path.name for path in tmp_path.iterdir()] == ["step4"]
    return tmp_path


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "engine.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "engine.pt").write_bytes(content)


def change_manifest(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / c.MANIFEST).read_text())
    write_json(folder / c.MANIFEST, {**manifest, **values})


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: os.truncate(f / "engine.pt", 1000), "engine.pt is damaged"),
    "empty": (lambda f: os.truncate(f / "progress.pt", 0), "progress.pt is damaged"),
    "bit flipped": (flip_a_bit, "engine.pt is damaged"),
    "file missing": (lambda f: (f / "random0.pt").unlink(), "random0.pt is missing"),
    "unfinished": (lambda f: (f / c.MANIFEST).unlink(), "it was not finished"),
    "manifest cut": (lambda f: os.truncate(f / c.MANIFEST, 40), "its manifest cannot be read"),
    "manifest of bytes": (lambda f: (f / c.MANIFEST).write_bytes(b"\xff\x00\xfe"), "its manifest cannot be read"),
    "manifest of another shape": (lambda f: (f / c.MANIFEST).write_text("[1, 2]"), "its manifest cannot be read"),
    "files of another shape": (lambda f: change_manifest(f, files=[3]), "its manifest cannot be read"),
    "folder in a file's place": (lambda f: [(f / "engine.pt").unlink(), (f / "engine.pt").mkdir()], "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_discarded_and_training_starts_over(
    damage: str, cut: Path, curve: list[tuple[int, float]]
) -> None:
    do, reason = DAMAGES[damage]
    do(cut / "step4")
    done, notes = run(cut)
    assert len(notes) == 1
    assert notes[0].startswith("the checkpoint after step 4 was discarded: ")
    assert reason in notes[0]
    assert done.resumed_steps == 0
    assert done.curve == curve


def test_a_damaged_checkpoint_that_cannot_be_removed_is_not_used(
    cut: Path, curve: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_a_bit(cut / "step4")
    monkeypatch.setattr(c.shutil, "rmtree", lambda *_, **__: None)
    done, notes = run(cut)
    assert done.curve == curve
    assert "engine.pt is damaged" in notes[0]


def test_a_whole_checkpoint_is_used(cut: Path, curve: list[tuple[int, float]]) -> None:
    done, notes = run(cut)
    assert notes == ["training goes on after step 4"]
    assert done.resumed_steps == 4
    assert done.curve == curve


def test_a_checkpoint_of_another_run_is_not_used(cut: Path) -> None:
    done, notes = run(cut, identity="theirs")
    assert done.resumed_steps == 0
    assert notes == ["the checkpoint after step 4 was discarded: it belongs to another run"]


def test_an_unfinished_successor_does_not_cost_the_checkpoint_before(cut: Path, curve: list[tuple[int, float]]) -> None:
    shutil.copytree(cut / "step4", cut / "step5")
    (cut / "step5" / c.MANIFEST).unlink()
    done, notes = run(cut)
    assert notes[0] == "the checkpoint after step 5 was discarded: it was not finished"
    assert done.resumed_steps == 4
    assert done.curve == curve


def test_what_else_lies_in_the_folder_stays(cut: Path) -> None:
    (cut / "stepmother").mkdir()
    (cut / "notes.txt").write_text("mine")
    assert run(cut)[0].resumed_steps == 4
    assert (cut / "stepmother").is_dir()
    assert (cut / "notes.txt").read_text() == "mine"


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return builtins.exec, ("open('owned', 'w').close()",)


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("torch", "engine.pt"),
        ("torch", "progress.pt"),
        ("torch", "random0.pt"),
        (0, "mp_rank_00_model_states.pt"),
        (2, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ],
)
def test_no_code_of_a_checkpoint_runs(engine: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "stage0" / "step2"
    run(tmp_path / "stage0", engine, stop=3)
    assert (folder / name).is_file()
    torch.save({"module": Evil(), "optimizer_state_dict": Evil(), "run": Evil()}, folder / name)
    change_manifest(folder, files={path.name: c.fingerprint(path) for path in folder.iterdir() if path.suffix == ".pt"})
    with pytest.raises(TrainingError, match=r"step2 cannot be used and was removed; run again"):
        run(tmp_path / "stage0", engine)
    assert not (tmp_path / "owned").exists()
    assert not folder.exists()


@pytest.fixture
def limit_file_size() -> Iterator[Callable[[int], None]]:
    """Let writes past so many bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("engine", ["torch", 0, 2])
def test_a_full_disk_costs_checkpoints_but_not_the_run(
    engine: Any, tmp_path: Path, curve: list[tuple[int, float]], limit_file_size: Callable[[int], None]
) -> None:
    def fill(step: int) -> None:
        if step == 3:
            limit_file_size(20_000)

    done, notes = run(tmp_path, engine, on_step=fill)
    assert [loss for _, loss in done.curve] == pytest.approx([loss for _, loss in curve], abs=2e-5)
    assert len(notes) == 1
    assert notes[0].startswith("no checkpoint was written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["step2"]
    assert c.damage(tmp_path / "step2", "ours") == ""


def test_a_place_that_cannot_be_written_costs_checkpoints_but_not_the_run(
    tmp_path: Path, curve: list[tuple[int, float]]
) -> None:
    (tmp_path / "file").touch()
    done, notes = run(tmp_path / "file" / "stage0")
    assert done.curve == curve
    assert len(notes) == 1
    assert "Not a directory" in notes[0]


def test_one_whole_checkpoint_is_there_at_any_time(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look(step: int) -> None:
        whole = [path.name for path in tmp_path.iterdir() if not c.damage(path, "ours")]
        assert len(list(tmp_path.iterdir())) == len(whole)
        seen.append(whole)

    run(tmp_path, on_step=look)
    assert seen == [[], ["step1"], ["step2"], ["step3"], ["step4"], ["step5"]]


@pytest.mark.parametrize(("keep", "left"), [(False, []), (True, ["step6"])])
def test_the_trained_state_is_kept_where_a_stage_follows(keep: bool, left: list[str], tmp_path: Path) -> None:
    run(tmp_path, seconds=math.inf, keep_trained=keep)
    assert [path.name for path in tmp_path.iterdir()] == left


def test_checkpoints_keep_their_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(c.time, "monotonic", lambda: now[0])
    settings = Training(batch_size=16, budget=Budget(max_steps=1))
    loop = make_loop(TinyTask().backbone(), settings, Engine(name="torch"), "fp32", "cpu", None, TinyTask().backbone)  # type: ignore[arg-type]
    checkpoints = c.Checkpoints(tmp_path, "ours", Phases(XeonTarget()), seconds=60)

    def first_due(after: float) -> float:
        now[0] = after
        while not checkpoints.wanted(loop, last=False):
            now[0] += 1
        return now[0]

    assert first_due(0) == 60
    save = loop.save

    def slow(folder: Path) -> None:
        save(folder)
        now[0] += 15

    monkeypatch.setattr(loop, "save", slow)
    checkpoints.save(loop, 1, {})
    assert first_due(75) == 75 + 10 * 15
    monkeypatch.setattr(loop, "save", save)
    checkpoints.save(loop, 2, {})
    assert first_due(225) == 225 + 60


def test_the_environment_says_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    assert c.seconds_between() == 60
    monkeypatch.setenv("PARETO_CHECKPOINT_SECONDS", "0.5")
    assert c.seconds_between() == 0.5
    monkeypatch.setenv("PARETO_CHECKPOINT_SECONDS", "often")
    with pytest.raises(ConfigError, match="PARETO_CHECKPOINT_SECONDS = 'often'"):
        c.seconds_between()


def test_a_checkpoint_belongs_to_a_run_a_stage_and_its_data() -> None:
    def spec(seed: int) -> RunSpec:
        stage = Stage(methods=(MethodSpec(name="full"),))
        return RunSpec(
            question="q", variant="v", stages=(stage,), task=TaskRef(name="core.tiny"), target="xeon", seed=seed
        )

    same = c.identity_of(spec(0), 0, {"sha256": "1"})
    assert same == c.identity_of(spec(0), 0, {"sha256": "1"})
    others = [
        c.identity_of(spec(1), 0, {"sha256": "1"}),
        c.identity_of(spec(0), 1, {"sha256": "1"}),
        c.identity_of(spec(0), 0, {"sha256": "2"}),
    ]
    assert len({same, *others}) == 4

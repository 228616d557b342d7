"""Results on disk: they come back equal in the order of writing, none is lost where the disk fails, damage is named."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import pytest

import pareto_runner.journal as module
from pareto_core import Measurement, MethodSpec, Result, RunSpec, Stage, TaskRef
from pareto_runner.journal import Journal, JournalError, content_key, latest


def result(variant: str = "A", seed: int = 0, value: float = 1.0, key: str = "k") -> Result:
    spec = RunSpec(
        question="q/one",
        variant=variant,
        stages=(Stage(methods=(MethodSpec(name="full"),)),),
        task=TaskRef(name="core.tiny"),
        target="xeon",
        seed=seed,
    )
    measurements = (Measurement(name="accuracy", value=value, unit="%"),)
    return Result(spec=spec, status="ok", key=key, measurements=measurements)


def test_results_come_back_equal_in_the_order_of_writing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    wanted = [result("B"), result("A"), result("B", value=2.0)]
    paths = [journal.write(item) for item in wanted]
    assert [path.name for path in paths] == [
        "000001-q-one-b-0-xeon-k.json",
        "000002-q-one-a-0-xeon-k.json",
        "000003-q-one-b-0-xeon-k.json",
    ]
    assert journal.read() == wanted
    assert latest(journal.read()) == [wanted[2], wanted[1]]


def test_damaged_files_are_named_and_set_aside(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    whole = journal.write(result())
    text = whole.read_text()
    for number in range(1, 30):
        (tmp_path / f"{number + 1:06d}-cut-k.json").write_text(text[: len(text) * number // 30])
    (tmp_path / "other.json").write_text("[" * 100_000)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert journal.read() == [result()]
    assert len(journal.damaged()) == 31
    assert all(item.reason for item in journal.set_aside())
    assert journal.damaged() == []
    assert journal.write(result()).name.startswith("000031-")


def test_a_result_that_the_journal_cannot_take_is_rescued_and_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    written = module.write_json

    def full(path: Path, value: object) -> None:
        if path.parent == tmp_path / "journal":
            raise OSError(28, "No space left on device")
        written(path, value)

    journal = Journal(tmp_path / "journal")
    monkeypatch.setattr(module, "write_json", full)
    path = journal.write(result())
    assert path.is_relative_to(tmp_path / "cache")
    assert journal.read() == []
    assert journal.adopt() == []
    assert path.is_file()
    monkeypatch.setattr(module, "write_json", written)
    assert [item.parent for item in journal.adopt()] == [tmp_path / "journal"]
    assert journal.adopt() == []
    assert journal.read() == [result()]


def test_a_result_that_fits_nowhere_is_an_error_with_every_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(JournalError, match=r"No space left on device.*No space left"):
        Journal(tmp_path).write(result())


def _write(directory: Path, start: int) -> None:
    for seed in range(start, start + 20):
        Journal(directory).write(result(seed=seed))


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, start)) for start in (0, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(item.spec.seed for item in Journal(tmp_path).read()) == list(range(40))
    assert len({path.name[:6] for path in tmp_path.glob("*.json")}) == 40


def test_the_key_depends_on_everything_that_decides_a_result() -> None:
    spec = result().spec
    base = content_key(spec, "code", "lock", {"sha": "1"}, {"cpu": "x"})
    assert base == content_key(spec, "code", "lock", {"sha": "1"}, {"cpu": "x"})
    others = [
        content_key(dataclasses.replace(spec, seed=1), "code", "lock", {"sha": "1"}, {"cpu": "x"}),
        content_key(spec, "other", "lock", {"sha": "1"}, {"cpu": "x"}),
        content_key(spec, "code", "other", {"sha": "1"}, {"cpu": "x"}),
        content_key(spec, "code", "lock", {"sha": "2"}, {"cpu": "x"}),
        content_key(spec, "code", "lock", {"sha": "1"}, {"cpu": "y"}),
    ]
    assert len({base, *others}) == 6

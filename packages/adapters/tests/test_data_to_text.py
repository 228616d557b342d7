from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest

from pareto_adapters import nlg
from pareto_adapters.tasks.data_to_text import DataSet, DataToText, group, is_held_out, read_text
from pareto_core import ConfigError, DataError, Metric, Record, Split

SET = DataSet("Toy set", "PARETO_TOY_DIR", "toy", "https://example.org/toy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(DataToText):
    """Two texts for each of 200 numbers, in three files."""

    name: ClassVar[str] = "adapters.toy"

    def pairs(self, part: Split) -> list[tuple[str, str]]:
        return [(f"n : {i}", f"{part} {text} number {i}") for text in ("says it is", "has the") for i in range(200)]


def test_a_training_item_is_one_pair_and_others_have_all_references() -> None:
    task = Toy()
    train, dev, test = (task.split(split) for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (400, 200, 200)
    assert (train[0].id, train[0].prompt) == ("train:0", "n : 0\nDescription:")
    assert train[0].references == ("train says it is number 0",)
    assert (dev[7].id, dev[7].prompt) == ("dev:7", "n : 7\nDescription:")
    assert dev[7].references == ("dev says it is number 7", "dev has the number 7")
    assert test[-1].references == ("test says it is number 199", "test has the number 199")


def test_the_development_file_can_train() -> None:
    task, usual = Toy(training_file="dev"), Toy()
    train, dev = task.split("train"), task.split("dev")
    assert not {item.prompt for item in train} & {item.prompt for item in dev}
    assert sorted([*train, *dev], key=lambda i: i.prompt)[0].references[0].startswith("dev ")
    assert len(train) == 2 * (200 - len(dev))
    assert 10 < len(dev) < 30
    assert all(len(item.references) == 2 for item in dev)
    assert task.split("test") == usual.split("test")
    # what this version draws, every version and machine draws
    assert [i for i in range(200) if is_held_out(f"n : {i}")][:3] == [3, 24, 36]
    revisions = task.data_revision(), usual.data_revision()
    assert [revision["training_file"] for revision in revisions] == ["dev", "train"]
    assert revisions[0]["sha256"] != revisions[1]["sha256"]


def test_equal_data_are_one_item_wherever_they_stand() -> None:
    pairs = [("b", "1"), ("a", "2"), ("b", "3")]
    assert group(pairs) == [("b", ("1", "3")), ("a", ("2",))]


def test_scores() -> None:
    task = Toy()
    assert task.primary_metric == Metric("bleu", "%", True)
    for split in ("test", "dev"):
        records = [Record(item.id, text=item.references[1]) for item in task.split(split)]
        found = task.score(records)
        assert found["bleu"] == pytest.approx(100)
        assert found["ter"] == 0
        worse = task.score([*records[:-1], Record(records[-1].id, text="something else")])
        assert worse["bleu"] < found["bleu"]
        assert worse["ter"] > 0
    assert task.score([Record("test:3", text=None)])["rouge_l"] == 0
    with pytest.raises(DataError, match=r"adapters\.toy: no records to score"):
        task.score([])
    with pytest.raises(DataError, match="it has no item of:another"):
        task.score([Record("of:another", text="a")])


def test_what_a_subclass_defines() -> None:
    with pytest.raises(TypeError, match="DataToText must define pairs"):
        DataToText().pairs("train")
    with pytest.raises(TypeError, match="Toy must define one_shot_prompt"):
        _ = Toy().one_shot_prompt
    with pytest.raises(ConfigError, match=r"Toy\.training_file = 'test'"):
        Toy(training_file="test")


def test_scorers_are_asked_for_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nlg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'sacrebleu.*pip install "\./packages/adapters\[nlg\]"'):
        Toy().data_revision()


def test_files_are_found_in_the_directory_or_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARETO_TOY_DIR", raising=False)
    with pytest.raises(
        DataError, match=r"Toy set: no directory was given \(--data DIR, or \$PARETO_TOY_DIR\).*example"
    ):
        SET.file(None, ["a.csv"])
    with pytest.raises(DataError, match=r"none is no directory; its files are at https://example\.org/toy"):
        SET.file(str(tmp_path / "none"), ["a.csv"])
    with pytest.raises(DataError, match=rf"Toy set: no a\.csv or b\.csv in {tmp_path} or {tmp_path}/toy"):
        SET.file(str(tmp_path), ["a.csv", "b.csv"])
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "b.csv").touch()
    monkeypatch.setenv("PARETO_TOY_DIR", str(tmp_path))
    assert SET.file(None, ["a.csv", "b.csv"]) == tmp_path / "toy" / "b.csv"
    (tmp_path / "toy" / "a.csv").touch()
    assert SET.file(None, ["a.csv", "b.csv"]) == tmp_path / "toy" / "a.csv"
    assert SET.file(str(tmp_path / "toy"), ["b.csv"]) == tmp_path / "toy" / "b.csv"


def test_texts_are_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff£20".encode())
    assert read_text(path) == "£20"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text at byte 3"):
        read_text(path)

"""Text, Retrieval and Image on tiny files in the published formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pareto_core import DataError
from pareto_sequence.tasks.lra import LraImage, LraRetrieval, LraText


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    for part, count in (("train", 10), ("test", 3)):
        for kind in ("neg", "pos"):
            folder = tmp_path / "aclImdb" / part / kind
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}_7.txt").write_bytes(f"{part} {kind} café {'x' * number}".encode())
    return tmp_path


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    folder = tmp_path / "lra_release" / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for part, count in (("train", 6), ("eval", 2), ("test", 4)):
        lines = [f'{n % 2}.0\tP{n}\tQ{n}\ta "{part}" {n}\tthe naïve {"b" * n}\n' for n in range(count)]
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        records = random.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] = [3, 0, 9, 5]
        (folder / name).write_bytes(records.tobytes())
    return tmp_path


def test_reviews_are_bytes_with_their_labels(reviews: Path, bag: Any) -> None:
    task = LraText(data=str(reviews), max_length=20)
    assert {split: task.size(split) for split in ("train", "dev", "test")} == {"train": 18, "dev": 2, "test": 6}
    (batch,) = task.batches("test", 6, 0)
    assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    expected = "test neg café ".encode()
    assert batch["input_ids"][0].tolist() == [b + 1 for b in expected] + [0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [15, 16, 17, 15, 16, 17]
    assert LraText(data=str(reviews), max_length=5).items("test").lengths.tolist() == [5] * 6
    assert [record.label for record in task.records(bag(2), "test")] == ["negative"] * 3 + ["positive"] * 3
    assert task.spec.vocabulary_size == 257


def test_train_and_dev_share_no_review(reviews: Path) -> None:
    task = LraText(data=str(reviews))
    parts = {split: {bytes(row) for row in task.items(split).rows} for split in ("train", "dev")}
    assert not parts["train"] & parts["dev"]
    assert len(parts["train"] | parts["dev"]) == 20
    other = LraText(data=str(reviews / "aclImdb"), seed=1)
    assert {bytes(row) for row in other.items("dev").rows} != parts["dev"]
    assert other.data_revision()["sha256"] == task.data_revision()["sha256"]
    assert other.data_revision() != task.data_revision()
    (reviews / "aclImdb" / "test" / "pos" / "0_7.txt").write_text("changed")
    assert LraText(data=str(reviews)).data_revision()["sha256"] != task.data_revision()["sha256"]


def test_pairs_are_read_from_where_they_lie(papers: Path, bag: Any) -> None:
    task = LraRetrieval(data=str(papers), max_length=12)
    assert {split: task.size(split) for split in ("train", "dev", "test")} == {"train": 6, "dev": 2, "test": 4}
    (batch,) = task.batches("test", 4, 0)
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    for number in range(4):
        for suffix, text in (("", f'a "test" {number}'), ("_2", f"the naïve {'b' * number}")):
            tokens = batch[f"input_ids{suffix}"][number][batch[f"attention_mask{suffix}"][number] == 1]
            assert bytes((tokens - 1).tolist()) == text.encode()[:12]
    assert task.items("test").lengths.tolist() == [11, 12, 12, 12]
    assert [record.label for record in task.records(bag(2), "dev")] == ["unrelated", "citing"]
    assert next(iter(task.batches("train", 4, 0)))["input_ids_2"].shape[0] == 4
    before = task.data_revision()
    path = papers / "lra_release" / "lra_release" / "tsv_data" / "new_aan_pairs.eval.tsv"
    path.write_bytes(path.read_bytes() + b"0\ta\tb\tc\td\r\n")
    again = LraRetrieval(data=str(papers))
    assert again.data_revision() != before
    second = again.items("dev").second
    assert second is not None
    assert second[2].tolist() == [ord("d") + 1]
    assert [len(row) for row in second[1:]] == [12, 1]


def test_images_are_grey(images: Path, bag: Any) -> None:
    task = LraImage(data=str(images))
    assert {split: task.size(split) for split in ("train", "dev", "test")} == {"train": 18, "dev": 2, "test": 4}
    (batch,) = task.batches("test", 4, 0)
    raw = np.frombuffer((images / "cifar-10-batches-bin" / "test_batch.bin").read_bytes(), np.uint8).reshape(4, 3073)
    assert batch["labels"].tolist() == [3, 0, 9, 5]
    for row, values in zip(raw, batch["input_values"].numpy(), strict=True):
        red, green, blue = row[1:1025].astype(float), row[1025:2049].astype(float), row[2049:].astype(float)
        assert values * 255 == pytest.approx(0.2989 * red + 0.587 * green + 0.114 * blue, abs=0.51)
    assert [record.label for record in task.records(bag(10), "test")] == ["cat", "airplane", "truck", "dog"]
    assert LraImage(data=str(images), seed=1).data_revision() != task.data_revision()


@pytest.mark.parametrize(
    ("task", "first"),
    [(LraText, "train/neg"), (LraRetrieval, r"new_aan_pairs\.train\.tsv"), (LraImage, r"data_batch_1\.bin")],
)
def test_missing_files_are_named(task: Any, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARETO_LRA_DIR", raising=False)
    with pytest.raises(DataError, match=r"LRA \w+ \(.*\): no directory was given: set data or \$PARETO_LRA_DIR; get"):
        task().size("test")
    monkeypatch.setenv("PARETO_LRA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=rf"{first} is not in any of {tmp_path}, {tmp_path}/.*https://"):
        task().size("test")


def test_broken_files_are_named_with_their_line(reviews: Path, papers: Path, images: Path) -> None:
    (reviews / "aclImdb" / "train" / "pos" / "3_7.txt").write_text("")
    with pytest.raises(DataError, match=r"3_7\.txt is empty"):
        LraText(data=str(reviews)).size("train")
    for path in (reviews / "aclImdb" / "train" / "neg").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"neg has no \.txt files"):
        LraText(data=str(reviews)).size("train")
    path = papers / "lra_release" / "lra_release" / "tsv_data" / "new_aan_pairs.test.tsv"
    for line, message in [
        ("2\ta\tb\tc\td\n", "line 2: label b'2', expected 0 or 1"),
        ("1\ta\tb\tc\n", "line 2: 4 columns"),
        ("1\ta\tb\t\td\n", "line 2: an empty text"),
    ]:
        path.write_text("1.0\ta\tb\tc\td\n" + line)
        with pytest.raises(DataError, match=message):
            LraRetrieval(data=str(papers)).size("test")
    path.write_text("")
    with pytest.raises(DataError, match="has no lines"):
        LraRetrieval(data=str(papers)).size("test")
    batch = images / "cifar-10-batches-bin" / "data_batch_2.bin"
    batch.write_bytes(bytes([200]) + bytes(3072))
    with pytest.raises(DataError, match="has the class 200, expected 0 to 9"):
        LraImage(data=str(images)).size("train")
    batch.write_bytes(bytes(3000))
    with pytest.raises(DataError, match="has 3000 bytes, not a multiple of 3073"):
        LraImage(data=str(images)).size("train")

"""Enwik8 on a small file, and the task on CPython's texts: windows, labels, bits."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pareto_core import ConfigError, DataError, ModelError, Record
from pareto_core.byte_llama import END, split_texts
from pareto_sequence.tasks import language
from pareto_sequence.tasks.byte_language import ByteLanguage
from pareto_sequence.tasks.enwik8 import Enwik8

SIZES = {"train_bytes": 1000, "dev_bytes": 150, "test_bytes": 133, "chunk_size": 8, "evaluation_chunk_size": 16}
TEXTS = {f"{i:03}.py": f"def f{i}(x):\n    return x + {i}\n".encode() for i in range(100)}


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).integers(0, 256, 1283, dtype=np.uint8).tobytes()


@pytest.fixture
def enwik8(tmp_path: Path, content: bytes) -> Enwik8:
    (tmp_path / "enwik8").write_bytes(content)
    return Enwik8(data=str(tmp_path), prompt=5, long_prompt=40, new_tokens=3, **SIZES)


@pytest.fixture
def sources(tmp_path: Path) -> ByteLanguage:
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes(text)
    return ByteLanguage(data=str(tmp_path), window=32, items=None, prompt=5, long_prompt=40, new_tokens=3)


class Shift:
    """Gives the byte that is one above the last half of the probability, and the rest to all alike."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        likely = torch.nn.functional.one_hot((input_ids + 1) % 256, self.size) * 0.5
        return SimpleNamespace(logits=(likely + 0.5 / self.size).log())


def test_the_splits_follow_each_other(enwik8: Enwik8, content: bytes) -> None:
    assert enwik8.text("train").tobytes() == content[:1000]
    assert enwik8.text("dev").tobytes() == content[1000:1150]
    assert enwik8.text("test").tobytes() == content[1150:]
    assert enwik8.spec.vocabulary_size == 256
    assert enwik8.spec.max_length == 48
    assert Enwik8(data=None).spec.max_length == 3 * 4096


@pytest.mark.parametrize("split", ["dev", "test"])
def test_every_token_but_the_first_is_scored_once(enwik8: Enwik8, content: bytes, split: Any) -> None:
    scored, inputs = [], []
    for batch in enwik8.batches(split, 2, 0):
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[1] <= 48
        scored.append(batch["labels"][batch["labels"] != -100])
        inputs.append(int(batch["attention_mask"].sum()))
    whole = content[1000:1150] if split == "dev" else content[1150:]
    assert torch.cat(scored).tolist() == list(whole)[1:]
    assert sum(inputs) == len(whole) - 1 + enwik8.size(split)


def test_training_windows_have_random_lengths_and_do_not_overlap(enwik8: Enwik8, content: bytes) -> None:
    batches = list(enwik8.batches("train", 3, 0))
    assert len(batches) == enwik8.size("train") // 3 == 1000 // 24 // 3
    widths = [batch["input_ids"].shape for batch in batches]
    assert {width for _, width in widths} == {16, 24, 32}
    assert all(rows == 3 for rows, _ in widths)
    counts = [sum(width == w for _, width in widths) for w in (16, 24, 32)]
    assert max(counts) - min(counts) <= 1
    covered: set[int] = set()
    for batch in batches:
        assert (batch["attention_mask"] == 1).all()
        assert (batch["labels"][:, 0] == -100).all()
        assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])
        for row in batch["input_ids"]:
            start = content.find(bytes(row.tolist()))
            places = set(range(start, start + len(row)))
            assert 0 <= start <= 1000 - len(row)
            assert not covered & places
            covered |= places
    again, other = (list(enwik8.batches("train", 3, seed)) for seed in (0, 1))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    same = [torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, other, strict=True)]
    assert not all(same)


@pytest.mark.parametrize(("batch_size", "chunks"), [(1, (2, 3, 4)), (2, (1, 5)), (5, (7,)), (13, (1, 2, 9))])
def test_an_epoch_has_the_batches_that_its_size_promises(enwik8: Enwik8, batch_size: int, chunks: Any) -> None:
    task = Enwik8(**{**enwik8.to_json(), "chunks": chunks})
    for seed in range(5):
        assert sum(1 for _ in task.batches("train", batch_size, seed)) == task.size("train") // batch_size


def test_bits_are_those_of_a_hand_computation(enwik8: Enwik8, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    records = enwik8.records(Shift(256), "test")
    text = content[1150:]
    bits = 0.0
    for before, byte in itertools.pairwise(text):
        bits -= math.log2(0.5 / 256 + (0.5 if byte == (before + 1) % 256 else 0.0))
    assert enwik8.score(records)["bits_per_character"] == pytest.approx(bits / 132, rel=1e-5)
    assert sum(record.label for record in records) == 132  # type: ignore[misc]
    assert [record.id for record in records] == [f"test:{i}" for i in range(3)]
    monkeypatch.setattr(language, "POSITIONS", 1)
    single = enwik8.records(Shift(256), "test")
    for one, other in zip(records, single, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, rel=1e-6)


def test_a_part_of_the_windows(enwik8: Enwik8) -> None:
    some = Enwik8(**{**enwik8.to_json(), "items": 2})
    assert some.size("test") == 2
    assert set(some.windows("test")) <= set(enwik8.windows("test"))


def test_the_file_is_asked_for_by_name(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARETO_ENWIK8_DIR", raising=False)
    with pytest.raises(DataError, match=r"EnWik8: no directory was given: set data or \$PARETO_ENWIK8_DIR; get enwik8"):
        Enwik8().size("test")
    with pytest.raises(DataError, match=rf"EnWik8: enwik8 is not in any of {tmp_path}, .*; get enwik8 from http"):
        Enwik8(data=str(tmp_path)).size("test")
    (tmp_path / "enwik8").mkdir()
    with pytest.raises(DataError, match="is not a file"):
        Enwik8(data=str(tmp_path)).size("test")
    (tmp_path / "enwik8" / "enwik8").write_bytes(content)
    monkeypatch.setenv("PARETO_ENWIK8_DIR", str(tmp_path / "enwik8"))
    with pytest.raises(DataError, match="has 1283 bytes; the splits take 100000000"):
        Enwik8().size("test")
    assert Enwik8(**SIZES).size("test") == 3


def test_texts_of_the_library_have_marks_between_them(sources: ByteLanguage) -> None:
    for split in ("train", "dev", "test"):
        texts = split_texts(TEXTS)[split].values()
        expected = [token for text in texts for token in (END, *text)] + [END]
        assert sources.text(split).tolist() == expected
    scored = torch.cat([b["labels"][b["labels"] != -100] for b in sources.batches("test", 4, 0)])
    assert bytes(scored.tolist()) == b"".join(split_texts(TEXTS)["test"].values())
    for batch in sources.batches("train", 2, 0):
        assert batch["input_ids"].shape == (2, 32)
        assert ((batch["labels"] == -100)[:, 1:] == (batch["input_ids"] == END)[:, 1:]).all()
    assert sources.spec.vocabulary_size == 257


def test_windows_cover_other_places_in_each_epoch(sources: ByteLanguage) -> None:
    starts = {tuple(next(iter(sources.batches("train", 4, seed)))["input_ids"].flatten().tolist()) for seed in range(6)}
    assert len(starts) == 6


def test_requests_and_revisions(sources: ByteLanguage, enwik8: Enwik8) -> None:
    for task, length, room in ((sources, 32, 32 - 3), (enwik8, 48, 48 - 3)):
        silent = int((torch.from_numpy(task.text("test")[:length].astype(int)) == END).sum())
        shapes = {n: (r.kind, r.inputs["input_ids"].shape[1], r.new_tokens) for n, r in task.requests().items()}
        assert shapes == {
            "forward": ("forward", length, 0),
            "generate": ("generate", 5, 3),
            "generate_long": ("generate", min(40, room - silent), 3),
        }
        prompt = task.requests()["generate_long"].inputs["input_ids"][0].tolist()
        assert prompt == [t for t in task.text("test")[:length].tolist() if t != END][: len(prompt)]
        with pytest.raises(DataError, match="no room for new_tokens 48"):
            type(task)(**{**task.to_json(), "new_tokens": 48}).requests()
    assert sources.data_revision()["sha256"] != ByteLanguage().data_revision()["sha256"]
    other = Enwik8(**{**enwik8.to_json(), "train_bytes": 999})
    assert other.data_revision() != enwik8.data_revision()


def test_what_is_no_number_and_fields_out_of_range(enwik8: Enwik8, sources: ByteLanguage) -> None:
    broken = SimpleNamespace(logits=torch.full((3, 48, 256), torch.nan))
    with pytest.raises(ModelError, match="the log-probability of window test:0 is nan"):
        enwik8.records(lambda **_: broken, "test")
    with pytest.raises(DataError, match="no records"):
        enwik8.score([])
    assert sources.score([Record("a", label=2.0, log_probability=-4 * math.log(2))]) == {"bits_per_byte": 2.0}
    with pytest.raises(DataError, match="training items do not fill one batch of 42"):
        next(iter(enwik8.batches("train", 42, 0)))
    with pytest.raises(DataError, match="do not fill a window of 5000"):
        ByteLanguage(**{**sources.to_json(), "window": 5000}).size("test")
    for fields, field in [
        ({"chunks": []}, "chunks"),
        ({"chunks": [0]}, "chunks"),
        ({"train_bytes": 8000}, "train_bytes"),
    ]:
        with pytest.raises(ConfigError) as caught:
            Enwik8.from_json(fields)
        assert caught.value.field == field

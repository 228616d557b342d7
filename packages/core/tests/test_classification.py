from __future__ import annotations

import dataclasses
import hashlib
import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from pareto_core import ConfigError, DataError, Metric, Protocol, Record, Split
from pareto_core.tasks.classification import Example, TextClassification

TEXTS = ["cat ran", "dog", "good film plot the a is was not very", "bad film", "the cat sat", "dog ran well", "bad"]
LABELS = ["cat", "dog", "cat", "dog", "cat", "dog", "dog"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Animals(TextClassification):
    name: ClassVar[str] = "test.animals"
    metric: ClassVar[Metric] = Metric("accuracy")

    rating: bool = False
    empty: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        return () if self.rating else ("cat", "dog")

    def examples(self, split: Split) -> list[Example]:
        if split == self.empty:
            return []
        values: list[Any] = list(range(7)) if self.rating else LABELS
        return [Example(f"{split}{i}", (text,), values[i]) for i, text in enumerate(TEXTS)]


class LengthModel:
    """Its logits are a function of the input alone: [number of tokens, number of tokens of the longest allowed]."""

    def __call__(self, **batch: Any) -> Any:
        lengths = batch["attention_mask"].sum(1).float()
        return SimpleNamespace(logits=torch.stack([lengths, torch.full_like(lengths, 4.5)], 1))


def test_padding_by_hand(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert, max_length=64)
    batch = task.collate("test", [1, 2])
    # <s> dog </s> is 3 tokens, the other 11: padded to 16
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == [3, 11]
    assert batch["input_ids"][0, 3:].eq(0).all()
    assert batch["input_ids"][0, 0] == 3
    assert batch["input_ids"][0, 2] == 1
    assert batch["labels"].tolist() == [1, 0]
    assert task.collate("test", [0])["input_ids"].shape == (1, 8)


def test_cut_at_max_length(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert, max_length=6)
    assert max(len(item["input_ids"]) for item in task.encoded("test")) == 6


def test_train_is_shuffled_by_the_seed_and_drops_the_rest(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert)

    def epoch(split: Split, seed: int) -> list[list[int]]:
        found = list(task.batches(split, 3, seed))
        return [batch["input_ids"].tolist() for batch in found]

    assert epoch("train", 0) == epoch("train", 0)
    assert any(epoch("train", 0) != epoch("train", seed) for seed in range(1, 4))
    assert [len(rows) for rows in epoch("train", 0)] == [3, 3]
    assert [len(rows) for rows in epoch("test", 0)] == [3, 3, 1]
    assert epoch("test", 0) == epoch("test", 5)
    seen = {
        tuple(token for token in row if token) for seed in range(20) for rows in epoch("train", seed) for row in rows
    }
    assert len(seen) == 7  # no item is lost for good


def test_training_batches_hold_texts_of_similar_length(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert)
    orders = set()
    for seed in range(10):
        batches = [batch["attention_mask"].sum(1).tolist() for batch in task.batches("train", 2, seed)]
        assert [len(batch) for batch in batches] == [2, 2, 2]
        drawn = sorted(length for batch in batches for length in batch)
        # one of the lengths 3 3 4 4 5 5 11 is left out; the others are dealt in their order, two by two
        assert sorted(map(sorted, batches)) == [drawn[0:2], drawn[2:4], drawn[4:6]]
        orders.add(tuple(sorted(batches).index(batch) for batch in batches))
    assert len(orders) > 1  # the batches themselves are shuffled


def test_too_few_items_for_a_batch(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert)
    assert len(list(task.batches("train", 7, 0))) == 1
    with pytest.raises(DataError, match=r"test\.animals: 7 training items do not fill one batch of 8"):
        next(task.batches("train", 8, 0))
    assert len(list(task.batches("test", 8, 0))) == 1


def test_train_items_keep_the_smallest_hashes(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert, train_items=3)
    names = sorted((f"train{i}" for i in range(7)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:3]
    assert [e.id for e in task.split("train")] == names
    assert task.size("test") == 7


def test_records_are_in_the_order_of_the_split(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert)
    records = task.records(LengthModel(), "test")
    assert [r.id for r in records] == [f"test{i}" for i in range(7)]
    lengths = [len(text.split()) + 2 for text in TEXTS]
    assert [r.prediction for r in records] == ["cat" if n > 4.5 else "dog" for n in lengths]
    for record, n, label in zip(records, lengths, LABELS, strict=True):
        right = n if label == "cat" else 4.5
        expected = right - math.log(math.exp(n) + math.exp(4.5))
        assert record.log_probability == pytest.approx(expected, abs=1e-5)
        assert record.label == label


def test_score_by_hand() -> None:
    task = Animals()
    answers = [("cat", "cat"), ("cat", "dog"), ("dog", "dog"), (None, "dog")]
    records = [Record(str(i), prediction, label) for i, (prediction, label) in enumerate(answers)]
    assert task.score(records) == {"accuracy": 50.0, "majority_accuracy": 75.0}
    with pytest.raises(DataError, match="no records to score"):
        task.score([])


def test_regression(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert, rating=True)
    assert task.collate("test", [2, 5])["labels"].tolist() == [2.0, 5.0]
    model = task.backbone()
    assert getattr(model, "num_labels") == 1  # noqa: B009
    batch = task.collate("test", [2, 5])
    out = model(**batch)
    expected = ((out.logits.squeeze(1) - torch.tensor([2.0, 5.0])) ** 2).mean()
    torch.testing.assert_close(out.loss, expected)
    records = task.records(LengthModel(), "test")
    assert [r.prediction for r in records] == [len(text.split()) + 2 for text in TEXTS]
    assert [r.label for r in records] == [float(i) for i in range(7)]


def test_backbone_and_head(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert)
    assert task.spec.head == ("classifier",)
    assert task.spec.labels == ("cat", "dog")
    assert not task.spec.generates
    model: Any = task.backbone()
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model(**task.collate("test", [0, 1])).logits.shape == (2, 2)


def test_requests(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert)
    requests = task.requests()
    assert set(requests) == {"batch1", "batch32", "chapter4"}
    assert requests["batch1"].batch_size == 1
    # lengths are 4, 3, 11, 4, 5, 5, 3: the median is 4 and text 0 the first that has it
    assert requests["batch1"].inputs["attention_mask"].sum() == 4
    assert requests["batch32"].batch_size == 7
    assert requests["chapter4"].inputs["input_ids"].shape == (1, 10)
    assert requests["chapter4"].protocol == Protocol(warmups=150, runs=200, repeats=3)
    model = task.backbone()
    for request in requests.values():
        assert "labels" not in request.inputs
        assert model(**request.inputs).logits.shape == (request.batch_size, 2)


def test_relabel(tiny_bert: str) -> None:
    task = Animals(model=tiny_bert)
    swapped = [Record(e.id, "cat" if e.label == "dog" else "dog") for e in task.split("train")]
    other = task.relabel(swapped)
    assert [e.label for e in other.split("train")] == ["cat" if label == "dog" else "dog" for label in LABELS]
    assert [e.label for e in other.split("test")] == LABELS
    assert [e.label for e in task.split("train")] == LABELS
    assert other.data_revision() != task.data_revision()
    with pytest.raises(DataError, match="no predicted label for the training item train6"):
        task.relabel(swapped[:-1])


def test_bad_input(tiny_bert: str) -> None:
    with pytest.raises(DataError, match=r"test\.animals: the dev split is empty"):
        Animals(model=tiny_bert, empty="dev").split("dev")
    for fields, message in (
        ({"max_length": 3}, r"max_length = 3: must be between 4 and 512"),
        ({"max_length": 513}, r"max_length = 513"),
        ({"train_items": 0}, r"train_items = 0: must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Animals(**fields)  # type: ignore[arg-type]

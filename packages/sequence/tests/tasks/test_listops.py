from __future__ import annotations

import itertools
import random
import statistics
from typing import Any

import numpy as np
import pytest

from pareto_core import ConfigError, DataError
from pareto_sequence.tasks.listops import CLOSE, DIGIT, OPERATOR, ListOps, draw, text_of

SMALL = ListOps(max_depth=4, max_args=5, min_length=8, max_length=60, train_items=120, dev_items=40, test_items=40)


def evaluate(words: list[str]) -> int:
    """Read one expression off the front of ``words``, by recursive descent."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word)
    values = []
    while words[0] != "]":
        values.append(evaluate(words))
    words.pop(0)
    return {
        "[MIN": lambda: min(values),
        "[MAX": lambda: max(values),
        "[MED": lambda: int(np.median(values)),
        "[SM": lambda: int(np.sum(values)) % 10,
    }[word]()


def depth(words: list[str]) -> int:
    return 1 + max(itertools.accumulate((w.startswith("[")) - (w == "]") for w in words))


@pytest.mark.parametrize("task", [SMALL, ListOps(train_items=1, dev_items=1, test_items=60)])
def test_labels_are_what_another_evaluator_says(task: ListOps) -> None:
    items = task.items("test")
    for row, label, length in zip(items.rows, items.labels, items.lengths, strict=True):
        words = text_of(row).split()
        assert len(words) == length == len(row)
        assert task.min_length < len(words) < task.max_length
        assert depth(words) <= task.max_depth
        rest = list(words)
        assert evaluate(rest) == label
        assert rest == []


def test_a_hand_written_expression() -> None:
    # [MAX 2 9 [MIN 4 7 ] 0 ] = 9; the numbers below are those that draw it
    numbers = iter([0.1, 0.3, 0.3, *(0.9, 0.25), *(0.9, 0.95), *(0.1, 0.0, 0.0, 0.9, 0.45, 0.9, 0.75), *(0.9, 0.05)])
    found = draw(lambda: next(numbers), 10, 10, 2000)
    assert found is not None
    assert text_of(np.frombuffer(found[0], np.uint8)) == "[MAX 2 9 [MIN 4 7 ] 0 ]"
    assert found[1] == 9


def test_the_tree_follows_the_published_probabilities() -> None:
    stream = random.Random(0)
    drawn = [draw(stream.random, 2, 10, 2000) for _ in range(8000)]
    rows = [found[0] for found in drawn if found is not None]
    assert len(rows) == 8000
    trees = [row for row in rows if len(row) > 1]
    assert len(trees) / 8000 == pytest.approx(0.25, abs=0.02)
    assert statistics.mean(len(row) - 2 for row in trees) == pytest.approx(6.0, abs=0.2)
    assert {len(row) - 2 for row in trees} == set(range(2, 11))
    for operator in range(4):
        assert sum(row[0] == OPERATOR + operator for row in trees) / len(trees) == pytest.approx(0.25, abs=0.04)
    digits = np.frombuffer(b"".join(rows), np.uint8)
    counts = np.bincount(digits[digits < OPERATOR] - DIGIT, minlength=10)
    assert counts / counts.sum() == pytest.approx(np.full(10, 0.1), abs=0.01)


def test_nothing_occurs_twice_and_seeds_repeat() -> None:
    again = ListOps(**SMALL.to_json())
    rows = {split: [bytes(row) for row in SMALL.items(split).rows] for split in ("train", "dev", "test")}
    assert rows["train"] == [bytes(row) for row in again.items("train").rows]
    everything = [row for part in rows.values() for row in part]
    assert len(set(everything)) == len(everything) == 200
    other = ListOps(**{**SMALL.to_json(), "seed": 1})
    assert [bytes(row) for row in other.items("test").rows] != rows["test"]
    more = ListOps(**{**SMALL.to_json(), "train_items": 121, "dev_items": 41})
    assert [bytes(row) for row in more.items("test").rows] == rows["test"]
    assert other.data_revision() != SMALL.data_revision() == again.data_revision()


def test_batches_and_records(bag: Any) -> None:
    batch = next(iter(SMALL.batches("train", 8, 0)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    assert ((batch["input_ids"] > 0) == (batch["attention_mask"] == 1)).all()
    assert batch["input_ids"].max() == CLOSE < SMALL.spec.vocabulary_size
    records = SMALL.records(bag(10), "dev")
    assert [record.label for record in records] == [str(label) for label in SMALL.items("dev").labels]
    assert 0 <= SMALL.score(records)["accuracy"] <= 100


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_length = 500: must be below 12, the longest at this depth"):
        ListOps(max_depth=2)
    with pytest.raises(ConfigError, match="max_args"):
        ListOps(max_args=1)
    with pytest.raises(ConfigError, match="min_length"):
        ListOps(min_length=1999)
    tiny = ListOps(max_depth=1, min_length=0, max_length=4, train_items=9, dev_items=1, test_items=1)
    with pytest.raises(DataError, match="found only 8 of 9 different expressions"):
        tiny.size("train")

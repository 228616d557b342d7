from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pareto_core import DataError, ModelError, Split, TaskSpec
from pareto_sequence.tasks import base
from pareto_sequence.tasks.base import Inputs, Items, SequenceClassification, bounded, held_out, padded

ROWS = [np.arange(1, 2 + n % 5) for n in range(11)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(SequenceClassification):
    """Eleven rows of one to five tokens."""

    name: ClassVar[str] = "test.counting"
    inputs: ClassVar[Inputs] = "tokens"

    empty: bool = False
    two: bool = False

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(("a", "b", "c"), 6, 5)

    def read(self, split: Split) -> Items:
        rows = [] if self.empty else ROWS
        second = [row[::-1] for row in rows[::-1]] if self.two else None
        labels = np.array([len(row) % 3 for row in rows])
        return Items(rows, labels, np.array([len(row) for row in rows]), second)


def test_rows_are_padded_to_the_longest_of_the_batch() -> None:
    batch = padded([np.array([3, 4, 5]), np.array([7], np.int16)])
    assert batch["input_ids"].tolist() == [[3, 4, 5], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].dtype == torch.int64


def test_an_epoch_has_every_item_once_and_repeats_by_its_seed() -> None:
    task = Counting()
    epochs = [list(task.batches("train", 4, seed)) for seed in (0, 0, 1)]
    assert [len(batch["labels"]) for batch in epochs[0]] == [4, 4]
    same = [torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(epochs[0], epochs[1], strict=True)]
    assert all(same)
    other = [a["input_ids"].tolist() == b["input_ids"].tolist() for a, b in zip(epochs[0], epochs[2], strict=True)]
    assert not all(other)
    whole = torch.cat([batch["labels"] for batch in task.batches("train", 1, 5)])
    assert sorted(whole.tolist()) == sorted(len(row) % 3 for row in ROWS)
    assert [len(batch["labels"]) for batch in task.batches("dev", 4, 0)] == [4, 4, 3]


def test_records_are_those_of_single_items_whatever_shares_a_batch(bag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for two in (False, True):
        task, model = Counting(two=two), bag(3)
        whole = task.records(model, "test")
        assert len(model.rows) == 1
        monkeypatch.setattr(base, "POSITIONS", 6)
        parts = task.records(model, "test")
        assert max(model.rows[1:]) <= 6
        monkeypatch.undo()
        assert [record.id for record in whole] == [f"test:{n}" for n in range(11)]
        for one, other, row in zip(whole, parts, ROWS, strict=True):
            assert (one.prediction, one.label) == (other.prediction, other.label)
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-6)
            assert one.label == "abc"[len(row) % 3]


def test_the_pair_reaches_the_model(bag: Any) -> None:
    batch = next(iter(Counting(two=True).batches("test", 3, 0)))
    assert batch["input_ids_2"].tolist() == [[1, 0, 0, 0, 0], [5, 4, 3, 2, 1], [4, 3, 2, 1, 0]]
    assert batch["attention_mask_2"].sum(1).tolist() == [1, 5, 4]
    assert set(Counting(two=True).requests()["forward"].inputs) == set(batch) - {"labels"}


def test_scores_by_hand() -> None:
    from pareto_core import Record

    records = [Record("0", "a", "a"), Record("1", "b", "a"), Record("2", "c", "c"), Record("3", "c", "b")]
    assert Counting().score(records) == {"accuracy": 50.0, "majority_accuracy": 50.0}
    with pytest.raises(DataError, match="no records"):
        Counting().score([])


def test_requests_have_the_median_length() -> None:
    requests = Counting().requests()
    assert requests["forward"].inputs["input_ids"].shape == (1, 3)
    assert requests["forward_batch"].inputs["input_ids"].shape == (8, 5)
    assert requests["forward_batch"].batch_size == 8


@pytest.mark.parametrize("positions", [1, 7, 40, 10_000])
def test_runs_cover_all_items_within_the_bound(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "POSITIONS", positions)
    lengths = np.array([len(row) for row in ROWS])
    runs = list(bounded(lengths))
    assert sorted(i for run in runs for i in run) == list(range(11))
    assert all(len(run) == 1 or len(run) * lengths[run].max() <= positions for run in runs)


def test_held_out_parts_are_apart_and_repeatable() -> None:
    rest, out = held_out(100, 0.1, 3)
    assert len(out) == 10
    assert sorted([*rest, *out]) == list(range(100))
    assert np.array_equal(out, held_out(100, 0.1, 3)[1])
    assert not np.array_equal(out, held_out(100, 0.1, 4)[1])
    assert [len(part) for part in held_out(2, 0.1, 0)] == [1, 1]
    with pytest.raises(DataError, match="cannot be split"):
        held_out(1, 0.1, 0)


def test_what_cannot_be_used_is_refused(bag: Any) -> None:
    with pytest.raises(DataError, match=r"test\.counting: the dev split is empty"):
        Counting(empty=True).size("dev")
    with pytest.raises(DataError, match="11 training items do not fill one batch of 12"):
        next(iter(Counting().batches("train", 12, 0)))
    model = bag(3)
    with torch.no_grad():
        model.weight[0] = torch.nan
    with pytest.raises(ModelError, match=r"item test:\d+ is nan"):
        Counting().records(model, "test")

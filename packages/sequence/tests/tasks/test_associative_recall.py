from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pareto_core import ConfigError, DataError, ModelError
from pareto_sequence.tasks.associative_recall import AssociativeRecall, mqar, safari

SAFARI = AssociativeRecall(train_items=300, dev_items=50, test_items=50)
MQAR = AssociativeRecall(
    rule="mqar", vocabulary=64, length=48, pairs=6, train_items=300, dev_items=50, test_items=50, seed=3
)


def look_up(ids: list[int], asked: int, pairs: int) -> int:
    """The value that follows ``asked`` in the first ``pairs`` pairs; 0 where it is not there."""
    found = {ids[2 * i]: ids[2 * i + 1] for i in range(pairs)}
    return found.get(asked, 0)


class Remembers:
    """Answers by looking the key up in the pairs; ``wrong`` answers something else."""

    def __init__(self, task: AssociativeRecall, wrong: bool = False) -> None:
        self.pairs = task.pairs if task.rule == "mqar" else task.length // 2
        self.vocabulary, self.wrong = task.vocabulary, wrong

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for number, row in enumerate(input_ids.tolist()):
            for place, token in enumerate(row):
                answer = look_up(row, token, self.pairs)
                logits[number, place, (answer + self.wrong) % self.vocabulary] = 30.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("vocabulary", "length"), [(6, 2), (10, 64), (11, 30), (20, 64)])
def test_safari_follows_its_rule(vocabulary: int, length: int) -> None:
    ids, labels = safari(np.random.default_rng(0), 200, vocabulary, length)
    keys = (vocabulary - 2) // 2
    assert ids.shape == labels.shape == (200, length + 3)
    assert (labels[:, :-1] == -100).all()
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        assert all(1 <= token <= keys for token in row[0:length:2])
        assert all(keys < token < vocabulary - 1 for token in row[1:length:2])
        values: dict[int, set[int]] = {}
        for key, value in zip(row[0:length:2], row[1:length:2], strict=True):
            values.setdefault(key, set()).add(value)
        assert all(len(found) == 1 for found in values.values())
        assert row[length] == vocabulary - 1
        assert row[length + 1] in values
        assert label[-1] == row[-1] == look_up(row, row[length + 1], length // 2) != 0


def test_safari_draws_keys_and_values_alike() -> None:
    ids, labels = safari(np.random.default_rng(1), 20_000, 10, 4)
    for tokens in (ids[:, 0:4:2], ids[:, 5]):
        assert np.bincount(tokens.ravel(), minlength=5)[1:5] / tokens.size == pytest.approx(np.full(4, 0.25), abs=0.02)
    assert np.bincount(labels[:, -1], minlength=9)[5:9] / 20_000 == pytest.approx(np.full(4, 0.25), abs=0.02)
    # Of two different keys, the first and the second are asked for as often.
    different = ids[:, 0] != ids[:, 2]
    assert (ids[different, 5] == ids[different, 0]).mean() == pytest.approx(0.5, abs=0.02)


def test_a_key_that_was_not_there_where_that_is_allowed() -> None:
    ids, labels = safari(np.random.default_rng(2), 2000, 10, 4, allow_dot=True)
    absent = (ids[:, 5] != ids[:, 0]) & (ids[:, 5] != ids[:, 2])
    assert absent.mean() == pytest.approx(0.75**2, abs=0.04)
    assert ((labels[:, -1] == 0) == absent).all()


@pytest.mark.parametrize(("vocabulary", "length", "pairs"), [(64, 48, 6), (19, 32, 8), (6, 4, 1)])
def test_mqar_follows_its_rule(vocabulary: int, length: int, pairs: int) -> None:
    ids, labels = mqar(np.random.default_rng(0), 200, vocabulary, length, pairs, 0.01)
    assert ids.shape == labels.shape == (200, length)
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in zip(keys, values, strict=True))
        asked = [place - 1 for place in range(length) if label[place] != -100]
        assert sorted(row[place] for place in asked) == sorted(keys)
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        assert all(label[place + 1] == look_up(row, row[place], pairs) for place in asked)


def test_mqar_gaps_follow_the_power_law() -> None:
    _, labels = mqar(np.random.default_rng(0), 40_000, 16, 20, 1, 0.01)
    counts = np.bincount((labels != -100).argmax(1), minlength=20)[3::2]
    expected = np.arange(1, 10) ** -0.99
    assert counts / counts.sum() == pytest.approx(expected / expected.sum(), abs=0.01)


@pytest.mark.parametrize("task", [SAFARI, MQAR])
def test_looking_up_is_right_and_anything_else_wrong(task: AssociativeRecall) -> None:
    records = task.records(Remembers(task), "test")
    assert [record.id for record in records] == [f"test:{n}" for n in range(50)]
    assert task.score(records) == {"accuracy": 100.0}
    assert all(record.prediction == record.label for record in records)
    assert [record.log_probability for record in records] == pytest.approx([0.0] * 50, abs=1e-3)
    wrong = task.records(Remembers(task, wrong=True), "test")
    assert task.score(wrong) == {"accuracy": 0.0}
    half = [*records[:25], *wrong[25:]]
    assert task.score(half) == {"accuracy": 50.0}


@pytest.mark.parametrize("task", [SAFARI, MQAR])
def test_a_model_s_own_shift_scores_the_answer(task: AssociativeRecall) -> None:
    batch = next(iter(task.batches("dev", 50, 0)))
    logits = Remembers(task)(batch["input_ids"], batch["attention_mask"]).logits
    shifted = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])
    assert float(shifted) == pytest.approx(0.0, abs=1e-3)
    scored = (batch["labels"] != -100).sum(1)
    assert (scored == (1 if task.rule == "safari" else task.pairs)).all()


def test_what_trains_is_every_next_token_or_the_answer() -> None:
    batch = next(iter(SAFARI.batches("train", 8, 0)))
    assert (batch["labels"][:, 0] == -100).all()
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])
    final = AssociativeRecall(**{**SAFARI.to_json(), "train_labels": "final"})
    other = next(iter(final.batches("train", 8, 0)))
    assert torch.equal(other["input_ids"], batch["input_ids"])
    assert (other["labels"][:, :-1] == -100).all()
    assert torch.equal(other["labels"][:, -1], other["input_ids"][:, -1])


@pytest.mark.parametrize("task", [SAFARI, MQAR])
def test_examples_differ_and_repeat_by_their_seed(task: AssociativeRecall) -> None:
    rows = [row.tobytes() for split in ("train", "dev", "test") for row in task.examples(split)[0]]
    assert len(set(rows)) == len(rows) == 400
    again, other = (AssociativeRecall(**{**task.to_json(), "seed": task.seed + n}) for n in (0, 1))
    assert np.array_equal(again.examples("train")[0], task.examples("train")[0])
    assert not np.array_equal(other.examples("train")[0], task.examples("train")[0])
    assert again.data_revision() == task.data_revision() != other.data_revision()
    more = AssociativeRecall(**{**task.to_json(), "train_items": 301})
    assert np.array_equal(more.examples("test")[0], task.examples("test")[0])
    first, second = (torch.cat([b["input_ids"] for b in task.batches("train", 32, seed)]) for seed in (0, 1))
    assert len(first) == 288
    assert not torch.equal(first, second)


def test_requests_end_where_the_answer_is_asked_for() -> None:
    inputs = SAFARI.requests()["forward"].inputs
    assert inputs["input_ids"].shape == (1, 66)
    assert inputs["input_ids"][0].tolist() == SAFARI.examples("test")[0][0, :66].tolist()
    assert MQAR.requests()["forward_batch"].inputs["input_ids"].shape == (8, 48)
    assert (SAFARI.spec.max_length, MQAR.spec.max_length) == (67, 48)


def test_what_does_not_go_together_is_refused() -> None:
    for fields, field in [
        ({"length": 63}, "length"),
        ({"vocabulary": 5}, "vocabulary"),
        ({"rule": "mqar", "vocabulary": 17}, "vocabulary"),
        ({"rule": "mqar", "vocabulary": 64, "length": 30}, "pairs"),
        ({"rule": "mqar", "vocabulary": 64, "train_labels": "final"}, "train_labels"),
        ({"rule": "mqar", "vocabulary": 64, "allow_dot": True}, "allow_dot"),
    ]:
        with pytest.raises(ConfigError) as caught:
            AssociativeRecall.from_json(fields)
        assert caught.value.field == field
    # Two keys and two values: 2 · 2 pairs, then a key that was there and its value.
    few = AssociativeRecall(vocabulary=6, length=2, train_items=1, dev_items=1, test_items=5)
    with pytest.raises(DataError, match="no more than 4 of 5 different examples for test"):
        few.examples("test")
    with pytest.raises(DataError, match="do not fill one batch"):
        next(iter(SAFARI.batches("train", 301, 0)))
    with pytest.raises(DataError, match="no records"):
        SAFARI.score([])
    broken = SimpleNamespace(logits=torch.full((50, 67, 10), torch.nan))
    with pytest.raises(ModelError, match="item test:0 is nan"):
        SAFARI.records(lambda **_: broken, "test")

"""The training loop: rates and batches by hand, batches after an interruption, bad losses, the best weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from pareto_core import Batch, Budget, DataError, Split, Training, TrainingError
from pareto_core.testing import TinyTask
from pareto_runner import train as t
from pareto_runner.engines import TorchLoop

STEPS = 6


def training(**changes: Any) -> Training:
    values: dict[str, Any] = {
        "learning_rate": 1e-2,
        "batch_size": 16,
        "budget": Budget(max_steps=STEPS),
        "warmup_steps": 2,
        "weight_decay": 0.1,
    }
    return Training(**{**values, **changes})


def built() -> Any:
    return TinyTask().backbone()


def test_rates_rise_linearly_then_fall() -> None:
    settings = training()
    assert [t.rate_factor(s, STEPS, settings) for s in range(1, 7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    constant = training(schedule="constant", warmup_steps=0)
    assert {t.rate_factor(s, STEPS, constant) for s in range(1, 7)} == {1.0}
    assert t.rate_factor(1, STEPS, training(warmup_steps=0)) == 1.0


def test_the_first_limit_of_the_budget_counts() -> None:
    assert t.step_counts(64, training(budget=Budget(epochs=1.5))) == (4, 6)
    assert t.step_counts(64, training(budget=Budget(epochs=10.0, max_steps=7))) == (4, 7)


def test_epochs_are_shuffled_differently_and_reproducibly() -> None:
    task = TinyTask()
    once = [b["input_ids"] for b in t.batch_stream(task, 16, 0, 8)]
    again = [b["input_ids"] for b in t.batch_stream(task, 16, 0, 8)]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], once[4])
    first, second = torch.cat(once[:4]), torch.cat(once[4:])
    assert sorted(first.tolist()) == sorted(second.tolist())


@pytest.mark.parametrize("taken", [0, 3, 4, 9, 12])
def test_batches_that_were_taken_are_passed_over(taken: int) -> None:
    task = TinyTask()
    whole = [b["input_ids"] for b in t.batch_stream(task, 16, 2, 12)]
    rest = [b["input_ids"] for b in t.batch_stream(task, 16, 2, 12, taken)]
    assert len(rest) == 12 - taken
    assert all(torch.equal(a, b) for a, b in zip(whole[taken:], rest, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(TinyTask):
    """Notes which epochs were asked for, by their seeds."""

    asked: ClassVar[list[int]] = []

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        self.asked.append(seed)
        return super().batches(split, batch_size, seed)


def test_whole_epochs_are_passed_over_without_a_look_at_them() -> None:
    list(t.batch_stream(Counting(), 16, 0, 400, taken=398))
    assert Counting.asked == [99]


def test_a_split_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(DataError, match="8 training items do not fill one batch of 16"):
        t.batch_stream(TinyTask(items=8), 16, 0, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned(TinyTask):
    """Has a model whose loss is not a number from the third batch on."""

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        for number, batch in enumerate(super().batches(split, batch_size, seed)):
            yield {**batch, "labels": batch["labels"].float() * (float("nan") if number >= 2 else 1.0)}


def test_a_loss_that_is_no_number_ends_training_with_advice() -> None:
    settings = training()
    model = built()
    model.config.problem_type = "regression"
    model.num_labels = 1
    model.classifier = torch.nn.Linear(48, 1)
    loop = TorchLoop(model, settings, "fp32", "cpu")
    with pytest.raises(TrainingError, match=r"step 3 of 6.*learning_rate"):
        t.train(loop, model, Poisoned(), (), settings, 0, lambda *_: None)


def test_the_best_weights_come_back() -> None:
    settings = training(select="best", budget=Budget(epochs=4.0), learning_rate=0.5, warmup_steps=0)
    model = built()
    loop = TorchLoop(model, settings, "fp32", "cpu")
    task = TinyTask()
    seen: list[float] = []
    best = t.BestWeights(model, task)
    for step, batch in enumerate(t.batch_stream(task, 16, 0, 16), start=1):
        loop.step(batch, 0.05)
        if step % 4 == 0:
            best.consider(loop.edit)
            seen.append(task.score(task.records(model.eval(), "dev"))["accuracy"])
            model.train()
    best.restore(loop.edit)
    assert task.score(task.records(model.eval(), "dev"))["accuracy"] == max(seen)

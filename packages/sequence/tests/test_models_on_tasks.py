"""Models take the tasks' batches as they are, and learn from them."""

import importlib.util
import itertools
from typing import Any

import pytest
import torch

from pareto_sequence.configuration import MIXERS, SequenceConfig
from pareto_sequence.modeling import SequenceForCausalLM, SequenceForSequenceClassification
from pareto_sequence.tasks.associative_recall import AssociativeRecall
from pareto_sequence.tasks.base import SequenceTask
from pareto_sequence.tasks.digits import Digits
from pareto_sequence.tasks.listops import ListOps
from pareto_sequence.tasks.pathfinder import Pathfinder

COUNTS = {"train_items": 16, "dev_items": 4, "test_items": 6}


def model_for(task: SequenceTask, mixer: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "value_size": 24,
        "ffn_size": 24,
        "shared_size": 8,
        "num_layers": 1,
        "chunk_size": 16,
        "state_size": 4,
        "kernel_size": 5,
        "dilation_factor": 3,
        "tcn_depth": 2,
        "mixer": mixer,
        "inputs": task.inputs,
        "causal": task.causal,
        "vocab_size": max(1, task.spec.vocabulary_size),
    }
    if task.causal:
        return SequenceForCausalLM(SequenceConfig(**(sizes | changes)))
    return SequenceForSequenceClassification(SequenceConfig(num_labels=len(task.spec.labels), **(sizes | changes)))


def tasks() -> list[SequenceTask]:
    found: list[SequenceTask] = [
        AssociativeRecall(length=20, **COUNTS),
        AssociativeRecall(rule="mqar", length=32, vocabulary=20, pairs=4, **COUNTS),
        ListOps(min_length=10, max_length=60, max_depth=4, **COUNTS),
        Pathfinder(**COUNTS),
    ]
    return found + ([Digits()] if importlib.util.find_spec("sklearn") else [])


@pytest.mark.parametrize(("task", "mixer"), itertools.product(tasks(), MIXERS), ids=lambda value: str(value)[:24])
def test_a_tasks_batches_records_and_requests(task: SequenceTask, mixer: str) -> None:
    model = model_for(task, mixer)
    batch = next(iter(task.batches("train", 4, 0)))
    loss = model.train()(**batch).loss
    loss.backward()
    assert loss.isfinite()
    if task.size("test") < 10:
        scores = task.score(task.records(model.eval(), "test"))
        assert task.primary_metric.name in scores
    for request in task.requests().values():
        if request.kind == "forward" and request.batch_size == 1:
            assert model.eval()(**request.inputs).logits.isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_learns_one_batch_by_heart(mixer: str) -> None:
    task = ListOps(min_length=10, max_length=40, max_depth=4, **COUNTS)
    model = model_for(task, mixer, hidden_size=32).train()
    batch = next(iter(task.batches("train", 16, 0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    accuracy = (model.eval()(**batch).logits.argmax(-1) == batch["labels"]).float().mean()
    assert accuracy >= 0.9

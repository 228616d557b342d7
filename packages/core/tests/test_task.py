from __future__ import annotations

import pytest
import torch
from torch import nn

from pareto_core import Metric, Record, Request, Task, UnsupportedError
from pareto_core.testing import TinyTask


def test_batch_size_is_the_first_dimension() -> None:
    assert Request("forward", {"x": torch.zeros(3, 5), "y": torch.zeros(3)}).batch_size == 3


def test_what_a_task_does_not_define_is_named() -> None:
    task = Task()
    for call in (
        lambda: task.spec,
        task.backbone,
        lambda: task.size("test"),
        lambda: task.batches("test", 1, 0),
        lambda: task.records(None, "test"),
        lambda: task.score([]),
    ):
        with pytest.raises(TypeError, match="Task must define"):
            call()
    assert task.requests() == {}
    assert task.data_revision() == {}


def test_labels_of_another_run_are_refused_by_default() -> None:
    with pytest.raises(UnsupportedError, match=r"task core\.tiny cannot take its labels from another run"):
        TinyTask().relabel([Record("0", "yes")])


def test_frozen_backbone_and_metric() -> None:
    task = TinyTask()
    model = task.frozen_backbone()
    assert isinstance(model, nn.Module)
    assert not any(p.requires_grad for p in model.parameters())
    assert task.primary_metric == Metric("accuracy", "%", True)

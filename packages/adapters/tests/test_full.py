from __future__ import annotations

import pytest

from pareto_adapters import FullFineTuning
from pareto_core import ModelError
from pareto_core.testing import TinyTask


def test_trains_everything():
    task = TinyTask()
    model = FullFineTuning().build(task, task.frozen_backbone())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert FullFineTuning().finish(model, task) is model


def test_weights_that_are_not_numbers_are_refused():
    task = TinyTask()
    start = task.backbone()
    start.classifier.bias.data[0] = float("inf")
    with pytest.raises(ModelError, match=r"classifier\.bias holds NaN or infinite"):
        FullFineTuning().build(task, start)

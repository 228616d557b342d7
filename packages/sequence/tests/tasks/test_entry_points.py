from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path

import pytest

from pareto_core import ConfigError
from pareto_sequence.tasks.base import SequenceTask

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
ENTRIES = PROJECT["entry-points"]["pareto.tasks"]


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_entry_point_is_a_task_of_that_name_with_defaults(name: str) -> None:
    module, _, attribute = ENTRIES[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    assert issubclass(cls, SequenceTask)
    assert cls.name == name
    task = cls()
    assert cls.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert task.backbone() is None
    assert task.frozen_backbone() is None
    assert task.inputs in ("tokens", "values", "pairs")
    assert (task.spec.vocabulary_size == 0) == (task.inputs == "values")
    assert (task.spec.labels == ()) == task.causal
    assert task.spec.max_length > 0
    for field in [*cls.field_names(), "no_such_field"]:
        with pytest.raises(ConfigError) as caught:
            cls.from_json({**task.to_json(), field: object()})
        assert caught.value.field == field


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_numbers_out_of_range_are_refused_by_field(name: str) -> None:
    module, _, attribute = ENTRIES[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    numbers = [field for field, value in cls().to_json().items() if type(value) in (int, float)]
    assert numbers
    for field in numbers:
        with pytest.raises(ConfigError) as caught:
            cls.from_json({field: -1})
        assert caught.value.field == field

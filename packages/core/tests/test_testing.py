"""The conformance suite passes a correct method and fails each planted defect."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import pytest
import torch
from torch import nn

from pareto_core import Edit, Method, Paper, Task
from pareto_core.testing import TinyTask, check_config, check_method, entry_point_methods
from pareto_core.tiny import Architecture
from pareto_core.weights import unfreeze

PAPER = Paper("A title", "A. Author", 2020, "https://example.org/paper")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Correct: trains the head."""

    paper: ClassVar[Paper | None] = PAPER
    rate: float = 1.0

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        start = self.starting_model(task, model)
        unfreeze(start, task.spec.head)
        return start


class Everything(HeadOnly):
    """Correct: trains all."""

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        return self.starting_model(task, model).requires_grad_(True)


class SaysSomethingElse(Everything):
    """Generates something else than what its logits say, once it was loaded."""

    def load(self, directory: Path) -> Any:
        model = super().load(directory)
        model.generate = lambda input_ids, **settings: input_ids
        return model


class Untrained(HeadOnly):
    """Correct: nothing is trainable, so nothing is trained."""

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        return self.starting_model(task, model)


class Thaws(HeadOnly):
    """Changes the backbone that it left frozen."""

    def after_step(self, model: nn.Module, progress: float, edit: Edit) -> None:
        weight = model.get_parameter("bert.encoder.layer.0.output.dense.weight")
        weight.requires_grad_(True)
        edit.set(weight, edit.get(weight) * 0.9)


class ChangesAtTheEnd(HeadOnly):
    """Claims that finishing is exact, and is not."""

    def finish(self, model: nn.Module, task: Task) -> Any:
        model.get_parameter("classifier.bias").data[0] += 0.01
        return model


class ChangesAndSaysSo(ChangesAtTheEnd):
    """Correct: the outputs change and the class says so."""

    finishes_exactly: ClassVar[bool] = False


class Forgets(HeadOnly):
    """Loses what was trained between save and load."""

    def load(self, directory: Path) -> Any:
        model = super().load(directory)
        nn.init.zeros_(model.classifier.weight)
        return model


class SavesNothing(HeadOnly):
    """Keeps the model in memory instead of on disk."""

    kept: ClassVar[dict[str, Any]] = {}

    def save(self, deployed: Any, directory: Path) -> None:
        self.kept["model"] = deployed

    def load(self, directory: Path) -> Any:
        return self.kept["model"]


class Pickles(HeadOnly):
    """Writes a pickle beside the weights."""

    def save(self, deployed: Any, directory: Path) -> None:
        super().save(deployed, directory)
        torch.save(deployed.state_dict(), directory / "extra.bin")


class NoPaper(HeadOnly):
    """Does not say where it comes from."""

    paper: ClassVar[Paper | None] = None


class AcceptsUnknownFields(HeadOnly):
    """Drops unknown fields silently."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return super().from_json({key: value for key, value in values.items() if key in cls.field_names()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptsAnyValue(HeadOnly):
    """Has a field without a checked type."""

    def __post_init__(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlamesTheWrongField(HeadOnly):
    """Refuses every bad value under one name."""

    other: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", "x" if not isinstance(self.other, int) else self.rate)
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundTripLoses(HeadOnly):
    """Writes only some of its fields."""

    def to_json(self) -> dict[str, Any]:
        return {"rate": 1.0}


class LeavesTheHead(HeadOnly):
    """Trains something else than the task's new head."""

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        start = self.starting_model(task, model)
        unfreeze(start, ("bert.pooler",))
        return start


class Diverges(HeadOnly):
    """Has a loss that is not a number."""

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        start = super().build(task, model)
        start.get_parameter("classifier.bias").data[0] = float("nan")
        return start


class TrainsNothing(HeadOnly):
    """Claims to train, but its loss does not depend on what it trains."""

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        start = super().build(task, model)
        start.register_forward_hook(_cut)
        return start


def _cut(module: nn.Module, inputs: Any, output: Any) -> Any:
    output.loss = output.loss.detach().requires_grad_()
    return output


@pytest.mark.parametrize("method", [HeadOnly(), HeadOnly(rate=2.0), Untrained(), ChangesAndSaysSo()])
def test_correct_methods_pass(method: Method) -> None:
    check_method(method)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_correct_methods_pass_on_every_architecture(architecture: Architecture) -> None:
    check_method(Everything(), TinyTask(architecture=architecture))


def test_what_a_loaded_model_generates_is_compared() -> None:
    with pytest.raises(AssertionError, match="save and load changed what is generated"):
        check_method(SaysSomethingElse(), TinyTask(architecture="gpt2"))


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (Thaws(), "training changed the frozen weight bert.encoder.layer.0.output.dense.weight"),
        (ChangesAtTheEnd(), r"ChangesAtTheEnd.finish changed the outputs by 1.00e-02 \(allowed: 1e-05\)"),
        (Forgets(), "save and load changed the outputs"),
        (SavesNothing(), "save wrote nothing"),
        (Pickles(), "only safetensors and JSON are allowed"),
        (NoPaper(), "NoPaper names no paper"),
        (AcceptsUnknownFields(), "accepts any value for the field no_such_field"),
        (AcceptsAnyValue(), "accepts any value for the field rate"),
        (BlamesTheWrongField(), "BlamesTheWrongField: other refused as rate"),
        (RoundTripLoses(rate=2.0), "JSON round trip changes the config"),
        (LeavesTheHead(), "the task's head classifier is not trained"),
        (Diverges(), "the loss is not finite"),
        (TrainsNothing(), "training changed nothing"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else "",
)
def test_planted_defects_are_found(method: Method, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_method(method)


def test_a_url_is_needed() -> None:
    class NoAddress(HeadOnly):
        paper: ClassVar[Paper | None] = Paper("A title", "A. Author", 2020, "")

    with pytest.raises(AssertionError, match=r"NoAddress\.paper has no URL"):
        check_config(NoAddress())


def test_no_methods_are_registered_by_core() -> None:
    assert entry_point_methods("pareto_core") == []

from __future__ import annotations

import dataclasses
import importlib
import tomllib
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pareto_core import ConfigError, Method, ModelError
from pareto_core.task import Metric, Task, TaskSpec
from pareto_core.testing import check_config, check_method
from pareto_core.tiny import TinyTask
from pareto_sequence._build import CLASSES, SequenceMethod, TCNMethod, nearest
from pareto_sequence.matching import parameter_count
from pareto_sequence.mega import MEGA
from pareto_sequence.tasks.associative_recall import AssociativeRecall
from pareto_sequence.tasks.listops import ListOps
from pareto_sequence.tcn_only import TCNOnly
from pareto_sequence.tcnca import TCNCA
from pareto_sequence.tcncgsha import TCNCGSHA
from pareto_sequence.tcncmha import TCNCMHA
from pareto_sequence.transformer import TransformerBaseline

METHODS = (MEGA, TCNCA, TCNCMHA, TCNCGSHA, TCNOnly, TransformerBaseline)
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(Task):
    """A task that is nothing but a shape: models are built for it, never trained."""

    name: ClassVar[str] = "shape"
    metric: ClassVar[Metric] = Metric("accuracy")
    inputs: ClassVar[str] = "tokens"

    causal: bool = True
    labels: int = 0
    vocabulary: int = 256
    length: int = 8192

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(tuple(map(str, range(self.labels))), self.vocabulary, self.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values(Shape):
    inputs: ClassVar[str] = "values"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Shape):
    inputs: ClassVar[str] = "pairs"


def small(cls: type[SequenceMethod], **fields) -> SequenceMethod:
    sizes = {"num_layers": 2, "hidden_size": 16, "ffn_size": 24, "dropout": 0.0}
    own = {"value_size": 24, "shared_size": 8, "chunk_size": 8, "state_size": 4}
    tcn = {"kernel_size": 3, "dilation_factor": 2, "tcn_depth": 2}
    heads = {"num_heads": 4} if cls is TransformerBaseline else {}
    known = {name: value for name, value in {**own, **tcn}.items() if name in cls.field_names()}
    return cls(**{**sizes, **known, **heads, **fields})


def recall() -> AssociativeRecall:
    return AssociativeRecall(vocabulary=10, length=12, train_items=32, dev_items=8, test_items=8)


def listops() -> ListOps:
    sizes = {"train_items": 32, "dev_items": 8, "test_items": 8}
    return ListOps(max_depth=3, max_args=3, min_length=3, max_length=24, **sizes)


def test_every_entry_point_is_a_method_that_parameters_can_be_matched_to():
    points = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["pareto.methods"]
    assert points == {name: f"pareto_sequence.{home}" for name, home in CLASSES.items()}
    for place in points.values():
        module, _, name = place.partition(":")
        cls = getattr(importlib.import_module(module), name)
        assert issubclass(cls, Method)
        assert cls in METHODS
        check_config(cls())


@pytest.mark.parametrize("task", [recall, listops])
@pytest.mark.parametrize("cls", METHODS)
def test_conforms_as_language_model_and_as_classifier(cls, task):
    check_method(small(cls), task())


@pytest.mark.parametrize("cls", METHODS)
def test_everything_is_trained_and_drawn_from_the_seed(cls):
    task = recall()
    torch.manual_seed(3)
    first = small(cls).build(task)
    torch.manual_seed(3)
    second = small(cls).build(task)
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in small(cls, trained=False).build(task).parameters())


@pytest.mark.parametrize("cls", METHODS)
def test_numbers_and_pairs_of_texts_are_classified(cls):
    fields = {"causal": False, "labels": 3, "vocabulary": 9, "length": 12}
    values = small(cls).build(Values(**{**fields, "vocabulary": 0}))
    assert values(input_values=torch.rand(2, 12)).logits.shape == (2, 3)
    pairs = small(cls).build(Pairs(**fields))
    first, second = torch.randint(9, (2, 2, 12))
    assert pairs(input_ids=first, input_ids_2=second).logits.shape == (2, 3)


def test_mega_and_tcnca_have_39_million_parameters_at_the_size_of_enwik8():
    for method in (MEGA(), TCNCA()):
        assert parameter_count(method.configuration(Shape())) == pytest.approx(39e6, rel=0.01)


@pytest.mark.parametrize("task", [Shape(length=64), Shape(causal=False, labels=3, length=64)])
@pytest.mark.parametrize("cls", [MEGA, TCNCMHA, TCNCGSHA, TCNOnly, TransformerBaseline])
def test_parameters_are_matched_by_the_width(cls, task):
    reference = small(TCNCA, hidden_size=64, value_size=128, ffn_size=128, shared_size=32)
    match = {"method": "tcnca", "hidden_size": 64, "value_size": 128, "ffn_size": 128, "shared_size": 32}
    match |= {"chunk_size": 8, "kernel_size": 3, "dilation_factor": 2, "tcn_depth": 2}
    method = small(cls, ffn_size=128, match=match)
    config = method.configuration(task)
    target = parameter_count(reference.configuration(task))
    built = sum(parameter.numel() for parameter in method.build(task).parameters())
    assert built == parameter_count(config) == pytest.approx(target, rel=0.01)
    assert config.hidden_size % method.width_step() == 0


def test_a_single_head_with_a_table_of_biases_takes_any_width():
    """The sizes of ListOps: an even width is off by more than 1 %, and would need another ``ffn_size``."""
    fields = {"num_layers": 6, "hidden_size": 80, "ffn_size": 160, "prenorm": False, "chunk_size": 128}
    fields |= {"bias": "simple", "dilation_factor": 14, "tcn_depth": 2}
    match = {"method": "tcnca", "value_size": 160, "shared_size": 64, "bias": "simple"}
    config = TCNCGSHA(**fields, match=match).configuration(Shape(causal=False, labels=10, vocabulary=16, length=2000))
    assert (config.hidden_size, config.ffn_size) == (107, 160)
    assert TCNCGSHA(bias="rotary").width_step() == 2


def test_what_match_does_not_say_is_as_in_the_method_itself():
    task = Shape(length=64)
    method = small(TCNCGSHA, hidden_size=48, match={"method": "tcnca", "value_size": 96})
    reference = TCNCA(
        **{name: getattr(method, name) for name in method.model_fields() if name in TCNCA.field_names()}, value_size=96
    )
    found = parameter_count(method.configuration(task)) / parameter_count(reference.configuration(task))
    assert found == pytest.approx(1, abs=0.01)


def test_a_match_that_no_width_gives_is_refused():
    tiny = {"method": "tcn_only", "hidden_size": 1, "num_layers": 1, "ffn_size": 1}
    method = small(TCNCMHA, num_layers=4, match=tiny)
    with pytest.raises(ModelError, match=r"TCNCMHA: width 8 with ffn_size 1 comes nearest to .* parameters and is off"):
        method.configuration(Shape(vocabulary=4))


@pytest.mark.parametrize(
    ("match", "reason"),
    [
        ({}, "its key method must be one of"),
        ({"method": "lora"}, "its key method must be one of"),
        ({"method": "tcnca", "hidden": 3}, r"no such field; did you mean 'hidden_size'"),
        ({"method": "tcnca", "value_size": 0}, "value_size = 0: must be at least 1"),
        ({"method": "mega", "match": {"method": "tcnca"}}, "must not be matched itself"),
    ],
)
def test_bad_matches_are_refused(match, reason):
    with pytest.raises(ConfigError, match=reason):
        TCNOnly(match=match)


@pytest.mark.parametrize(
    ("cls", "fields", "reason"),
    [
        (TCNCA, {"num_layers": 0}, "TCNCA.num_layers = 0: must be at least 1"),
        (TCNCA, {"dropout": 1.0}, "dropout = 1.0: must be at least 0 and below 1"),
        (TCNCA, {"kernel_size": 0}, "kernel_size = 0: must be at least 1"),
        (TCNCA, {"attention": "relu"}, "one of 'softmax', 'laplace'"),
        (MEGA, {"state_size": 0}, "MEGA.state_size = 0: must be at least 1"),
        (MEGA, {"chunk_size": 0}, "chunk_size = 0: must be at least 1, or nothing"),
        (MEGA, {"bias": "simple", "evaluation_chunk_size": 4}, "a table of simple biases has its size"),
        (TCNCMHA, {"num_heads": 3}, "num_heads = 3: must divide hidden_size = 512"),
        (TransformerBaseline, {"num_heads": 0}, "num_heads = 0: must be at least 1"),
    ],
)
def test_ranges(cls, fields, reason):
    with pytest.raises(ConfigError, match=reason):
        cls(**fields)


def test_tasks_that_bring_a_backbone_or_no_sequences_are_refused():
    task = TinyTask()
    with pytest.raises(ModelError, match="makes its own model"):
        small(TCNCA).build(task, task.frozen_backbone())
    with pytest.raises(ModelError, match="not a task over sequences"):
        small(TCNCA).build(task)


def test_finishing_with_larger_chunks_keeps_the_weights_and_what_chunks_do_not_decide():
    task = recall()
    method = small(TCNCA, chunk_size=4, evaluation_chunk_size=8)
    torch.manual_seed(0)
    model = method.build(task).eval()
    finished = method.finish(model, task)
    assert (model.config.chunk_size, finished.config.chunk_size) == (4, 8)
    assert not method.finishes_exactly
    tokens = torch.randint(10, (2, 12))
    before, after = model(input_ids=tokens).logits, finished(input_ids=tokens).logits
    torch.testing.assert_close(after[:, :4], before[:, :4])  # the first chunk is the same until its fourth position
    assert not torch.allclose(after[:, 4:], before[:, 4:])
    same = small(TCNCA, chunk_size=8).build(task)
    same.load_state_dict(finished.state_dict())
    torch.testing.assert_close(same.eval()(input_ids=tokens).logits, after)
    exact = small(TCNCA, chunk_size=8, evaluation_chunk_size=8)
    assert exact.finishes_exactly
    assert exact.finish(model, task) is model


@pytest.mark.parametrize("cls", METHODS)
def test_figures_say_how_wide_and_how_far(cls):
    method = small(cls)
    figures = {figure.name: figure.value for figure in method.figures(method.build(recall()))}
    expected = {"hidden_size": 16, "ffn_size": 24}
    if issubclass(cls, TCNMethod):
        expected["receptive_field"] = 1 + 2 * (1 + 2)
    assert figures == expected


def test_nearest_by_hand():
    assert nearest(lambda number: number * number, 50) == 7
    assert nearest(lambda number: number * number, 60) == 8
    assert nearest(lambda number: 10 * number, 1) == 1

"""Whatever stays in a model is in its files, whichever method comes last, in the same stage or in a later one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from pareto_adapters import (
    BitFit,
    Compacter,
    FTTop,
    FullFineTuning,
    Houlsby,
    KronA,
    KronAB,
    LoDA,
    OneShot,
    PrefixTuning,
    RLoDA,
    SLoDA,
    approximation,
)
from pareto_core import DataError, ModelError
from pareto_core.testing import check_method
from pareto_core.tiny import TinyTask
from pareto_core.weights import freeze

STAYING = [LoDA(), SLoDA(), RLoDA(rank=24), Houlsby(), KronAB(), Compacter(reduction_factor=12)]


def changed(model: Any) -> Any:
    """Stands for training: every trainable number is moved."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def check_files(methods: list[Any], model: Any, task: TinyTask, directory: Any) -> Any:
    """Finish, save and load as the runner does; the outputs must stay."""
    batch = next(iter(task.batches("test", 4, 0)))
    expected = model(**batch).logits
    for method in methods:
        model = method.finish(model, task)
    methods[-1].save(model, directory)
    loaded = methods[-1].load(directory)
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=0)
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    return loaded


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
@pytest.mark.parametrize("staying", STAYING, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("other", [BitFit(), FTTop()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("last", ["staying", "other"])
def test_trained_together_either_way_round(tmp_path, architecture, staying, other, last):
    task = TinyTask(architecture=architecture, hidden=96)
    methods = [other, staying] if last == "staying" else [staying, other]
    model = task.frozen_backbone()
    for method in methods:
        model = method.build(task, model)
    check_files(methods, changed(model), task, tmp_path)


@pytest.mark.parametrize("staying", STAYING, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("later", [BitFit(), FTTop(), FullFineTuning()], ids=lambda method: type(method).__name__)
def test_trained_on_in_a_later_stage(tmp_path, staying, later):
    task = TinyTask(architecture="llama", hidden=96)
    first = freeze(staying.finish(changed(staying.build(task)), task))
    loaded = check_files([later], changed(later.build(task, first)), task, tmp_path)
    if isinstance(staying, (SLoDA, RLoDA)):
        assert approximation(loaded) == approximation(first)


def test_a_prefix_that_is_trained_together_with_biases(tmp_path):
    task = TinyTask(architecture="gpt2", hidden=96)
    model = changed(BitFit().build(task, PrefixTuning().build(task)))
    check_files([PrefixTuning(), BitFit()], model, task, tmp_path)


class HalfPrecision(TinyTask):
    """A backbone in bfloat16, beside which PEFT puts adapters in single precision."""

    def backbone(self):
        return super().backbone().bfloat16()


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize(
    "method", [LoDA(), RLoDA(rank=24), KronAB(), KronA()], ids=lambda method: type(method).__name__
)
def test_conforms_on_a_backbone_in_half_precision(method, architecture):
    check_method(method, HalfPrecision(architecture=architecture, hidden=96), tolerance=0.05)


@pytest.mark.parametrize(
    "method", [*STAYING, PrefixTuning(), OneShot(), KronA()], ids=lambda method: type(method).__name__
)
def test_directories_that_hold_no_such_model_are_refused(tmp_path, method):
    with pytest.raises(DataError, match=r"no config\.json in"):
        method.load(tmp_path / "missing")
    task = TinyTask(architecture="gpt2", hidden=96)
    FullFineTuning().save(task.backbone(), tmp_path)
    missing = {
        SLoDA: "approximation.json",
        RLoDA: "approximation.json",
        PrefixTuning: "prefix/adapter_config.json",
        OneShot: "one_shot.json",
    }
    if type(method) is KronA:
        assert type(method.load(tmp_path)) is type(task.backbone())
    else:
        with pytest.raises(DataError, match=re.escape(f"no {missing.get(type(method), 'adapter_config.json')} in")):
            method.load(tmp_path)


def test_several_adapters_at_once_are_not_saved(tmp_path):
    task = TinyTask(architecture="llama", hidden=96)
    model = LoDA().build(task)
    model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(ModelError, match="holds 2 adapters"):
        FullFineTuning().save(model, tmp_path)

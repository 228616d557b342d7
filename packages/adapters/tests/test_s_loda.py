from __future__ import annotations

import copy

import pytest
import torch

from pareto_adapters import SLoDA, SLoDAPlus, approximation, energy_by_share, sparsify_projections
from pareto_adapters.approximate import self_attentions
from pareto_adapters.loda import LoDALayer, LoDAPlusLayer
from pareto_adapters.s_loda import largest
from pareto_core import ConfigError, ModelError
from pareto_core.testing import check_method
from pareto_core.tiny import TinyTask

KINDS = ["t5", "gpt2", "llama", "bert"]


def test_the_largest_by_hand():
    weight = torch.tensor([[1.0, -5.0, 2.0], [0.5, 4.0, -3.0]])
    assert largest(weight, 0.5).tolist() == [[False, True, False], [False, True, True]]
    assert largest(weight, 1.0).all()
    assert largest(weight, 0.25).sum() == round(0.25 * 6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_threshold_over_query_key_and_value(make_model, kind):
    model = make_model(kind)
    for attention in self_attentions(model):
        attention.layers[-1].weight.data *= 3  # so that the parts lose different shares
    before, rest = copy.deepcopy(model), set()
    sparsify_projections(model, 0.3)
    for old, new in zip(self_attentions(before), self_attentions(model), strict=True):
        dense, sparse = old.matrix(), new.matrix()
        kept = sparse != 0
        assert kept.sum() == round(0.3 * dense.numel())
        assert torch.equal(sparse[kept], dense[kept])
        assert dense[~kept].abs().max() <= dense[kept].abs().min()
        rest |= {f"{new.name}.{name}.weight" for name in new.names}
        share = energy_by_share(dense, [0.3]).item()
        assert approximation(model)["energy_by_attention"][new.name] == pytest.approx(share)
    state = before.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key not in rest)
    total = sum(a.matrix().detach().square().sum().item() for a in self_attentions(before))
    left = sum(a.matrix().detach().square().sum().item() for a in self_attentions(model))
    assert approximation(model)["energy"] == pytest.approx(left / total, rel=1e-5)


def test_keeping_all_changes_nothing(make_model, make_batch):
    model = make_model("gpt2").eval()
    before = model(**make_batch("gpt2")).logits
    sparsify_projections(model, 1.0)
    assert torch.equal(model(**make_batch("gpt2")).logits, before)
    assert approximation(model)["energy"] == 1.0


def test_the_meta_device_has_no_energy(make_model):
    with torch.device("meta"):
        model = make_model("llama")
    sparsify_projections(model, 0.5)
    assert approximation(model) == {"kind": "sparse", "size": 0.5}


def test_dtype_is_kept(make_model, make_batch):
    model = make_model("llama").bfloat16()
    sparsify_projections(model, 0.5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(**make_batch("llama")).logits.isfinite().all()


@pytest.mark.parametrize("architecture", ["bert", "t5", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("method", [SLoDA(keep=0.3), SLoDAPlus()])
def test_conforms(architecture, method):
    check_method(method, TinyTask(architecture=architecture))


@pytest.mark.parametrize(("method", "layer"), [(SLoDA(keep=0.5), LoDALayer), (SLoDAPlus(keep=0.5), LoDAPlusLayer)])
def test_the_deployed_model_is_sparse_and_knows_it(tmp_path, method, layer):
    task = TinyTask(architecture="gpt2")
    model = method.build(task)
    assert sum(isinstance(module, layer) for module in model.modules()) == 2
    method.save(method.finish(model, task), tmp_path)
    loaded = method.load(tmp_path)
    for found in (model, loaded):
        assert approximation(found)["size"] == 0.5
        assert 0.5 < approximation(found)["energy"] < 1
    for attention in self_attentions(loaded):
        weight = attention.matrix()
        assert weight.count_nonzero() == round(0.5 * weight.numel())


def test_a_target_that_is_not_there_is_refused_before_the_model_is_changed():
    task = TinyTask()
    start = task.frozen_backbone()
    with pytest.raises(ModelError, match="'w' is not a linear layer"):
        SLoDA(target_modules=("w",)).build(task, start)
    assert not (start.bert.encoder.layer[0].attention.self.query.weight == 0).any()


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1])
def test_bad_fractions_are_refused(make_model, keep):
    for method in (SLoDA, SLoDAPlus):
        with pytest.raises(ConfigError, match=rf"{method.__name__}\.keep = .*above 0 and at most 1"):
            method(keep=keep)
    with pytest.raises(ConfigError, match="keep"):
        sparsify_projections(make_model("bert"), keep)


@pytest.mark.parametrize("keep", ["x", None, [0.5], True, float("nan")])
def test_fractions_that_are_no_numbers_are_refused(make_model, keep):
    with pytest.raises(ConfigError, match=r"sparsify_projections\.keep = .*: must be a number above 0 and at most 1"):
        sparsify_projections(make_model("bert"), keep)

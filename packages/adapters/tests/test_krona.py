from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pareto_adapters import KronA, KronAConfig
from pareto_adapters.krona import KronACell
from pareto_core import ConfigError, ModelError
from pareto_core.testing import TinyTask
from pareto_core.weights import parameter_counts


def test_a_mathematically_equal_delta_for_a_non_square_layer():
    torch.manual_seed(0)
    cell = KronACell(KronAConfig(a_shape=(4, 3), init="normal", scale=2.0), in_features=20, out_features=18).double()
    assert cell.A.shape == (4, 3)
    assert cell.B.shape == (5, 6)
    x, y = torch.randn(7, 20).double(), torch.randn(7, 18).double()
    torch.testing.assert_close(cell(x, y), y + nn.functional.linear(x, cell.delta()))
    assert torch.linalg.matrix_rank(cell.delta()) == 3 * 5


def test_initialisations():
    torch.manual_seed(0)
    kaiming = KronACell(KronAConfig(a_shape=(64, 48)), 768, 768)
    assert not kaiming.B.any()
    assert kaiming.A.abs().max() <= 48**-0.5
    assert kaiming.A.abs().max() > 0.95 * 48**-0.5
    normal = KronACell(KronAConfig(a_shape=(64, 48), init="normal"), 768, 768)
    assert float(normal.A.detach().std()) == pytest.approx(768**-0.5, rel=0.1)
    assert float(normal.B.detach().std()) == pytest.approx(768**-0.5, rel=0.2)


def test_shapes_that_do_not_factor_are_refused_with_shapes_that_do(make_model):
    model = make_model("bert")
    with pytest.raises(ModelError) as caught:
        get_peft_model(model, KronAConfig(a_shape=(5, 4), target_modules=["query"]))
    message = str(caught.value)
    assert "bert.encoder.layer.0.attention.self.query" in message
    assert "m1 must divide 16" in message
    assert "(4, 4)" in message
    assert "krona" not in " ".join(model.state_dict())
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("a_shape", (0, 4)),
        ("a_shape", (4,)),
        ("a_shape", "44"),
        ("a_shape", (4.0, 4)),
        ("a_shape", (True, 4)),
        ("scale", float("nan")),
        ("scale", "1"),
        ("init", "xavier"),
    ],
)
def test_bad_fields_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"KronAConfig\.{field} = "):
        KronAConfig(**{field: value})
    with pytest.raises(ConfigError, match=rf"KronA\.{field}"):
        KronA(**{field: value})


@pytest.mark.parametrize("a_shape", [(32, 24), (24, 32)])
def test_trainable_share_of_t5_base_is_table_4_5s(t5_base, a_shape):
    every = parameter_counts(t5_base)[1]
    assert every == 222_903_552
    adapted = get_peft_model(t5_base, KronAConfig(a_shape=a_shape, target_modules=["q", "v"]))
    trained = parameter_counts(adapted)[0]
    assert trained == 110_592
    assert round(100 * trained / every, 4) == 0.0496
    norms = [p for name, p in adapted.named_parameters() if "layer_norm" in name]
    assert sum(p.numel() for p in norms) == 47_616
    assert round(100 * (trained + 47_616) / every, 4) == 0.0710


def test_the_method_trains_layer_norms_on_request_and_the_head_always():
    task = TinyTask(hidden=96)
    plain = KronA().build(task)
    names = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert {"krona_cell" in name or "classifier" in name for name in names} == {True}
    with_norms = KronA(train_layer_norms=True).build(task)
    more = {name for name, p in with_norms.named_parameters() if p.requires_grad} - names
    assert more
    assert all("LayerNorm" in name for name in more)


def test_the_method_keeps_trainable_what_was_trainable_before():
    task = TinyTask(hidden=96)
    start = task.frozen_backbone()
    start.bert.pooler.dense.bias.requires_grad_(True)
    model = KronA().build(task, start)
    assert start.bert.pooler.dense.bias.requires_grad
    assert not start.bert.pooler.dense.weight.requires_grad
    deployed = KronA().finish(model, task)
    assert type(deployed) is type(start)
    assert set(deployed.state_dict()) == set(task.backbone().state_dict())


def test_the_method_refuses_a_model_that_holds_adapters_and_one_that_holds_none():
    task = TinyTask(hidden=96)
    model = KronA().build(task)
    with pytest.raises(ModelError, match="holds adapters already"):
        KronA().build(task, model)
    with pytest.raises(ModelError, match="holds no adapters"):
        KronA().finish(task.backbone(), task)


def test_default_shape_is_refused_where_it_does_not_fit():
    with pytest.raises(ModelError, match=r"a_shape = \(32, 24\), but m1 must divide 48"):
        KronA().build(TinyTask(hidden=48))

from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from pareto_adapters import KronA, KronAConfig, kron, kron_linear
from pareto_adapters.krona import (
    KronACell,
    add_a_first,
    add_b_first,
    cheaper_order,
    multiplications,
    nearest_shapes,
)
from pareto_core import ConfigError, ModelError
from pareto_core.testing import TinyTask
from pareto_core.weights import parameter_counts

#: (m1, n1, m2, n2), square layers and others, factors of size one and primes among them
SHAPES = [(2, 3, 5, 7), (1, 1, 4, 6), (4, 6, 1, 1), (3, 1, 1, 5), (7, 2, 3, 11), (2, 8, 8, 2), (8, 2, 2, 8)]


def naive(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Element by element from the definition, for one row."""
    (m1, n1), (m2, n2) = a.shape, b.shape
    y = [x.new_zeros(()) for _ in range(n1 * n2)]
    for i, j, k, m in itertools.product(range(m1), range(n1), range(m2), range(n2)):
        y[j * n2 + m] = y[j * n2 + m] + x[i * m2 + k] * a[i, j] * b[k, m]
    return torch.stack(y)


def test_hand_computed():
    a = torch.tensor([[1.0, 2.0]])
    b = torch.tensor([[1.0], [10.0]])
    assert kron(a, b).tolist() == [[1.0, 2.0], [10.0, 20.0]]
    assert kron_linear(torch.tensor([3.0, 5.0]), a, b).tolist() == [53.0, 106.0]


def test_equation_4_2_from_the_left_is_row_major():
    torch.manual_seed(0)
    a, b, x = torch.randn(2, 3).double(), torch.randn(4, 5).double(), torch.randn(15).double()
    torch.testing.assert_close(torch.kron(a, b) @ x, (a @ x.reshape(3, 5) @ b.T).flatten())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("add", [add_a_first, add_b_first])
def test_outputs_and_gradients_equal_the_reference(shape, add):
    torch.manual_seed(0)
    m1, n1, m2, n2 = shape
    a = torch.randn(m1, n1, dtype=torch.float64, requires_grad=True)
    b = torch.randn(m2, n2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, m1 * m2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, n1 * n2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, n1 * n2, dtype=torch.float64)
    ours = add(y, x, a, b, 0.7)
    reference = y + 0.7 * (x @ torch.kron(a, b))
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(kron(a, b), torch.kron(a, b))
    torch.testing.assert_close(kron_linear(x, a, b), x @ torch.kron(a, b))
    torch.testing.assert_close(kron_linear(x[0, 0], a, b), naive(x[0, 0], a, b))
    mine = torch.autograd.grad((ours * weights).sum(), (x, y, a, b))
    theirs = torch.autograd.grad((reference * weights).sum(), (x, y, a, b))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("add", [add_a_first, add_b_first])
def test_gradcheck_and_strided_input(add):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(4, 5, dtype=torch.float64).T[:, :4].requires_grad_(True)
    y = torch.randn(9, 5, dtype=torch.float64).T.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda *args: add(*args, 1.5), (y, x, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close(dtype):
    torch.manual_seed(0)
    a, b, x = torch.randn(6, 4), torch.randn(4, 8), torch.randn(10, 24)
    ours = kron_linear(x.to(dtype), a.to(dtype), b.to(dtype))
    assert ours.dtype == dtype
    error = (ours.float() - x @ torch.kron(a, b)).abs().max() / (x @ torch.kron(a, b)).abs().max()
    assert error < 10 * torch.finfo(dtype).eps


def test_empty_batch():
    assert kron_linear(torch.zeros(0, 6), torch.ones(2, 3), torch.ones(3, 2)).shape == (0, 6)


def test_order_is_the_cheaper_one():
    a_first, b_first = multiplications(2, 384, 384, 2)
    assert b_first == 192 * a_first or a_first == 192 * b_first
    assert cheaper_order(24, 16, 16, 24) is add_a_first
    assert cheaper_order(16, 24, 24, 16) is add_b_first
    for shape in SHAPES:
        a_cost, b_cost = multiplications(*shape)
        assert (cheaper_order(*shape) is add_a_first) == (a_cost <= b_cost)


def test_multiplications_are_those_of_the_two_products():
    m1, n1, m2, n2 = 2, 3, 5, 7
    assert multiplications(m1, n1, m2, n2) == (n1 * m1 * m2 + n1 * m2 * n2, m1 * m2 * n2 + n1 * m1 * n2)


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


def test_nearest_shapes_factor_the_layer_and_start_with_the_same_size():
    found = nearest_shapes((32, 24), 384, 384)
    assert all(384 % m == 0 and 384 % n == 0 for m, n in found)
    assert found[0] == (32, 24)
    assert nearest_shapes((5, 7), 6, 10, count=99)[0] in itertools.product((1, 2, 3, 6), (1, 2, 5, 10))


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


@pytest.fixture
def t5_base():
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        return T5ForConditionalGeneration(config).requires_grad_(False)


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

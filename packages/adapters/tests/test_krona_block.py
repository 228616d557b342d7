from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from pareto_adapters import KronAB, KronABConfig, KronABRes
from pareto_adapters.krona_block import NONLINEARITIES, KronABCell, KronABLayer
from pareto_core import ConfigError, ModelError
from pareto_core.testing import TinyTask
from pareto_core.weights import parameter_counts

FUNCTIONS = {
    "none": lambda h: h,
    "silu": lambda h: h * h.sigmoid(),
    "mish": lambda h: h * (1 + h.exp()).log().tanh(),
    "relu": lambda h: h.clamp(min=0),
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "gelu_new": lambda h: h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2,
}


def random_cell(in_features: int, out_features: int, **options) -> KronABCell:
    torch.manual_seed(0)
    cell = KronABCell(KronABConfig(**{"scale": 0.7, **options}), in_features, out_features).double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    return cell


def reference(cell: KronABCell, config: KronABConfig, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Row by row and module by module, from the definition, with A first."""
    read = y if config.placement == "sequential" else x
    rows = []
    for row, out, source in zip(read.flatten(0, -2), y.flatten(0, -2), x.flatten(0, -2), strict=True):
        if config.residual == "learned":
            out = out + cell.residual * source
        if config.residual == "sigmoid":
            out = out + source / (1 + (-cell.residual).exp())
        for k, (a, b) in enumerate(zip(cell.A, cell.B, strict=True)):
            h = a.T @ row.reshape(a.shape[0], b.shape[0])
            if config.biases == 2:
                h = h + cell.hidden_bias[k]
            h = FUNCTIONS[config.nonlinearity](h)
            out = out + config.scale * ((h @ b).flatten() + cell.bias[k])
        rows.append(out)
    return torch.stack(rows).reshape(y.shape)


def test_hand_computed():
    cell = KronABCell(KronABConfig(a_shape=(1, 2), modules=1, scale=2.0, residual="learned"), 2, 2)
    cell.A.data = torch.tensor([[[1.0, 2.0]]])
    cell.B.data = torch.tensor([[[1.0], [10.0]]])
    cell.bias.data = torch.tensor([[0.5, 0.0]])
    # x (A⊗B) = (53, 106); y + 2·(that + bias) + 1·x
    x, y = torch.tensor([[3.0, 5.0]]), torch.tensor([[100.0, 1000.0]])
    assert cell(x, y).tolist() == [[100 + 2 * 53.5 + 3, 1000 + 2 * 106 + 5]]


def test_without_biases_the_module_is_a_sum_of_kronecker_products():
    config = {"a_shape": (4, 3), "modules": 3}
    cell = random_cell(20, 18, **config)
    x, y = torch.randn(7, 20).double(), torch.randn(7, 18).double()
    product = sum(torch.kron(a, b) for a, b in zip(cell.A, cell.B, strict=True))
    torch.testing.assert_close(cell(x, y), y + 0.7 * (x @ product + cell.bias.sum(0)))


@pytest.mark.parametrize("options", itertools.product((1, 2), (1, 2), FUNCTIONS, ("none", "learned", "sigmoid")))
@pytest.mark.parametrize("a_shape", [(4, 2), (2, 6), (1, 12), (12, 1), (3, 3)])
def test_outputs_and_gradients_equal_the_reference(a_shape, options):
    fields = dict(zip(("modules", "biases", "nonlinearity", "residual"), options, strict=True))
    check_against_reference(12, 12, a_shape=a_shape, **fields)


@pytest.mark.parametrize("fields", [{}, {"biases": 2}, {"nonlinearity": "silu"}])
@pytest.mark.parametrize(("a_shape", "sizes"), [((5, 3), (10, 18)), ((2, 9), (10, 18)), ((1, 7), (3, 7))])
def test_blocks_that_are_not_square(a_shape, sizes, fields):
    check_against_reference(*sizes, a_shape=a_shape, **fields)


@pytest.mark.parametrize("fields", [{}, {"biases": 2, "nonlinearity": "mish"}])
def test_sequential_reads_the_output(fields):
    check_against_reference(12, 12, a_shape=(4, 2), placement="sequential", **fields)
    cell = random_cell(12, 12, a_shape=(4, 2), placement="sequential")
    y = torch.randn(2, 12).double()
    assert torch.equal(cell(torch.randn(2, 5), y), cell(torch.randn(2, 12), y))


def check_against_reference(in_features: int, out_features: int, **options) -> None:
    config = KronABConfig(scale=0.7, **{key: value for key, value in options.items() if key != "scale"})
    cell = random_cell(in_features, out_features, **options)
    x = torch.randn(3, 2, in_features, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, out_features, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(y)
    ours, theirs = cell(x, y), reference(cell, config, x, y)
    torch.testing.assert_close(ours, theirs)
    leaves = [y, *cell.parameters()] + ([x] if config.placement == "parallel" else [])
    mine = torch.autograd.grad((ours * weights).sum(), leaves)
    for one, other in zip(mine, torch.autograd.grad((theirs * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_every_function_of_table_4_9_is_here():
    assert FUNCTIONS.keys() == NONLINEARITIES.keys()
    h = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for name, function in FUNCTIONS.items():
        torch.testing.assert_close(NONLINEARITIES[name]()(h), function(h))


def test_gradcheck_with_strided_input():
    cell = random_cell(6, 6, a_shape=(2, 3))
    x = torch.randn(6, 5, dtype=torch.float64).T.requires_grad_(True)
    y = torch.randn(6, 5, dtype=torch.float64).T.requires_grad_(True)
    assert torch.autograd.gradcheck(cell, (x, y))


def test_an_empty_batch():
    assert random_cell(6, 6, a_shape=(2, 3))(torch.zeros(0, 6).double(), torch.zeros(0, 6).double()).shape == (0, 6)


def test_the_order_is_the_cheaper_one_unless_something_lies_between():
    assert not random_cell(24, 24, a_shape=(2, 12)).a_first
    assert random_cell(24, 24, a_shape=(12, 2)).a_first
    assert random_cell(24, 24, a_shape=(2, 12), biases=2).a_first
    assert random_cell(24, 24, a_shape=(2, 12), nonlinearity="relu").a_first


def test_where_it_starts():
    x, y = torch.randn(5, 12), torch.randn(5, 12)
    for fields in ({}, {"biases": 2}, {"placement": "sequential"}):
        assert torch.equal(KronABCell(KronABConfig(a_shape=(4, 3), **fields), 12, 12)(x, y), y)
    learned = KronABCell(KronABConfig(a_shape=(4, 3), residual="learned"), 12, 12)
    torch.testing.assert_close(learned(x, y), y + x)
    squashed = KronABCell(KronABConfig(a_shape=(4, 3), residual="sigmoid"), 12, 12)
    torch.testing.assert_close(squashed(x, y), y + 0.7310585786300049 * x)
    torch.manual_seed(0)
    cell = KronABCell(KronABConfig(), 768, 768)
    assert not cell.B.any()
    assert not torch.equal(cell.A[0], cell.A[1])
    assert 0.9 * 24**-0.5 < cell.A.abs().max() <= 24**-0.5
    normal = KronABCell(KronABConfig(init="normal"), 768, 768)
    for factor in (normal.A, normal.B):
        assert float(factor.detach().std()) == pytest.approx(768**-0.5, rel=0.15)


@pytest.mark.parametrize(
    ("fields", "count", "share", "with_norms"),
    [
        ({"modules": 1}, 55_296, 0.0248, 0.046),
        ({}, 110_592, 0.0496, 0.071),
        ({"modules": 1, "blocks": ["ffn", "attention"]}, 110_592, 0.0496, 0.071),
        ({"biases": 2}, 138_240, 0.0620, 0.083),
        ({"residual": "learned"}, 110_616, 0.0496, 0.071),
    ],
)
def test_trainable_share_of_t5_base_is_table_4_5s(t5_base, fields, count, share, with_norms):
    model = get_peft_model(t5_base, KronABConfig(**fields))
    assert parameter_counts(model)[0] == count
    norms = sum(p.numel() for name, p in model.named_parameters() if "layer_norm" in name)
    assert round(100 * count / 222_903_552, 4) == share
    assert round(100 * (count + norms) / 222_903_552, 3) == with_norms


def test_shapes_that_do_not_factor_are_refused_with_shapes_that_do(make_model):
    model = make_model("gpt2")
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.mlp' .*m1 must divide 16.*\(4, 4\)"):
        get_peft_model(model, KronABConfig(a_shape=(5, 4)))
    assert not any(isinstance(module, KronABLayer) for module in model.modules())


def test_a_residual_needs_equal_widths():
    model = nn.Sequential()
    model.mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6))
    with pytest.raises(ModelError, match="needs a block whose input is as wide as its output"):
        get_peft_model(model, KronABConfig(a_shape=(2, 2), residual="learned", target_modules=["mlp"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("a_shape", (0, 4)),
        ("a_shape", (4,)),
        ("scale", float("inf")),
        ("init", "zero"),
        ("modules", 0),
        ("modules", 1.5),
        ("biases", 3),
        ("biases", True),
        ("nonlinearity", "tanh"),
    ],
)
def test_bad_fields_are_refused_by_name(field, value):
    for cls in (KronABConfig, KronAB, KronABRes):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{field} = "):
            cls(**{field: value})


def test_bad_residuals_and_blocks_are_refused():
    with pytest.raises(ConfigError, match=r"KronABConfig\.residual = 'tanh': .*none, learned, sigmoid"):
        KronABConfig(residual="tanh")
    with pytest.raises(ConfigError, match=r"KronABConfig\.residual = 'learned': expected one of none"):
        KronABConfig(residual="learned", placement="sequential")
    with pytest.raises(ConfigError, match=r"KronABRes\.residual = 'none'"):
        KronABRes(residual="none")
    with pytest.raises(ConfigError, match=r"KronAB\.blocks"):
        KronAB(blocks=())
    with pytest.raises(ConfigError, match=r"KronAB\.blocks"):
        KronAB(blocks=("layer",))


@pytest.mark.parametrize(
    "method",
    [
        KronAB(blocks=("ffn", "attention"), modules=1, scale=1.0, placement="sequential", nonlinearity="silu"),
        KronAB(biases=2, init="normal", scale=0.1),
        KronABRes(residual="sigmoid"),
    ],
)
def test_the_fields_of_a_method_reach_its_adapters(method):
    model = method.build(TinyTask(hidden=96))
    (config,) = model.peft_config.values()
    for field in method.to_json().keys() & vars(config).keys():
        assert getattr(config, field) == getattr(method, field) or list(getattr(method, field)) == config.blocks
    layers = [module for module in model.modules() if isinstance(module, KronABLayer)]
    assert len(layers) == 2 * len(method.blocks)
    assert {len(layer.cells["default"].A) for layer in layers} == {method.modules}


def test_the_head_is_trained_and_layer_norms_on_request():
    task = TinyTask(hidden=96)
    plain = {name for name, p in KronABRes().build(task).named_parameters() if p.requires_grad}
    assert all("kronablock_cell" in name or "classifier" in name for name in plain)
    more = KronABRes(train_layer_norms=True).build(task).named_parameters()
    assert {
        name.rpartition(".")[0].rpartition(".")[2] for name, p in more if p.requires_grad and name not in plain
    } == {"LayerNorm"}


def test_a_model_that_holds_adapters_is_refused():
    task = TinyTask(hidden=96)
    with pytest.raises(ModelError, match="holds adapters already"):
        KronABRes().build(task, KronAB().finish(KronAB().build(task), task))


def test_silu_between_the_factors_is_torchs():
    cell = random_cell(12, 12, a_shape=(4, 3), modules=1, nonlinearity="silu")
    x, y = torch.randn(1, 12).double(), torch.zeros(1, 12).double()
    expected = 0.7 * ((F.silu(cell.A[0].T @ x.reshape(4, 3)) @ cell.B[0]).flatten() + cell.bias[0])
    torch.testing.assert_close(cell(x, y)[0], expected)

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pareto_adapters import Houlsby, HoulsbyConfig
from pareto_adapters.houlsby import HoulsbyCell
from pareto_core import ConfigError
from pareto_core.testing import TinyTask
from pareto_core.weights import parameter_counts


def gelu(h: torch.Tensor) -> torch.Tensor:
    return h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2


def test_hand_computed():
    cell = HoulsbyCell(HoulsbyConfig(r=1), 2, 2)
    cell.down.weight.data, cell.down.bias.data = torch.tensor([[1.0, -1.0]]), torch.tensor([0.5])
    cell.up.weight.data, cell.up.bias.data = torch.tensor([[2.0], [0.0]]), torch.tensor([0.0, 3.0])
    # down(y) = 4 - 3.5 + 0.5 = 1, whose GELU in tanh form is 0.8411919906
    out = cell(torch.zeros(1, 2), torch.tensor([[4.0, 3.5]]))
    torch.testing.assert_close(out, torch.tensor([[4 + 2 * 0.8411919906, 3.5 + 3.0]]))


def test_outputs_and_gradients_equal_the_reference():
    torch.manual_seed(0)
    cell = HoulsbyCell(HoulsbyConfig(r=3), 6, 6).double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    y = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(y)
    ours = cell(torch.empty(2, 5, 99), y)
    hidden = gelu(torch.einsum("bti,ri->btr", y, cell.down.weight) + cell.down.bias)
    theirs = y + torch.einsum("btr,ir->bti", hidden, cell.up.weight) + cell.up.bias
    torch.testing.assert_close(ours, theirs)
    leaves = [y, *cell.parameters()]
    mine = torch.autograd.grad((ours * weights).sum(), leaves)
    for one, other in zip(mine, torch.autograd.grad((theirs * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_starts_near_the_identity():
    torch.manual_seed(0)
    cell = HoulsbyCell(HoulsbyConfig(r=64), 256, 256)
    for linear in (cell.down, cell.up):
        assert 0.015 < linear.weight.abs().max() <= 0.02
        assert float(linear.weight.detach().std()) == pytest.approx(0.0088, rel=0.03)  # 0.01, truncated at two of it
        assert not linear.bias.any()
    y = torch.randn(50, 256)
    moved = cell(y, y) - y
    assert 0 < moved.abs().max() < 0.05


@pytest.mark.parametrize(("r", "count", "with_norms"), [(1, 110_640, 0.071), (24, 1_807_488, 0.832)])
def test_share_of_t5_base_is_table_4_5s_at_r_1_and_0_83_at_the_reduction_factor_of_table_4_3(
    t5_base, r, count, with_norms
):
    model = get_peft_model(t5_base, HoulsbyConfig(r=r))
    assert parameter_counts(model)[0] == count == 48 * (2 * 768 * r + r + 768)
    assert round(100 * (count + 47_616) / 222_903_552, 3) == with_norms


def test_parameters_on_gpt2_medium_are_near_table_5_1s_11_09_million():
    with torch.device("meta"):
        medium = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    model = get_peft_model(medium, HoulsbyConfig(r=112))
    assert parameter_counts(model)[0] == 11_064_576 == 48 * (2 * 1024 * 112 + 112 + 1024)


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("r", 1.0), ("r", True)])
def test_bad_fields_are_refused_by_name(field, value):
    for cls in (HoulsbyConfig, Houlsby):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{field} = "):
            cls(**{field: value})


def test_the_method_adapts_every_block_and_trains_the_head():
    model = Houlsby(r=5).build(TinyTask(hidden=48))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    downs = {name: p.shape for name, p in model.named_parameters() if name.endswith("down.weight")}
    assert set(downs.values()) == {(5, 48)}
    assert len(downs) == 4
    assert all("houlsby_cell" in name or "classifier" in name for name in trained)

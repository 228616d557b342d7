from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pareto_adapters import ParallelAdapter, ParallelAdapterConfig
from pareto_adapters.parallel_adapter import ParallelAdapterCell
from pareto_core import ConfigError
from pareto_core.testing import TinyTask
from pareto_core.weights import parameter_counts


def test_hand_computed():
    cell = ParallelAdapterCell(ParallelAdapterConfig(r=1, scale=4.0), 2, 2)
    cell.down.weight.data, cell.down.bias.data = torch.tensor([[1.0, -1.0]]), torch.tensor([0.5])
    cell.up.weight.data, cell.up.bias.data = torch.tensor([[2.0], [-1.0]]), torch.tensor([0.0, 3.0])
    x, y = torch.tensor([[4.0, 1.0], [1.0, 4.0]]), torch.tensor([[10.0, 20.0], [10.0, 20.0]])
    # down = 3.5 in the first row; below zero, hence 0, in the second; the scale holds for the bias too
    assert cell(x, y).tolist() == [[10 + 4 * 7, 20 + 4 * (3 - 3.5)], [10, 20 + 4 * 3]]


def test_outputs_and_gradients_equal_the_reference():
    torch.manual_seed(0)
    cell = ParallelAdapterCell(ParallelAdapterConfig(r=3, scale=0.7), 6, 4).double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(y)
    ours = cell(x, y)
    hidden = (torch.einsum("bti,ri->btr", x, cell.down.weight) + cell.down.bias).clamp(min=0)
    theirs = y + 0.7 * (torch.einsum("btr,or->bto", hidden, cell.up.weight) + cell.up.bias)
    torch.testing.assert_close(ours, theirs)
    leaves = [x, y, *cell.parameters()]
    mine = torch.autograd.grad((ours * weights).sum(), leaves)
    for one, other in zip(mine, torch.autograd.grad((theirs * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_starts_unchanged_as_lora_does():
    torch.manual_seed(0)
    cell = ParallelAdapterCell(ParallelAdapterConfig(), 100, 100)
    assert not cell.up.weight.any()
    assert not cell.down.bias.any()
    assert 0.09 < cell.down.weight.abs().max() <= 0.1
    x = torch.randn(3, 100)
    assert torch.equal(cell(x, 2 * x), 2 * x)


def test_share_of_t5_base_is_table_4_5s(t5_base):
    count = parameter_counts(get_peft_model(t5_base, ParallelAdapterConfig()))[0]
    assert count == 92_208 == 24 * (2 * 768 * 2 + 2 + 768)
    assert round(100 * count / 222_903_552, 4) == 0.0414
    assert round(100 * (count + 47_616) / 222_903_552, 4) == 0.0627


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("r", "2"), ("scale", float("nan")), ("scale", True)])
def test_bad_fields_are_refused_by_name(field, value):
    for cls in (ParallelAdapterConfig, ParallelAdapter):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{field} = "):
            cls(**{field: value})


def test_the_method_adapts_every_ffn_and_trains_the_head():
    model = ParallelAdapter(r=5, scale=4.0).build(TinyTask(hidden=48))
    cells = [module for module in model.modules() if isinstance(module, ParallelAdapterCell)]
    assert [(cell.down.out_features, cell.scale) for cell in cells] == [(5, 4.0)] * 2
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("paralleladapter_cell" in name or "classifier" in name for name in trained)

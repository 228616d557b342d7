from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pareto_adapters import AdapterL, AdapterLConfig
from pareto_adapters.adapter_l import AdapterLCell
from pareto_core import ConfigError
from pareto_core.testing import TinyTask
from pareto_core.weights import parameter_counts


def test_hand_computed():
    cell = AdapterLCell(AdapterLConfig(r=1), 2, 2)
    cell.down.weight.data, cell.down.bias.data = torch.tensor([[1.0, -2.0]]), torch.tensor([0.25])
    cell.up.weight.data, cell.up.bias.data = torch.tensor([[2.0], [-1.0]]), torch.tensor([0.0, 3.0])
    # LN((5, 1)) = (1, -1) up to its epsilon; down = 1 + 2 + 0.25
    out = cell(torch.zeros(1, 2), torch.tensor([[5.0, 1.0]]))
    torch.testing.assert_close(out, torch.tensor([[5 + 2 * 3.25, 1 - 3.25 + 3]]), atol=1e-4, rtol=0)


def test_outputs_and_gradients_equal_the_reference():
    torch.manual_seed(0)
    cell = AdapterLCell(AdapterLConfig(r=3), 6, 6).double()
    for parameter in cell.parameters():
        nn.init.normal_(parameter)
    y = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(y)
    ours = cell(torch.empty(2, 5, 99), y)
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * cell.norm.weight + cell.norm.bias
    hidden = (torch.einsum("bti,ri->btr", normed, cell.down.weight) + cell.down.bias).clamp(min=0)
    theirs = y + torch.einsum("btr,ir->bti", hidden, cell.up.weight) + cell.up.bias
    torch.testing.assert_close(ours, theirs)
    leaves = [y, *cell.parameters()]
    mine = torch.autograd.grad((ours * weights).sum(), leaves)
    for one, other in zip(mine, torch.autograd.grad((theirs * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_it_reads_the_sum_that_leaves_a_layer(make_model, make_batch):
    plain = make_model("gpt2").eval()
    outputs: list[torch.Tensor] = []
    plain.transformer.h[0].register_forward_hook(lambda _, args, out: outputs.append(out))
    plain(**make_batch("gpt2"))
    model = get_peft_model(make_model("gpt2"), AdapterLConfig(r=2)).eval()
    layer = model.get_submodule("base_model.model.transformer.h.0")
    layer.cells["default"].norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(**make_batch("gpt2"))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("r", "count", "millions"), [(6, 368_784, 0.37), (224, 11_089_152, 11.09)])
def test_parameters_on_gpt2_medium_are_table_5_1s(r, count, millions):
    with torch.device("meta"):
        medium = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    model = get_peft_model(medium, AdapterLConfig(r=r))
    assert parameter_counts(model)[0] == count == 24 * (2 * 1024 * r + r + 1024) + 24 * 2 * 1024
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_bad_fields_are_refused_by_name(value):
    for cls in (AdapterLConfig, AdapterL):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.r = "):
            cls(r=value)


def test_the_method_adapts_every_layer_and_trains_its_norm_and_the_head():
    model = AdapterL(r=5).build(TinyTask(hidden=48))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(name.endswith("default.norm.weight") for name in trained) == 2
    assert all("linadapter_cell" in name or "classifier" in name for name in trained)

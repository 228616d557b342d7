from __future__ import annotations

import pytest
import torch
from torch import nn

from pareto_adapters import KronA
from pareto_adapters._build import layer_norms, resolve_targets
from pareto_adapters.krona import KronALayer
from pareto_core import ModelError
from pareto_core.tiny import TinyTask


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("t5", ["q", "v"]), ("bert", ["query", "value"]), ("llama", ["q_proj", "v_proj"])],
)
def test_query_and_value_are_found_under_the_architectures_names(make_model, kind, expected):
    assert resolve_targets(make_model(kind), ("q", "v")) == expected


def test_names_of_the_model_pass_through_and_others_are_refused(make_model):
    assert resolve_targets(make_model("gpt2"), ("c_attn", "mlp.c_fc")) == ["c_attn", "mlp.c_fc"]
    with pytest.raises(ModelError, match=r"'q' is not a linear layer of GPT2LMHeadModel; known: c_attn, c_fc, c_proj"):
        resolve_targets(make_model("gpt2"), ("q", "v"))
    assert resolve_targets(make_model("bert"), ("o",)) == ["attention.output.dense"]
    assert resolve_targets(make_model("gpt2"), ("o",)) == ["attn.c_proj"]


def test_o_of_gpt2_is_the_projection_of_attention_alone():
    model = KronA(a_shape=(4, 2), target_modules=("o",)).build(TinyTask(architecture="gpt2"))
    adapted = [name for name, module in model.named_modules() if isinstance(module, KronALayer)]
    assert [name.split("transformer.")[1] for name in adapted] == ["h.0.attn.c_proj", "h.1.attn.c_proj"]


@pytest.mark.parametrize(("kind", "count"), [("t5", 7), ("bert", 5), ("llama", 5), ("gpt2", 5)])
def test_layer_norms_are_found_whatever_their_class(make_model, kind, count):
    found = layer_norms(make_model(kind))
    assert len(found) == count
    assert all(isinstance(p, torch.Tensor) and p.dim() == 1 for norm in found for p in norm.parameters())


def test_a_model_without_layer_norms_says_so():
    with pytest.raises(ModelError, match="no layer norms"):
        layer_norms(nn.Sequential(nn.Linear(2, 2)))

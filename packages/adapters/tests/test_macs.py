from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from pareto_adapters import (
    KronAConfig,
    LoDAConfig,
    LoDAPlusConfig,
    approximation,
    qkv_macs,
    qkv_macs_per_token,
    sparsify_projections,
    truncate_projections,
)
from pareto_adapters.macs import qkv_figures
from pareto_core import ModelError
from pareto_core.testing import TinyTask, load_method
from pareto_core.weights import parameter_counts

FUSED = {"target_modules": ["c_attn"], "fused_parts": ["q", "v"]}


def gpt2_medium() -> nn.Module:
    with torch.device("meta"):
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    return model.requires_grad_(False)


#: (fraction kept or rank, LoDA, LoDA+) in millions: table 5.2
TABLE = [
    (None, 75.9, 76.1),
    (0.6, 45.7, 45.9),
    (0.5, 38.1, 38.3),
    (500, 49.5, 49.7),
    (400, 39.7, 39.9),
    (300, 29.9, 30.1),
]


@pytest.mark.parametrize(("size", "loda", "plus"), TABLE)
def test_gpt2_medium_gives_table_5_2(size, loda, plus):
    for config_type, printed, per_matrix in ((LoDAConfig, loda, 2), (LoDAPlusConfig, plus, 3)):
        model = gpt2_medium()
        base = 24 * 3 * 1024**2
        if isinstance(size, float):
            sparsify_projections(model, size)
            base = 24 * round(size * 3 * 1024**2)
        elif size:
            truncate_projections(model, size)
            base = 24 * 4 * size * 1024
        model = get_peft_model(model, config_type(r=4, **FUSED))
        assert qkv_macs_per_token(model) == base + 48 * (per_matrix * 4 * 1024 + 2 * 4**2 + 4 * 4)
        assert round(qkv_macs_per_token(model) / 1e6, 1) == printed
        assert parameter_counts(model)[0] == 394_752


def test_lora_and_the_weights_themselves_give_table_5_2():
    plain = gpt2_medium()
    assert round(qkv_macs_per_token(plain) / 1e6, 1) == 75.5
    lora = get_peft_model(plain, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    assert parameter_counts(lora)[0] == 393_216
    assert round(qkv_macs_per_token(lora) / 1e6, 1) == 75.9
    lora.merge_adapter()
    assert round(qkv_macs_per_token(lora) / 1e6, 1) == 75.5


@pytest.mark.parametrize(
    ("kind", "count", "each"),
    [("t5", 2, 16 * 36), ("gpt2", 2, 16 * 48), ("llama", 2, 16 * 32), ("bert", 2, 16 * 48)],
)
def test_every_architecture_is_counted_by_layer(make_model, kind, count, each):
    assert list(qkv_macs(make_model(kind)).values()) == [each] * count


def test_real_zeros_are_counted_where_a_model_is_sparse_and_nowhere_else(make_model):
    model = make_model("llama")
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert qkv_macs_per_token(model) == 2 * 16 * 32
    sparsify_projections(model, 0.25)
    assert qkv_macs_per_token(model) == 2 * round(0.25 * 16 * 32)
    model.model.layers[1].self_attn.k_proj.weight.data.zero_()
    left = sum(int(layer.weight.count_nonzero()) for layer in model.model.layers[1].self_attn.children())
    assert list(qkv_macs(model).values())[1] == left - 16 * 16, "o_proj is none of the three"


def test_adapters_count_while_they_are_at_work(make_model):
    model = get_peft_model(make_model("gpt2"), LoDAConfig(r=3, **FUSED))
    plain, added = 2 * 16 * 48, 4 * (2 * 3 * 16 + 2 * 9 + 4 * 3)
    assert qkv_macs_per_token(model) == plain + added
    with model.disable_adapter():
        assert qkv_macs_per_token(model) == plain
    krona = get_peft_model(make_model("llama"), KronAConfig(a_shape=(4, 4), target_modules=["q_proj"]))
    assert qkv_macs_per_token(krona) == 2 * (16 * 32 + 2 * 4 * 16)
    krona.merge_adapter()
    assert qkv_macs_per_token(krona) == 2 * 16 * 32


def test_the_model_computes_as_before_afterwards(make_model, make_batch):
    model = make_model("llama").bfloat16().eval()
    truncate_projections(model, 5)
    before = model(**make_batch("llama")).logits
    assert qkv_macs_per_token(model) == 2 * (16 * 5 + 5 * 32)
    assert torch.equal(model(**make_batch("llama")).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_without_known_projections_are_refused():
    with pytest.raises(ModelError, match="Linear has no self-attention"):
        qkv_macs_per_token(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["lora", "loda", "loda_plus", "s_loda", "r_loda", "ft_qv"])
def test_results_tell_the_multiplications_of_what_is_deployed(name):
    method = load_method(name)(**({"rank": 12} if name == "r_loda" else {}))
    task = TinyTask(architecture="gpt2")
    deployed = method.finish(method.build(task), task)
    figures = {figure.name: figure.value for figure in method.figures(deployed)}
    assert figures["qkv_macs_per_token"] == qkv_macs_per_token(deployed)
    if name in ("s_loda", "r_loda"):
        assert figures["projection_energy_percent"] == pytest.approx(100 * approximation(deployed)["energy"])


def test_nothing_is_told_of_a_model_without_known_projections():
    assert qkv_figures(nn.Sequential(nn.Linear(4, 4))) == ()

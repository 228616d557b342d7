from __future__ import annotations

import json
import math

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from pareto_adapters import KronAConfig, approximation, energy_by_rank, energy_by_share
from pareto_adapters.approximate import approximable, energy, left_singular, note, self_attentions
from pareto_core import ConfigError, ModelError

NAMES = {
    "t5": ("q", "k", "v"),
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "k_proj", "v_proj"),
    "bert": ("query", "key", "value"),
}
PLACES = {
    "t5": ["encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention"],
    "gpt2": ["transformer.h.0.attn", "transformer.h.1.attn"],
    "llama": ["model.layers.0.self_attn", "model.layers.1.self_attn"],
    "bert": ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"],
}


@pytest.mark.parametrize("kind", list(NAMES))
def test_self_attentions_are_found_and_cross_attention_is_not(make_model, kind):
    found = self_attentions(make_model(kind))
    assert [attention.name for attention in found] == PLACES[kind]
    assert {attention.names for attention in found} == {NAMES[kind]}


def test_cross_attention_of_bert_and_gpt2_is_left_out():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "add_cross_attention": True}
    bert = tf.BertLMHeadModel(tf.BertConfig(hidden_size=8, intermediate_size=8, is_decoder=True, **sizes))
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, add_cross_attention=True))
    assert [attention.name for attention in self_attentions(bert)] == ["bert.encoder.layer.0.attention.self"]
    assert [attention.name for attention in self_attentions(gpt2)] == ["transformer.h.0.attn"]


@pytest.mark.parametrize("kind", list(NAMES))
def test_the_matrix_is_what_the_layers_multiply_by(make_model, kind):
    attention = self_attentions(make_model(kind))[0]
    x = torch.randn(3, attention.in_features)
    outputs = [layer(x) - (0 if layer.bias is None else layer.bias) for layer in attention.layers]
    torch.testing.assert_close(x @ attention.matrix(), torch.cat(outputs, 1))
    assert [output.shape[1] for output in outputs] == attention.widths


def test_adapters_are_looked_through(make_model):
    plain = self_attentions(make_model("gpt2"))[0]
    config = KronAConfig(a_shape=(4, 2), target_modules=["c_attn"])
    (wrapped, _) = self_attentions(get_peft_model(make_model("gpt2"), config).get_base_model())
    assert wrapped.name == plain.name
    assert torch.equal(wrapped.matrix(), plain.matrix())
    assert wrapped.layers[0] is not wrapped.bases[0]


def test_energy_curves_by_hand():
    weight = torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
    torch.testing.assert_close(energy_by_rank(weight), torch.tensor([16 / 25, 1.0], dtype=torch.float64))
    found = energy_by_share(weight, [0.0, 1 / 6, 2 / 6, 1.0]).tolist()
    assert found == pytest.approx([0.0, 16 / 25, 1.0, 1.0])
    assert energy(weight) == 25


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan, True, "x", None])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ConfigError, match=r"energy_by_share\.shares = .*: must be numbers from 0 to 1"):
        energy_by_share(torch.eye(2), [0.5, share])


def test_of_nothing_everything_is_kept():
    zeros = torch.zeros(2, 3)
    assert energy_by_rank(zeros).tolist() == [1.0, 1.0]
    assert energy_by_share(zeros, [0.0, 0.5]).tolist() == [1.0, 1.0]
    assert energy_by_share(zeros, []).tolist() == []
    assert energy_by_share(torch.eye(2), []).tolist() == []


@pytest.mark.parametrize("function", [energy_by_rank, lambda weight: energy_by_share(weight, [0.5])])
def test_what_has_no_energy_curve_is_refused(function):
    for weight in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, device="meta")):
        with pytest.raises(ModelError, match="takes a matrix with values, found"):
            function(weight)
    with pytest.raises(ModelError, match="the matrix holds NaN"):
        function(torch.tensor([[1.0, math.nan]]))


@pytest.mark.parametrize("shape", [(6, 18), (7, 7), (9, 4)])
def test_the_spectrum_equals_that_of_a_decomposition(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    u, sigma, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    squares, vectors = left_singular(weight)
    torch.testing.assert_close(squares[: min(shape)], sigma**2, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close((vectors[:, : min(shape)] * u).sum(0).abs(), torch.ones(min(shape)).double())
    torch.testing.assert_close(energy_by_rank(weight), (sigma**2).cumsum(0) / (sigma**2).sum())


def test_the_note_holds_shares_of_each_and_of_all(make_model):
    model = make_model("bert")
    with pytest.raises(ModelError, match="BertForSequenceClassification are not approximated"):
        approximation(model)
    note(model, "sparse", 0.5, {"one": (1.0, 2.0), "two": (0.0, 0.0)})
    record = approximation(model)
    assert record == {"kind": "sparse", "size": 0.5, "energy": 0.5, "energy_by_attention": {"one": 0.5, "two": 1.0}}
    assert json.loads(json.dumps(record)) == record
    with pytest.raises(ModelError, match="approximated already"):
        approximable(model)
    assert approximable(type(model)(model.config)), "a model of the same configuration is another model"


def test_models_that_cannot_be_approximated_are_refused_before_anything_is_changed(make_model):
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        approximable(nn.Linear(2, 2))
    convolutional = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_channels=1)
    with pytest.raises(ModelError, match="no self-attention with projections of a known name: c_attn, q/k/v"):
        approximable(tf.ResNetModel(convolutional))
    adapted = get_peft_model(make_model("bert"), KronAConfig(a_shape=(4, 2), target_modules=["value"]))
    with pytest.raises(ModelError, match=r"layer\.0\.attention\.self\.value' is KronALayer: approximate the model bef"):
        approximable(adapted.get_base_model())
    sharded = make_model("gpt2")
    sharded.transformer.h[1].attn.c_attn.weight.data = torch.empty(0)
    with pytest.raises(ModelError, match=r"h\.1\.attn\.c_attn\.weight is partitioned"):
        approximable(sharded)
    broken = make_model("llama")
    broken.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj\.weight holds NaN"):
        approximable(broken)

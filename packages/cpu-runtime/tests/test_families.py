from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from models import CONFIGS, quantised_tiny, tiny

from pareto_core.errors import ConfigError, ModelError, UnsupportedError
from pareto_cpu_runtime.families import FAMILIES, describe
from pareto_cpu_runtime.runtime import Runtime


def close(logits, expected, tolerance):
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_computes_what_transformers_does(kind):
    model = tiny(kind)
    runtime = Runtime.from_pretrained(model, precision=None, threads=2, max_rows=9, cache_dtype="fp32")
    ids = torch.randint(3, 99, (2, 21))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids)
    out = runtime(input_ids=ids, labels=ids)
    close(out.logits, expected.logits, 1e-4)
    assert float(out.loss) == pytest.approx(float(expected.loss), rel=1e-4)


def test_every_architecture_has_a_model_in_these_tests():
    assert {CONFIGS[kind][0].model_type for kind in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("kind", CONFIGS)
def test_int4_computes_what_the_dequantised_model_does(kind):
    model, rounded = quantised_tiny(kind)
    runtime = Runtime.from_pretrained(model, threads=2, max_rows=16, cache_dtype="fp32")
    ids = torch.randint(3, 99, (2, 37))
    with torch.no_grad():
        expected = rounded(input_ids=ids).logits
    # Activations are rounded to 8 bits in every operator: a relative error of about 1 / 254 each.
    close(runtime(input_ids=ids).logits, expected, 0.06)
    exact = Runtime.from_pretrained(model, compute="fp32", threads=2, max_rows=16, cache_dtype="fp32")
    close(exact(input_ids=ids).logits, expected, 1e-4)


@pytest.mark.parametrize("config", [tf.GPT2Config(), tf.T5Config(), object()])
def test_an_unknown_architecture_names_the_known_ones(config):
    with pytest.raises(UnsupportedError, match="falcon, gpt_neox, gptj, llama, mistral, mpt, phi, phi3, qwen2, qwen3"):
        describe(config)


def test_options_that_the_runtime_has_not_are_refused():
    with pytest.raises(UnsupportedError, match="clip_qkv"):
        describe(tf.MptConfig(attn_config={"clip_qkv": 8.0}))
    with pytest.raises(UnsupportedError, match="qk_layernorm"):
        describe(tf.PhiConfig(qk_layernorm=True))
    with pytest.raises(ConfigError, match="hidden_act"):
        describe(tf.LlamaConfig(hidden_act="tanh"))
    with pytest.raises(ConfigError, match="rotary_dim"):
        describe(tf.GPTJConfig(rotary_dim=7))


def test_rotary_frequencies_that_change_with_length_hold_up_to_the_trained_length():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny("llama")
    model.config.rope_parameters = rope
    model = tf.LlamaForCausalLM(model.config).eval()
    with pytest.raises(UnsupportedError, match="128 tokens"):
        Runtime.from_pretrained(model, max_length=129)
    runtime = Runtime.from_pretrained(model, max_length=128)
    assert runtime.max_length == 128


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.weight", "nan"),
        ("model.layers.1.mlp.up_proj.weight", "nan"),
        ("model.layers.0.input_layernorm.weight", "inf"),
        ("model.norm.weight", "nan"),
    ],
)
def test_weights_that_are_not_finite_are_named(name, value):
    model = tiny("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = float(value)
    with pytest.raises(ModelError, match=name.removesuffix(".weight")):
        Runtime.from_pretrained(model)


def test_weights_that_do_not_fit_the_config_are_named():
    model = tiny("llama")
    model.config.intermediate_size = 128
    with pytest.raises(ModelError, match=r"mlp.down_proj: 96 inputs, the config asks for 128"):
        Runtime.from_pretrained(model)
    model = tiny("llama")
    model.model.norm = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"model.norm.weight is missing"):
        Runtime.from_pretrained(model)


def test_alibi_slopes():
    from pareto_cpu_runtime.families import falcon, mpt

    assert np.allclose(mpt.slopes(4), [2**-2, 2**-4, 2**-6, 2**-8])
    assert np.allclose(mpt.slopes(3), [2**-4, 2**-8, 2**-2])
    assert np.allclose(falcon.slopes(8, 4) * 2, 2.0 ** -np.arange(1, 9))

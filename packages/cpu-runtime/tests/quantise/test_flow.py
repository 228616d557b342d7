from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pareto_core.errors import ConfigError, ModelError
from pareto_cpu_runtime import quantise as package
from pareto_cpu_runtime.quantise.config import QuantisationConfig
from pareto_cpu_runtime.quantise.flow import quantise

G32 = QuantisationConfig(group_size=32)


def test_every_block_operator_and_the_head_are_quantised(any_model: Any) -> None:
    quantised = quantise(any_model, config=G32)
    kept = {name for name, t in quantised.tensors.items() if t.dim() == 2 and "emb" not in name.lower()}
    # Position and token embeddings are kept, and a classifier and its pooler.
    assert all(part in name for name in kept for part in (".",))
    assert {n for n in kept if not any(w in n for w in ("wte", "wpe", "pooler", "classifier"))} == set()
    assert quantised.left_out == ()
    assert any("lm_head" in n or "embed_out" in n for n in quantised.matrices) == (
        "bert" not in any_model.config.model_type
    )


def test_the_source_is_left_as_it_was(any_model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    quantise(any_model, config=G32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())


def test_left_out_operators_keep_their_weights(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    quantised = quantise(model, config=QuantisationConfig(group_size=32, leave_out=("lm_head", "*.down_proj")))
    assert quantised.left_out == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head")
    restored = quantised.dequantise()
    assert torch.equal(restored.lm_head.weight, model.lm_head.weight)
    assert torch.equal(restored.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)


def test_eight_bits_change_little_and_three_much(model_of: Callable[..., Any], tokens: torch.Tensor) -> None:
    model = model_of("llama")
    with torch.no_grad():
        expected = model(tokens).logits
        errors = [
            float(
                (
                    quantise(model, config=QuantisationConfig(bits=bits, group_size=32)).dequantise()(tokens).logits
                    - expected
                ).norm()
            )
            for bits in (8, 4, 3)
        ]
    assert errors[0] < 0.02 * float(expected.norm())
    assert errors[0] * 4 < errors[1] < errors[2]


def test_given_up_weights_are_freed(model_of: Callable[..., Any]) -> None:
    model = model_of("llama-tied")
    kept = quantise(model_of("llama-tied"), config=G32)
    found = quantise(model, config=G32, keep_model=False)
    assert all(torch.equal(found.matrices[n].codes, kept.matrices[n].codes) for n in kept.matrices)
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 0
    assert model.model.embed_tokens.weight.numel() > 0


def test_packed_bytes(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    quantised = quantise(model, config=G32)
    weights = sum(m.shape[0] * m.shape[1] for m in quantised.matrices.values())
    others = sum(t.numel() * 4 for t in quantised.tensors.values())
    assert quantised.packed_bytes == weights // 2 + weights // 32 * 2 + others


def test_bad_models_are_refused(model_of: Callable[..., Any]) -> None:
    model = model_of("llama")
    with pytest.raises(ModelError, match="not a transformers model"):
        quantise(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="matches none of the operators"):
        quantise(model, config=QuantisationConfig(leave_out=("head",)))
    with pytest.raises(
        ModelError, match=r"model\.layers\.0\.self_attn\.q_proj has 64 inputs, which the group size 128"
    ):
        quantise(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        quantise(model, config=G32)


def test_american_names() -> None:
    assert package.quantize is quantise
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing

from __future__ import annotations

import pytest
import torch
import transformers as tf
from models import tiny

from pareto_cpu_runtime import accelerate_generate


def test_a_model_generates_on_the_runtime_within_the_block_only():
    model = tiny("qwen2")
    ids = torch.randint(3, 99, (2, 6))
    options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with accelerate_generate(model, precision=None, cache_dtype="fp32") as runtime:
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
        calls = []
        runtime.generate = lambda *_, **__: calls.append(1)
        model.generate(ids)
        assert calls == [1]
    assert "generate" not in vars(model)
    with pytest.raises(RuntimeError, match="inside"), accelerate_generate(model):
        raise RuntimeError("inside")
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(ids, **options), expected)


def test_it_takes_a_generation_config_by_place_and_what_tokenizers_add():
    model = tiny("qwen2")
    ids = torch.randint(3, 99, (2, 6))
    config = tf.GenerationConfig(max_new_tokens=5, pad_token_id=0)
    expected = model.generate(ids, config, attention_mask=torch.ones_like(ids))
    encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with accelerate_generate(model, precision=None, cache_dtype="fp32"):
        assert torch.equal(model.generate(ids, config), expected)
        assert torch.equal(model.generate(**encoded, generation_config=config), expected)
        assert torch.equal(model.generate(inputs=ids, generation_config=config), expected)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

FAMILIES = ["llama", "mistral", "qwen2", "gptj", "neox", "mpt", "falcon", "falcon-alibi", "phi"]
OTHERS = ["llama-tied", "gpt2", "bert"]
VOCABULARY, WIDTH = 64, 64


def make_model(kind: str, layers: int = 2, seed: int = 0, width: int = WIDTH) -> Any:
    """A random model of the family; its norms have uneven weights, so that some channels are louder than others."""
    torch.manual_seed(seed)
    llama = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    gpt = {"vocab_size": VOCABULARY, "n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 64}
    neox = {name: value for name, value in llama.items() if name != "num_key_value_heads"}
    mpt = {"vocab_size": VOCABULARY, "d_model": width, "n_layers": layers, "n_heads": 4, "max_seq_len": 64}
    falcon = {**neox, "ffn_hidden_size": 2 * width}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**llama)),
        "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**llama, tie_word_embeddings=True)),
        "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**llama, head_dim=width // 4, sliding_window=8)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**llama)),
        "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**gpt, rotary_dim=8)),
        "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**neox)),
        "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(**mpt)),
        "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**falcon, multi_query=True)),
        "falcon-alibi": lambda: tf.FalconForCausalLM(
            tf.FalconConfig(**falcon, alibi=True, multi_query=False, parallel_attn=False, bias=True)
        ),
        "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**llama, partial_rotary_factor=0.5)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt, bos_token_id=1, eos_token_id=2)),
        "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**neox)),
    }
    model = makers[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or ".ln" in name:
                parameter.add_(torch.rand_like(parameter) * 0.5 if name.endswith("weight") else 0.1)
                if name.endswith("weight"):
                    parameter[::16] *= 4
            elif parameter.dim() == 2:
                parameter.mul_(3)  # the default start is so small that blocks would barely change what they get
    return model.eval()


@pytest.fixture
def model_of() -> Callable[..., Any]:
    return make_model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES + OTHERS)
def any_model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)

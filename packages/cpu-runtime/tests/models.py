"""Tiny random models of every family, with the options that change how they are computed."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": 99, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {**WIDTH, **COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, LLAMA),
    "llama3": (tf.LlamaConfig, {**LLAMA, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-bias": (tf.LlamaConfig, {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    # A feed-forward width that panels of gates do not divide.
    "llama-odd": (
        tf.LlamaConfig,
        {**LLAMA, "intermediate_size": 80, "num_attention_heads": 8, "num_key_value_heads": 1},
    ),
    "mistral": (tf.MistralConfig, {**LLAMA, "sliding_window": 7, "head_dim": 24}),
    "qwen2": (tf.Qwen2Config, LLAMA),
    "qwen2-window": (
        tf.Qwen2Config,
        {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (tf.Qwen3Config, {**LLAMA, "head_dim": 32}),
    "phi3": (tf.Phi3Config, {**LLAMA, "original_max_position_embeddings": 128}),
    "phi": (tf.PhiConfig, {**LLAMA, "num_key_value_heads": 4}),
    "gptj": (
        tf.GPTJConfig,
        {
            "vocab_size": 99,
            "n_positions": 128,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "gpt_neox": (tf.GPTNeoXConfig, {**WIDTH, **COMMON, "intermediate_size": 96}),
    "gpt_neox-sequential": (
        tf.GPTNeoXConfig,
        {**WIDTH, **COMMON, "intermediate_size": 96, "use_parallel_residual": False, "attention_bias": False},
    ),
    "mpt": (
        tf.MptConfig,
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "vocab_size": 99,
            "max_seq_len": 128,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "mpt-heads": (
        tf.MptConfig,
        {"d_model": 96, "n_heads": 6, "n_layers": 2, "vocab_size": 99, "max_seq_len": 128, "eos_token_id": 2},
    ),
    "falcon": (tf.FalconConfig, {**WIDTH, **COMMON}),
    "falcon-new": (tf.FalconConfig, {**WIDTH, **COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-heads": (
        tf.FalconConfig,
        {**WIDTH, **COMMON, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon-alibi": (tf.FalconConfig, {**WIDTH, **COMMON, "alibi": True}),
}


def tiny(kind: str, seed: int = 0) -> Any:
    """A random model whose logits are far apart, so that greedy search does not hang on rounding."""
    torch.manual_seed(seed)
    config_class, values = CONFIGS[kind]
    model = tf.AutoModelForCausalLM.from_config(config_class(**values), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.1)
    return model


def quantised_tiny(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny model, and a copy of it in torch with the weights that the runtime makes of it (INT4, groups of 32)."""
    from pareto_cpu_runtime.families import describe
    from pareto_cpu_runtime.runtime import _precision
    from pareto_cpu_runtime.sources import StateSource

    model, rounded = tiny(kind, seed), tiny(kind, seed)
    source = StateSource(model.config, model.state_dict(), _precision("int4"))
    rounded.lm_head.weight = torch.nn.Parameter(rounded.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name in describe(model.config).modules():
            rounded.get_submodule(name).weight.copy_(torch.from_numpy(source.matrix(name).dense().values))
    return model, rounded

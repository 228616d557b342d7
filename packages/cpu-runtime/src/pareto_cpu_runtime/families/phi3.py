"""Phi-3: built like Llama, with queries, keys and values in one module, and gate and up in another."""

from __future__ import annotations

from typing import Any

import numpy as np

from pareto_cpu_runtime.families import llama
from pareto_cpu_runtime.families._common import activation_of, head_size, rotary_of
from pareto_cpu_runtime.families.description import Block, Decoder, Norm, Operator, Rows, split_fused, whole


def describe(config: Any) -> Decoder:
    """Describe a model of this family by its transformers config."""
    head_dim = head_size(config)
    activation = activation_of(config, "hidden_act")
    return Decoder(
        model_type=config.model_type,
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffn=config.intermediate_size,
        scale=head_dim**-0.5,
        positions=config.max_position_embeddings,
        embedding="model.embed_tokens",
        blocks=tuple(_block(config, layer, activation) for layer in range(config.num_hidden_layers)),
        final_norm=Norm(kind="rms", module="model.norm", epsilon=config.rms_norm_eps),
        head=whole("head", "lm_head"),
        rotary=rotary_of(
            config, "Phi3RotaryEmbedding", int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        ),
        config=config,
    )


def _block(config: Any, layer: int, activation: str) -> Block:
    at = f"model.layers.{layer}"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rms = {"kind": "rms", "epsilon": config.rms_norm_eps}
    pattern = np.repeat([0, 1, 2], [heads, kv_heads, kv_heads])
    module, half = f"{at}.mlp.gate_up_proj", config.intermediate_size
    gate, up = Rows(module, np.arange(half)), Rows(module, np.arange(half, 2 * half))
    return Block(
        attention_norm=Norm(module=f"{at}.input_layernorm", **rms),
        qkv=split_fused(f"{at}.self_attn.qkv_proj", pattern, head_size(config), f"{layer}.qkv"),
        out=whole(f"{layer}.out", f"{at}.self_attn.o_proj"),
        ffn_norm=Norm(module=f"{at}.post_attention_layernorm", **rms),
        up=Operator(name=f"{layer}.up", parts=(gate, up), activation=activation, gated=True),
        down=whole(f"{layer}.down", f"{at}.mlp.down_proj"),
        window=llama.window_of(config, layer),
    )

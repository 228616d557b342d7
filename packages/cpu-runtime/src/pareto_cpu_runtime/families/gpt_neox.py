"""GPT-NeoX: LayerNorm, partial rotary positions, one module for queries, keys and values, head by head."""

from __future__ import annotations

from typing import Any

import numpy as np

from pareto_cpu_runtime.families._common import activation_of, rotary_of
from pareto_cpu_runtime.families.description import Block, Decoder, Norm, split_fused, whole


def describe(config: Any) -> Decoder:
    """Describe a model of this family by its transformers config."""
    head_dim = config.hidden_size // config.num_attention_heads
    activation = activation_of(config, "hidden_act")
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return Decoder(
        model_type=config.model_type,
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        ffn=config.intermediate_size,
        scale=head_dim**-0.5,
        positions=config.max_position_embeddings,
        embedding="gpt_neox.embed_in",
        blocks=tuple(_block(config, layer, activation, head_dim) for layer in range(config.num_hidden_layers)),
        final_norm=Norm(kind="layer", module="gpt_neox.final_layer_norm", epsilon=config.layer_norm_eps),
        head=whole("head", "lm_head"),
        rotary=rotary_of(config, "GPTNeoXRotaryEmbedding", int(head_dim * factor)),
        config=config,
    )


def _block(config: Any, layer: int, activation: str, head_dim: int) -> Block:
    at = f"gpt_neox.layers.{layer}"
    layer_norm = {"kind": "layer", "epsilon": config.layer_norm_eps}
    pattern = np.tile([0, 1, 2], config.num_attention_heads)
    return Block(
        attention_norm=Norm(module=f"{at}.input_layernorm", **layer_norm),
        qkv=split_fused(f"{at}.attention.query_key_value", pattern, head_dim, f"{layer}.qkv"),
        out=whole(f"{layer}.out", f"{at}.attention.dense"),
        ffn_norm=Norm(module=f"{at}.post_attention_layernorm", **layer_norm),
        up=whole(f"{layer}.up", f"{at}.mlp.dense_h_to_4h", activation=activation),
        down=whole(f"{layer}.down", f"{at}.mlp.dense_4h_to_h"),
        parallel=bool(config.use_parallel_residual),
    )

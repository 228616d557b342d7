"""Phi: attention and feed-forward network side by side after one LayerNorm, partial rotary positions, biases."""

from __future__ import annotations

from typing import Any

from pareto_cpu_runtime.families._common import activation_of, head_size, refuse, rotary_of
from pareto_cpu_runtime.families.description import Block, Decoder, Norm, whole


def describe(config: Any) -> Decoder:
    """Describe a model of this family by its transformers config."""
    refuse(config, "qk_layernorm", False, "the runtime normalises queries and keys by RMS only")
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
        final_norm=Norm(kind="layer", module="model.final_layernorm", epsilon=config.layer_norm_eps),
        head=whole("head", "lm_head"),
        rotary=rotary_of(config, "PhiRotaryEmbedding", int(head_dim * config.rope_parameters["partial_rotary_factor"])),
        config=config,
    )


def _block(config: Any, layer: int, activation: str) -> Block:
    at = f"model.layers.{layer}"
    norm = Norm(kind="layer", module=f"{at}.input_layernorm", epsilon=config.layer_norm_eps)
    attention = f"{at}.self_attn"
    return Block(
        attention_norm=norm,
        qkv=whole(f"{layer}.qkv", f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        out=whole(f"{layer}.out", f"{attention}.dense"),
        ffn_norm=norm,
        up=whole(f"{layer}.up", f"{at}.mlp.fc1", activation=activation),
        down=whole(f"{layer}.down", f"{at}.mlp.fc2"),
        parallel=True,
    )

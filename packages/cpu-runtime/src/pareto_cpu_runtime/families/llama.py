"""Llama and what is built like it: Mistral, Qwen2, Qwen3. RMSNorm, rotary positions, gated feed-forward network."""

from __future__ import annotations

from typing import Any

from pareto_cpu_runtime.families._common import activation_of, head_size, rotary_of
from pareto_cpu_runtime.families.description import Block, Decoder, Norm, whole

ROTARY = {
    "llama": "LlamaRotaryEmbedding",
    "mistral": "MistralRotaryEmbedding",
    "qwen2": "Qwen2RotaryEmbedding",
    "qwen3": "Qwen3RotaryEmbedding",
}


def describe(config: Any) -> Decoder:
    """Describe a model of this family by its transformers config."""
    head_dim = head_size(config)
    activation = activation_of(config, "hidden_act")
    blocks = tuple(_block(config, layer, activation) for layer in range(config.num_hidden_layers))
    return Decoder(
        model_type=config.model_type,
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        ffn=config.intermediate_size,
        scale=head_dim**-0.5,
        positions=config.max_position_embeddings,
        embedding="model.embed_tokens",
        blocks=blocks,
        final_norm=Norm(kind="rms", module="model.norm", epsilon=config.rms_norm_eps),
        head=whole("head", "lm_head"),
        rotary=rotary_of(config, ROTARY[config.model_type], head_dim),
        config=config,
    )


def _block(config: Any, layer: int, activation: str) -> Block:
    at = f"model.layers.{layer}"
    rms = {"kind": "rms", "epsilon": config.rms_norm_eps}
    normed_heads = config.model_type == "qwen3"
    attention, mlp = f"{at}.self_attn", f"{at}.mlp"
    return Block(
        attention_norm=Norm(module=f"{at}.input_layernorm", **rms),
        qkv=whole(f"{layer}.qkv", f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        out=whole(f"{layer}.out", f"{attention}.o_proj"),
        ffn_norm=Norm(module=f"{at}.post_attention_layernorm", **rms),
        up=whole(f"{layer}.up", f"{mlp}.gate_proj", f"{mlp}.up_proj", activation=activation, gated=True),
        down=whole(f"{layer}.down", f"{mlp}.down_proj"),
        window=window_of(config, layer),
        q_norm=Norm(module=f"{attention}.q_norm", **rms) if normed_heads else None,
        k_norm=Norm(module=f"{attention}.k_norm", **rms) if normed_heads else None,
    )


def window_of(config: Any, layer: int) -> int:
    """Positions that a token of ``layer`` sees, itself included; 0 for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return 0
    return int(getattr(config, "sliding_window", None) or 0)

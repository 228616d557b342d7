"""GPT-J: attention and feed-forward network side by side after one LayerNorm; neighbours are rotated in pairs."""

from __future__ import annotations

import functools
from typing import Any

from pareto_core.errors import ConfigError
from pareto_cpu_runtime.families._common import activation_of, sinusoid_table
from pareto_cpu_runtime.families.description import Block, Decoder, Norm, Rotary, whole


def describe(config: Any) -> Decoder:
    """Describe a model of this family by its transformers config."""
    head_dim = config.n_embd // config.n_head
    dim = config.rotary_dim
    if not dim or dim % 2 or dim > head_dim:
        raise ConfigError(type(config).__name__, "rotary_dim", dim, f"must be even, from 2 to {head_dim}")
    activation = activation_of(config, "activation_function")
    return Decoder(
        model_type=config.model_type,
        vocabulary=config.vocab_size,
        width=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        ffn=config.n_inner or 4 * config.n_embd,
        scale=head_dim**-0.5,
        positions=config.n_positions,
        embedding="transformer.wte",
        blocks=tuple(_block(config, layer, activation) for layer in range(config.n_layer)),
        final_norm=Norm(kind="layer", module="transformer.ln_f", epsilon=config.layer_norm_epsilon),
        head=whole("head", "lm_head"),
        rotary=Rotary(dim=dim, table=functools.partial(sinusoid_table, dim), interleaved=True),
        config=config,
    )


def _block(config: Any, layer: int, activation: str) -> Block:
    at = f"transformer.h.{layer}"
    norm = Norm(kind="layer", module=f"{at}.ln_1", epsilon=config.layer_norm_epsilon)
    return Block(
        attention_norm=norm,
        qkv=whole(f"{layer}.qkv", f"{at}.attn.q_proj", f"{at}.attn.k_proj", f"{at}.attn.v_proj"),
        out=whole(f"{layer}.out", f"{at}.attn.out_proj"),
        ffn_norm=norm,
        up=whole(f"{layer}.up", f"{at}.mlp.fc_in", activation=activation),
        down=whole(f"{layer}.down", f"{at}.mlp.fc_out"),
        parallel=True,
    )

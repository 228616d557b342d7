"""Falcon: multi-query or grouped attention out of one module, rotary positions or ALiBi, one or two LayerNorms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pareto_cpu_runtime.families._common import activation_of, rotary_of
from pareto_cpu_runtime.families.description import Block, Decoder, Norm, split_fused, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray


def describe(config: Any) -> Decoder:
    """Describe a model of this family by its transformers config."""
    head_dim = config.hidden_size // config.num_attention_heads
    activation = activation_of(config, "activation")
    return Decoder(
        model_type=config.model_type,
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads(config),
        head_dim=head_dim,
        ffn=config.ffn_hidden_size,
        scale=head_dim**-0.5,
        positions=config.max_position_embeddings,
        embedding="transformer.word_embeddings",
        blocks=tuple(_block(config, layer, activation, head_dim) for layer in range(config.num_hidden_layers)),
        final_norm=Norm(kind="layer", module="transformer.ln_f", epsilon=config.layer_norm_epsilon),
        head=whole("head", "lm_head"),
        rotary=None if config.alibi else rotary_of(config, "FalconRotaryEmbedding", head_dim),
        slopes=slopes(config.num_attention_heads, head_dim) if config.alibi else None,
        config=config,
    )


def kv_heads(config: Any) -> int:
    """Heads of keys and values: one where the model is multi-query."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _block(config: Any, layer: int, activation: str, head_dim: int) -> Block:
    at = f"transformer.h.{layer}"
    attention_norm, ffn_norm, parallel = _norms(config)
    layer_norm = {"kind": "layer", "epsilon": config.layer_norm_epsilon}
    module = f"{at}.self_attention.query_key_value"
    return Block(
        attention_norm=Norm(module=f"{at}.{attention_norm}", **layer_norm),
        qkv=split_fused(module, _pattern(config), head_dim, f"{layer}.qkv"),
        out=whole(f"{layer}.out", f"{at}.self_attention.dense"),
        ffn_norm=Norm(module=f"{at}.{ffn_norm}", **layer_norm),
        up=whole(f"{layer}.up", f"{at}.mlp.dense_h_to_4h", activation=activation),
        down=whole(f"{layer}.down", f"{at}.mlp.dense_4h_to_h"),
        parallel=parallel,
    )


def _norms(config: Any) -> tuple[str, str, bool]:
    two = config.num_ln_in_parallel_attn
    if two is None and config.new_decoder_architecture:
        two = 2
    if config.new_decoder_architecture and two == 2:
        return "ln_attn", "ln_mlp", True
    if config.parallel_attn:
        return "input_layernorm", "input_layernorm", True
    return "input_layernorm", "post_attention_layernorm", False


def _pattern(config: Any) -> NDArray[np.int64]:
    """Per head of the fused module: 0 for a query, 1 for a key, 2 for a value."""
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        return np.tile(np.array([0] * (heads // groups) + [1, 2]), groups)
    if config.multi_query:
        return np.array([0] * heads + [1, 2])
    return np.tile([0, 1, 2], heads)


def slopes(heads: int, head_dim: int) -> NDArray[np.float32]:
    """ALiBi slopes, which Falcon rounds to bf16 and scales like the scores.

    transformers also rounds slope times position to bf16; we do not, so far-off keys differ in the third digit.
    """
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** -(2.0 ** -(math.log2(power) - 3))
    every = base ** np.arange(1, power + 1)
    if power != heads:
        base = 2.0 ** -(2.0 ** -(math.log2(2 * power) - 3))
        every = np.concatenate((every, base ** np.arange(1, 2 * (heads - power), 2)))
    bits = every.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.ascontiguousarray(rounded.astype(np.uint32).view(np.float32) / np.float32(math.sqrt(head_dim)))

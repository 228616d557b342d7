"""MPT: LayerNorm without bias, ALiBi positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pareto_core.errors import UnsupportedError
from pareto_cpu_runtime.families.description import Block, Decoder, Norm, split_fused, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray


def describe(config: Any) -> Decoder:
    """Describe a model of this family by its transformers config."""
    attention = config.attn_config
    if attention.clip_qkv:
        raise UnsupportedError(f"mpt: attn_config.clip_qkv = {attention.clip_qkv!r} is not supported: set it to None")
    head_dim = config.d_model // config.n_heads
    return Decoder(
        model_type=config.model_type,
        vocabulary=config.vocab_size,
        width=config.d_model,
        heads=config.n_heads,
        kv_heads=config.n_heads,
        head_dim=head_dim,
        ffn=4 * config.d_model,
        scale=attention.softmax_scale or head_dim**-0.5,
        positions=config.max_seq_len,
        embedding="transformer.wte",
        blocks=tuple(_block(config, layer, head_dim) for layer in range(config.n_layers)),
        final_norm=Norm(kind="layer", module="transformer.norm_f", epsilon=config.layer_norm_epsilon),
        head=whole("head", "lm_head"),
        slopes=slopes(config.n_heads),
        config=config,
    )


def _block(config: Any, layer: int, head_dim: int) -> Block:
    at = f"transformer.blocks.{layer}"
    layer_norm = {"kind": "layer", "epsilon": config.layer_norm_epsilon}
    return Block(
        attention_norm=Norm(module=f"{at}.norm_1", **layer_norm),
        qkv=split_fused(f"{at}.attn.Wqkv", np.repeat([0, 1, 2], config.n_heads), head_dim, f"{layer}.qkv"),
        out=whole(f"{layer}.out", f"{at}.attn.out_proj"),
        ffn_norm=Norm(module=f"{at}.norm_2", **layer_norm),
        up=whole(f"{layer}.up", f"{at}.ffn.up_proj", activation="gelu"),
        down=whole(f"{layer}.down", f"{at}.ffn.down_proj"),
    )


def slopes(heads: int) -> NDArray[np.float32]:
    """ALiBi slopes 2^(-8 i / n), n the next power of two; where heads is none, every second one first."""
    power = 2 ** math.ceil(math.log2(heads))
    every = 1.0 / 2.0 ** (np.arange(1, power + 1, dtype=np.float32) * np.float32(8 / power))
    if power != heads:
        every = np.concatenate((every[1::2], every[::2]))[:heads]
    return np.ascontiguousarray(every, dtype=np.float32)

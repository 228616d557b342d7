"""Writes the random decoder as a GGUF file with Q4_0 weights, which llama.cpp repacks for this processor as it loads it.

Needs the package ``gguf`` (llama.cpp's own writer).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pareto_cpu_runtime.peers.geometry import BLOCK, Geometry, random_blocks, random_embedding

if TYPE_CHECKING:
    import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def q4_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the blocks of a matrix, (n, 18 * k / 32) uint8: fp16 scale, then 16 bytes with inputs i and 16 + i."""
    import numpy as np

    n, k = codes.shape
    blocks = codes.reshape(n, k // BLOCK, 2, BLOCK // 2)
    nibbles = blocks[:, :, 0] | (blocks[:, :, 1] << 4)
    return np.concatenate([scales[..., None].view(np.uint8), nibbles], axis=2).reshape(n, -1)


def neighbouring(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the outputs of a query or key projection: llama.cpp rotates neighbours, transformers halves of a head."""
    n = rows.shape[0]
    return rows.reshape(heads, 2, n // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(geometry: Geometry, path: Path) -> None:
    """Write the file."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(geometry.name)
    writer.add_vocab_size(geometry.vocabulary)
    writer.add_context_length(geometry.context)
    writer.add_embedding_length(geometry.width)
    writer.add_block_count(geometry.layers)
    writer.add_feed_forward_length(geometry.inner)
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_layer_norm_rms_eps(geometry.epsilon)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(geometry.theta)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
    ones = np.ones(geometry.width, np.float32)
    writer.add_tensor("token_embd.weight", random_embedding(geometry).astype(np.float16))
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(geometry.layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
    for name, n, k in geometry.matrices():
        blocks = q4_0(*random_blocks(name, n, k))
        place = "output"
        if name != "lm_head":
            _, _, layer, part = name.split(".", 3)
            place = f"blk.{layer}.{_NAMES[part]}"
            heads = {"attn_q": geometry.heads, "attn_k": geometry.kv_heads}.get(_NAMES[part])
            blocks = blocks if heads is None else neighbouring(blocks, heads)
        writer.add_tensor(f"{place}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

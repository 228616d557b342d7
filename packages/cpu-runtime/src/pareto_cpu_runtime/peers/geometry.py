"""A decoder of TinyLlama-1.1B's shape with random INT4 weights, the same ones for every runtime.

Timing does not depend on the values of weights, so no download is needed; that all runtimes hold the same values lets their
answers be compared before anything is timed.

A matrix is made of Q4_0's blocks, llama.cpp's format: 32 inputs share an fp16 scale d, a weight is d * (code - 8). Ours at
group size 32 is the same numbers in another order; at 128, four blocks of the same matrix share the first one's scale.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BLOCK = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of a Llama; defaults are TinyLlama-1.1B's."""

    name: str = "TinyLlama-1.1B"
    vocabulary: int = 32000
    width: int = 2048
    inner: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    context: int = 2048
    epsilon: float = 1e-5
    theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name as in transformers, outputs n, inputs k) of every quantised matrix."""
        kv = self.kv_heads * self.head_dim
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_proj", self.width, self.width
            yield f"{at}.self_attn.k_proj", kv, self.width
            yield f"{at}.self_attn.v_proj", kv, self.width
            yield f"{at}.self_attn.o_proj", self.width, self.width
            yield f"{at}.mlp.gate_proj", self.inner, self.width
            yield f"{at}.mlp.up_proj", self.inner, self.width
            yield f"{at}.mlp.down_proj", self.width, self.inner
        yield "lm_head", self.vocabulary, self.width

    def config(self) -> dict[str, object]:
        """The sizes as transformers' ``LlamaConfig`` names them."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.theta,
            "tie_word_embeddings": False,
        }


def random_of(name: str) -> np.random.Generator:
    """A generator that depends on the matrix's name alone, so that each runtime's writer makes the same numbers."""
    import numpy as np

    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def random_blocks(name: str, n: int, k: int, group: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Return codes (n, k) uint8 of 0..15 and scales (n, k / 32) fp16, equal within groups of ``group`` inputs.

    The scales keep the size of what passes through: weights have a standard deviation of about 1 / sqrt(k).
    """
    import numpy as np

    random = random_of(name)
    codes = random.integers(0, 16, (n, k), dtype=np.uint8)
    # Codes are uniform: their standard deviation is sqrt(255 / 12) = 4.6.
    scales = (random.uniform(0.8, 1.2, (n, k // group)) / (4.61 * k**0.5)).astype(np.float16)
    return codes, np.repeat(scales, group // BLOCK, axis=1)


def random_embedding(geometry: Geometry) -> np.ndarray:
    """Return the embedding table (vocabulary, width), fp16 values in fp32."""
    import numpy as np

    table = random_of("embed").standard_normal((geometry.vocabulary, geometry.width), dtype=np.float32)
    return table.astype(np.float16).astype(np.float32)

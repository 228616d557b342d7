"""The temporal block of each row of the ladder, by the name of its mixer.

Shapes and ways to run are those of :mod:`pareto_sequence.blocks`. The classes add to attention and EMA what whole
models need of them: the mask of a padded batch reaches norms and TCN, and ``prefill`` reads a prompt at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_core.errors import UnsupportedError
from pareto_sequence.attention import (
    BlockState,
    ChunkedGatedSingleHeadAttention,
    ChunkedMultiHeadAttention,
    ChunkState,
    MovingAverageGatedAttention,
)
from pareto_sequence.blocks import Cascade, DenseAttention, Residual
from pareto_sequence.configuration import SequenceConfig
from pareto_sequence.ema import DampedEMA
from pareto_sequence.norms import make_norm
from pareto_sequence.tcn import TCN

#: positions whose contributions to the EMA's state are summed at once
PREFILL_BLOCK = 256


class MaskedEMA(DampedEMA):
    """A damped EMA in a model: what the mask hides is zero already, and zeros add nothing."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to the same shape; positions where ``mask`` is 0 must hold zeros."""
        return super().forward(x)

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, L, D) to the same shape and return the averages after the last position, float64 (B, D, N)."""
        if self.bidirectional:
            raise UnsupportedError("an EMA that runs both ways has no state: an output needs the end of the sequence")
        return self(x), self.state_after(x)

    @torch.no_grad()
    def state_after(self, x: Tensor) -> Tensor:
        """Return h (B, D, N) after ``x`` (B, L, D): the sum over t of q^(L - 1 - t) alpha beta x_t, in float64."""
        alpha, delta = self.alpha_logit.double().sigmoid(), self.delta_logit.double().sigmoid()
        kept = 1 - alpha * delta
        powers = kept[..., None] ** torch.arange(PREFILL_BLOCK, device=x.device, dtype=torch.float64)
        state = x.new_zeros(len(x), self.width, self.state_size, dtype=torch.float64)
        for block in x.double().split(PREFILL_BLOCK, 1):
            length = block.shape[1]
            # Eq. (7.2), unrolled over the block: the last position has power 0.
            state = kept**length * state + torch.einsum("bld,dnl->bdn", block.flip(1), powers[..., :length])
        return alpha * self.beta.double() * state


class GatedBlock(MovingAverageGatedAttention):
    """Moving-average gated attention (figure 7.3) in a model: norm, mixer, chunked attention, gated residual."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to the same shape; the mixer sees zeros where ``mask`` hides a position."""
        self._check(x, mask)
        normed = self.norm(x, mask) if self.prenorm else x
        if mask is not None:
            normed = normed.masked_fill(~mask.bool()[..., None], 0.0)
        q, k, v, *gates = self._project(normed, self.mixer(normed, mask))
        out = self._combine(x, self.attention(q, k, v, mask), *gates)
        return out if self.prenorm else self.norm(out, mask)

    def prefill(self, x: Tensor) -> tuple[Tensor, BlockState]:
        """Map (B, L, D) to the same shape and return the state after the last position."""
        self._check(x, None)
        normed = self.norm(x) if self.prenorm else x
        mixed, mixer_state = self.mixer.prefill(normed)
        q, k, v, *gates = self._project(normed, mixed)
        out = self._combine(x, self.attention(q, k, v), *gates)
        state = BlockState(mixer_state, open_chunk(k, v, self.chunk_size))
        return out if self.prenorm else self.norm(out), state


class MultiHeadBlock(ChunkedMultiHeadAttention):
    """Chunked multi-head attention (option 1 of figure 7.4) in a model."""

    def prefill(self, x: Tensor) -> tuple[Tensor, ChunkState]:
        """Map (B, L, D) to the same shape and return the keys and values of the chunk that is still open."""
        self._check(x, None)
        q, k, v = self.expand(x).chunk(3, -1)
        return self.contract(self.attention(q, k, v)), open_chunk(k, v, self.chunk_size)


class GatedSingleHeadBlock(ChunkedGatedSingleHeadAttention):
    """Chunked gated single-head attention (option 2 of figure 7.4) in a model."""

    def prefill(self, x: Tensor) -> tuple[Tensor, ChunkState]:
        """Map (B, L, D) to the same shape and return the keys and values of the chunk that is still open."""
        self._check(x, None)
        z, v, r = F.silu(self.expand(x)).chunk(3, -1)
        q, k = self.shared(z)
        return self.contract(self.attention(q, k, v) * r), open_chunk(k, v, self.chunk_size)


def open_chunk(keys: Tensor, values: Tensor, chunk_size: int | None) -> ChunkState:
    """Return the keys and values (B, L, ...) after the last full chunk; copies, so that prompt and graph are let go."""
    start = 0 if chunk_size is None else keys.shape[1] // chunk_size * chunk_size
    return ChunkState(keys[:, start:].detach().clone(), values[:, start:].detach().clone())


def make_temporal(config: SequenceConfig) -> nn.Module:
    """Return the temporal block, norm and residual included, that ``config.mixer`` names."""
    if config.mixer in ("mega", "tcnca"):
        return _gated(config)
    if config.mixer == "transformer":
        inner: nn.Module = DenseAttention(
            config.hidden_size,
            config.num_heads,
            causal=config.causal,
            rotary=config.positions == "rotary",
            dropout=config.attention_dropout,
        )
    elif config.mixer == "tcn":
        inner = make_tcn(config)
    else:
        inner = Cascade(make_tcn(config), _chunked(config))
    return Residual(inner, config.hidden_size, config.norm, config.prenorm, config.dropout)


def make_tcn(config: SequenceConfig) -> TCN:
    """Return the TCN of one layer: zeros on the left in a decoder, wrapped around in an encoder."""
    return TCN(
        config.hidden_size,
        config.kernel_size,
        config.dilation_factor,
        config.tcn_depth,
        norm=config.tcn_norm,
        circular=not config.causal,
        omega=config.tcn_omega,
        implementation=config.conv_implementation,
    )


def make_ema(config: SequenceConfig) -> MaskedEMA:
    """Return the damped EMA of one layer: forwards in a decoder, both ways in an encoder."""
    return MaskedEMA(
        config.hidden_size,
        config.state_size,
        bidirectional=not config.causal,
        algorithm=config.ema_algorithm,
    )


def _gated(config: SequenceConfig) -> GatedBlock:
    return GatedBlock(
        config.hidden_size,
        config.value_size,
        config.shared_size,
        mixer=make_ema(config) if config.mixer == "mega" else make_tcn(config),
        norm=make_norm(config.norm, config.hidden_size),
        prenorm=config.prenorm,
        chunk_size=config.chunk_size,
        attention=config.attention,
        bias=config.bias,
        causal=config.causal,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        max_length=config.max_position_embeddings,
    )


def _chunked(config: SequenceConfig) -> nn.Module:
    if config.mixer == "tcncmha":
        return MultiHeadBlock(
            config.hidden_size,
            config.num_heads,
            config.chunk_size,
            causal=config.causal,
            attention=config.attention,
            bias=config.bias,
            attention_dropout=config.attention_dropout,
            max_length=config.max_position_embeddings,
        )
    return GatedSingleHeadBlock(
        config.hidden_size,
        config.chunk_size,
        causal=config.causal,
        attention=config.attention,
        bias=config.bias,
        attention_dropout=config.attention_dropout,
        max_length=config.max_position_embeddings,
    )

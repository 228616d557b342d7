"""The attention blocks of MEGA and TCNCA, and the two simpler ones of Fig. 7.4.

X. Ma et al., "Mega: Moving Average Equipped Gated Attention", ICLR 2023, https://arxiv.org/abs/2209.10655 (formulas
and initialisation); A. Terzić et al., "TCNCA", https://arxiv.org/abs/2312.05605 (Figs. 7.3 and 7.4).

==========  ========================  =====================================================================
symbol      shape                     meaning
==========  ========================  =====================================================================
D, E, S     –                         width, ``value_size``, ``shared_size`` of queries and keys
x, x̂        (B, L, D)                 the input, and its norm
m           (B, L, D)                 the mixer's output: a damped EMA (MEGA) or a TCN (TCNCA) over x̂
z, q, k     (B, L, S)                 shared representation; queries and keys, z ⊙ γ + β each
v, r        (B, L, E)                 values, from x̂; gate of what was attended to
u, h        (B, L, D)                 gate between the candidate h and the input
==========  ========================  =====================================================================

All blocks map (B, L, D) to (B, L, D), attend within chunks (:mod:`pareto_sequence.chunks`), and step token by token
where they are causal. ``mask`` (B, L) is True, or not 0, at real tokens; what the rest holds never reaches a real one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.chunks import (
    BiasKind,
    ChunkAttention,
    ChunkState,
    Kind,
    RotaryBias,
    SimpleBias,
    attend,
    join_chunks,
    split_chunks,
)

__all__ = [
    "BlockState",
    "ChunkState",
    "ChunkedGatedSingleHeadAttention",
    "ChunkedMultiHeadAttention",
    "MovingAverageGatedAttention",
    "RotaryBias",
    "SimpleBias",
    "attend",
    "join_chunks",
    "split_chunks",
]

#: Deviation of every linear layer and of the queries' and keys' γ at the start.
DEVIATION = 0.02


class BlockState(NamedTuple):
    """What a block remembers between steps: its mixer's state, and its attention's."""

    mixer: Any
    attention: ChunkState


class _Block(nn.Module):
    """What the blocks share: a width, attention within chunks, checks."""

    width: int
    attention: ChunkAttention

    @property
    def chunk_size(self) -> int | None:
        """Tokens per chunk, None for the whole sequence; may be set to more than in training."""
        return self.attention.chunk_size

    @chunk_size.setter
    def chunk_size(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ModelError(f"{type(self).__name__}: chunk_size = {value}: must be at least 1, or None")
        self.attention.chunk_size = value

    def _check(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        name, shape = type(self).__name__, tuple(x.shape)
        if len(shape) != 3 or shape[2] != self.width or shape[1] == 0:
            raise ModelError(f"{name}: input is {shape}, must be (B, L, D) with L at least 1 and D = {self.width}")
        if mask is not None and tuple(mask.shape) != shape[:2]:
            raise ModelError(f"{name}: mask is {tuple(mask.shape)}, must be (B, L) = {shape[:2]}")

    def _check_step(self, x: torch.Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.width:
            raise ModelError(
                f"{type(self).__name__}.step: input is {tuple(x.shape)}, must be (B, D) with D = {self.width}"
            )


class _Shared(nn.Module):
    """Queries and keys from one representation: z ⊙ γ + β for each, z (…, S)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(2, size))
        self.beta = nn.Parameter(torch.empty(2, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ around 0, β = 0."""
        nn.init.normal_(self.gamma, std=DEVIATION)
        nn.init.zeros_(self.beta)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k."""
        return torch.addcmul(self.beta[0], z, self.gamma[0]), torch.addcmul(self.beta[1], z, self.gamma[1])


class MovingAverageGatedAttention(_Block):
    """MEGA's temporal block (Fig. 7.3) around any mixer, with its norm and its gated residual connection.

    ``mixer`` maps (B, L, D) to (B, L, D): a damped EMA or a TCN; to step it needs ``step(x (B, D), state)``.
    ``norm`` is applied to the input, or with ``prenorm`` off to the output; default none.
    ``dropout`` acts on m, ``attention_dropout`` on the attention's weights, ``hidden_dropout`` on what was attended to.
    ``max_length`` sizes the simple bias's table where ``chunk_size`` is None.
    """

    def __init__(
        self,
        width: int,
        value_size: int,
        shared_size: int,
        *,
        mixer: nn.Module,
        norm: nn.Module | None = None,
        prenorm: bool = True,
        chunk_size: int | None = None,
        attention: Kind = "softmax",
        bias: BiasKind = "rotary",
        causal: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("value_size", value_size), ("shared_size", shared_size)):
            if value < 1:
                raise ModelError(f"MovingAverageGatedAttention: {name} = {value}: must be at least 1")
        self.width, self.prenorm = width, prenorm
        self.sizes = [width, shared_size, value_size, width]
        self.mixer = mixer
        self.norm = nn.Identity() if norm is None else norm
        self.value = _linear(width, value_size)
        self.expand = _linear(width, sum(self.sizes))
        self.shared = _Shared(shared_size)
        self.attention = ChunkAttention(
            shared_size,
            chunk_size,
            kind=attention,
            bias=bias,
            causal=causal,
            dropout=attention_dropout,
            max_length=max_length,
        )
        self.contract = _linear(value_size, width)
        self.dropout, self.hidden_dropout = nn.Dropout(dropout), nn.Dropout(hidden_dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the block's output for ``x`` (B, L, D). The mixer sees zeros where ``mask`` hides a token.

        Raises :class:`ModelError` for a length of zero and shapes that do not fit.
        """
        self._check(x, mask)
        normed = _hide(self.norm(x) if self.prenorm else x, mask)
        q, k, v, *gates = self._project(normed, self.mixer(normed))
        out = self._combine(x, self.attention(q, k, v, mask), *gates)
        return out if self.prenorm else self.norm(out)

    def step(self, x: torch.Tensor, state: BlockState | None = None) -> tuple[torch.Tensor, BlockState]:
        """Take one token ``x`` (B, D) and return (y (B, D), state); the state is None at the start.

        Raises :class:`UnsupportedError` where the block is not causal or its mixer cannot step.
        """
        self._check_step(x)
        if not callable(getattr(self.mixer, "step", None)):
            raise UnsupportedError(f"MovingAverageGatedAttention.step: {type(self.mixer).__name__} has no step")
        mixer_state, chunk = (None, None) if state is None else state
        normed = self._norm_token(x) if self.prenorm else x
        mixed, mixer_state = self.mixer.step(normed, mixer_state)
        q, k, v, *gates = self._project(normed, mixed)
        attended, chunk = self.attention.step(q, k, v, chunk)
        out = self._combine(x, attended, *gates)
        return out if self.prenorm else self._norm_token(out), BlockState(mixer_state, chunk)

    def _norm_token(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x[:, None])[:, 0]

    def _project(self, normed: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v, and the gates u, r and the candidate's part hx."""
        v = F.silu(self.value(normed))
        u, z, r, hx = self.expand(self.dropout(mixed)).split(self.sizes, -1)
        return *self.shared(F.silu(z)), v, u.sigmoid(), F.silu(r), hx

    def _combine(
        self, x: torch.Tensor, attended: torch.Tensor, u: torch.Tensor, r: torch.Tensor, hx: torch.Tensor
    ) -> torch.Tensor:
        h = F.silu(hx + self.contract(self.hidden_dropout(attended) * r))
        return torch.addcmul(x, u, h - x)


class ChunkedMultiHeadAttention(_Block):
    """Multi-head attention within chunks (option 1 of Fig. 7.4): q, k and v are D wide over all ``heads``.

    There is neither norm nor residual connection. With ``chunk_size`` None it is a Transformer's attention. Each head
    has a relative bias of its own.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        chunk_size: int | None = None,
        *,
        causal: bool = True,
        attention: Kind = "softmax",
        bias: BiasKind = "rotary",
        attention_dropout: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.attention = ChunkAttention(
            width,
            chunk_size,
            heads=heads,
            kind=attention,
            bias=bias,
            causal=causal,
            dropout=attention_dropout,
            max_length=max_length,
        )
        self.expand = _linear(width, 3 * width)
        self.contract = _linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within the chunks of ``x`` (B, L, D). Raises :class:`ModelError` for shapes that do not fit."""
        self._check(x, mask)
        return self.contract(self.attention(*self.expand(_hide(x, mask)).chunk(3, -1), mask))

    def step(self, x: torch.Tensor, state: ChunkState | None = None) -> tuple[torch.Tensor, ChunkState]:
        """Take one token ``x`` (B, D) and return (y (B, D), state); the state is None at the start."""
        self._check_step(x)
        attended, state = self.attention.step(*self.expand(x).chunk(3, -1), state)
        return self.contract(attended), state


class ChunkedGatedSingleHeadAttention(_Block):
    """Gated attention with one head within chunks (option 2 of Fig. 7.4), as in the gated attention unit.

    z, v and r are D wide, SiLU of projections of the input; q and k are z ⊙ γ + β; the output is W_h(attended ⊙ r),
    with neither norm nor residual connection (W. Hua et al., https://arxiv.org/abs/2202.10447).
    """

    def __init__(
        self,
        width: int,
        chunk_size: int | None = None,
        *,
        causal: bool = True,
        attention: Kind = "softmax",
        bias: BiasKind = "rotary",
        attention_dropout: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.attention = ChunkAttention(
            width,
            chunk_size,
            kind=attention,
            bias=bias,
            causal=causal,
            dropout=attention_dropout,
            max_length=max_length,
        )
        self.expand = _linear(width, 3 * width)
        self.shared = _Shared(width)
        self.contract = _linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within the chunks of ``x`` (B, L, D). Raises :class:`ModelError` for shapes that do not fit."""
        self._check(x, mask)
        z, v, r = F.silu(self.expand(_hide(x, mask))).chunk(3, -1)
        return self.contract(self.attention(*self.shared(z), v, mask) * r)

    def step(self, x: torch.Tensor, state: ChunkState | None = None) -> tuple[torch.Tensor, ChunkState]:
        """Take one token ``x`` (B, D) and return (y (B, D), state); the state is None at the start."""
        self._check_step(x)
        z, v, r = F.silu(self.expand(x)).chunk(3, -1)
        attended, state = self.attention.step(*self.shared(z), v, state)
        return self.contract(attended * r), state


def _hide(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros where ``mask`` (B, L) hides a token: a weight of 0 would not stop an infinity there."""
    return x if mask is None else x.masked_fill(~mask.bool()[..., None], 0.0)


def _linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=DEVIATION)
    nn.init.zeros_(layer.bias)
    return layer

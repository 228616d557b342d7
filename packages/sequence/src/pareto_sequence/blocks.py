"""What a layer is made of: a temporal block of either kind, a position-wise network, dense attention.

Every part maps (B, L, D) to (B, L, D) by ``forward(x, mask)``, where ``mask`` (B, L) is nonzero at valid positions and
None where all are. Decoders have two more ways: ``prefill(x)`` returns the state after the last position as well, and
``step(x, state)`` advances by one position, x and y (B, D).

With ``prenorm`` a residual part computes x + f(norm(x)), else norm(x + f(x)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_core.errors import ModelError
from pareto_sequence.norms import make_norm


class Residual(nn.Module):
    """Adds what ``inner`` makes of its normalised input; the norm stands before or, in post-norm, after the sum."""

    def __init__(self, inner: nn.Module, width: int, norm: str, prenorm: bool, dropout: float) -> None:
        super().__init__()
        self.inner, self.prenorm = inner, prenorm
        self.norm = make_norm(norm, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to the same shape."""
        return self._leave(x, self.inner(self._enter(x, mask), mask), mask)

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        """Map (B, L, D) to the same shape and return the inner state after it."""
        y, state = self.inner.prefill(self._enter(x, None))
        return self._leave(x, y, None), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Advance by one position, x (B, D)."""
        y, state = self.inner.step(self._enter(x, None), state)
        return self._leave(x, y, None), state

    def _enter(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.norm(x, mask) if self.prenorm else x

    def _leave(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        total = x + self.dropout(y)
        return total if self.prenorm else self.norm(total, mask)


class Cascade(nn.Module):
    """Parts one after another: a TCN whose output goes into attention."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to the same shape."""
        for part in self.parts:
            x = part(x, mask)
        return x

    def prefill(self, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """Map (B, L, D) to the same shape and return each part's state."""
        states = []
        for part in self.parts:
            x, state = part.prefill(x)
            states.append(state)
        return x, tuple(states)

    def step(self, x: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Advance every part by one position, x (B, D)."""
        states = []
        for part, own in zip(self.parts, state, strict=True):
            x, new = part.step(x, own)
            states.append(new)
        return x, tuple(states)


class FeedForward(nn.Module):
    """Position-wise network: W_2 dropout(SiLU(W_1 x + b_1)) + b_2, from D to ``inner_size`` and back."""

    def __init__(self, width: int, inner_size: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner_size)
        self.down = nn.Linear(inner_size, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (..., D) to the same shape; ``mask`` changes nothing."""
        return self.down(self.dropout(F.silu(self.up(x))))


class DenseAttention(nn.Module):
    """Softmax attention of ``heads`` heads over the whole sequence: the Transformer baseline's mixer.

    With ``rotary`` (Su et al. 2021) queries and keys are turned by an angle that grows with their position.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, rotary: bool, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width % heads or (rotary and width // heads % 2):
            raise ModelError(f"heads = {heads}: must divide the width {width}, into even parts for rotary positions")
        self.heads, self.causal, self.rotary, self.dropout = heads, causal, rotary, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to the same shape; keys where ``mask`` is 0 are not attended to, whatever is there."""
        if mask is not None:
            x = x.masked_fill(~mask.bool()[..., None], 0.0)  # a weight of 0 would not stop an infinity
        return self._attend(x, mask)[0]

    def prefill(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map (B, L, D) to the same shape and return keys and values, (B, heads, L, D / heads), outside the graph."""
        y, (k, v) = self._attend(x, None)
        return y, (k.detach(), v.detach())

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Advance by one position, x (B, D); the state grows by one key and value."""
        q, k, v = self._split(x[:, None], state[0].shape[2])
        k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
        return self._join(F.scaled_dot_product_attention(q, k, v))[:, 0], (k, v)

    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self._split(x, 0)
        visible = None
        if mask is not None:
            visible = mask.bool()[:, None, None, :]
            if self.causal:
                visible = visible & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            # A position that sees nothing would be 0 / 0; it sees itself instead, and nobody reads it.
            visible = visible | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        dropout = self.dropout if self.training else 0.0
        alone = self.causal and mask is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=alone)
        return self._join(y), (k, v)

    def _split(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = rotate(q, start), rotate(k, start)
        return q, k, v

    def _join(self, y: Tensor) -> Tensor:
        return self.output(y.transpose(1, 2).flatten(2))


def angles(length: int, width: int, start: int, device: torch.device) -> Tensor:
    """Return position times 10000^(-2i / width) for positions from ``start``, in fp32 (length, width // 2)."""
    rates = 10000.0 ** (-torch.arange(0, width - 1, 2, device=device, dtype=torch.float32) / width)
    return torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * rates


def rotate(x: Tensor, start: int) -> Tensor:
    """Turn the two halves of x (..., L, width) against each other by the angles of its positions."""
    angle = angles(x.shape[-2], x.shape[-1], start, x.device)
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def sinusoids(length: int, width: int, start: int, device: torch.device) -> Tensor:
    """Return sines and cosines of the positions' angles, fp32 (length, width), width even."""
    angle = angles(length, width, start, device)
    return torch.cat([angle.sin(), angle.cos()], -1)

"""Attention within chunks: softmax and Laplace weights, relative biases, and the cut of a sequence into chunks.

A sequence of L tokens is cut into chunks of n = ``chunk_size``, which never attend across. Where L is not a multiple of
n, the last chunk is filled up with tokens that nothing sees and whose outputs are dropped; a sequence shorter than n is
one chunk of L.

The formulas are MEGA's (X. Ma et al., https://arxiv.org/abs/2209.10655); the rotary bias turns the vectors of J. Su et
al., "RoFormer", https://arxiv.org/abs/2104.09864. Queries q and keys k are (…, n, S), values v (…, n, E).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pareto_core.errors import ModelError, UnsupportedError

Kind = Literal["softmax", "laplace"]
BiasKind = Literal["simple", "rotary", "none"]
KINDS = ("softmax", "laplace")
BIASES = ("simple", "rotary", "none")

#: Mean and deviation of the Laplace function, ½(1 + erf((x − μ) / (σ√2))): close to ReLU², yet bounded.
LAPLACE_MEAN = math.sqrt(0.5)
LAPLACE_DEVIATION = math.sqrt(0.25 / math.pi)


def laplace(x: torch.Tensor) -> torch.Tensor:
    """½(1 + erf((x − √½) / (σ√2))) with σ = √(1/4π), for each element."""
    return 0.5 * (1 + torch.erf((x - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    kind: Kind = "softmax",
    causal: bool = False,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend from ``q`` (…, n, S) to ``k`` (…, m, S) and return the weighted ``v`` (…, m, E): (…, n, E).

    ``bias`` is added to the scores (…, n, m); ``mask`` (…, m) is True at the keys that may be seen; ``causal`` lets a
    query see the keys up to its own position. softmax: scores q·k / √S, hidden keys at −∞. laplace: scores q·k divided
    by the number of keys that the query sees, hidden keys multiplied by 0. Weights are computed in fp32 at least. A
    query that sees nothing gets 0. ``dropout`` is applied to the weights.

    Raises :class:`ModelError` for an unknown kind, shapes that do not fit, and ``causal`` where n ≠ m.
    """
    if kind not in KINDS:
        raise ModelError(f"attend: kind = {kind!r}: one of {', '.join(KINDS)}")
    n, m = q.shape[-2], k.shape[-2]
    if q.shape[-1] != k.shape[-1] or v.shape[-2] != m or (causal and n != m):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ModelError(f"attend: {shapes}: must be (…, n, S), (…, m, S), (…, m, E){', n = m' if causal else ''}")
    if bias is not None and (bias.dim() > q.dim() or bias.shape[-2:] != (n, m)):
        raise ModelError(
            f"attend: bias {tuple(bias.shape)}: must be (…, n, m) = (…, {n}, {m}) and fit q {tuple(q.shape)}"
        )
    visible = torch.ones(n, m, dtype=torch.bool, device=q.device).tril() if causal else None
    if mask is not None:
        seen = mask.bool()[..., None, :]
        visible = seen if visible is None else visible & seen
    weigh = _softmax_weights if kind == "softmax" else _laplace_weights
    weights = weigh(q, k, bias, visible, mask is not None)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.matmul(weights.to(v.dtype), v)


def _softmax_weights(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, visible: torch.Tensor | None, blind: bool
) -> torch.Tensor:
    """``blind`` says that a query may see nothing: −∞ throughout would give NaN there."""
    scores = _products(q * q.shape[-1] ** -0.5, k)
    if visible is not None and not blind:
        # One small sum for all chunks, rather than a pass over the scores of each.
        bias = scores.new_zeros(visible.shape) if bias is None else bias
        bias = bias.masked_fill(~visible, -math.inf)
    if bias is not None:
        scores += bias
    if visible is None or not blind:
        return scores.softmax(-1)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~visible, 0.0)


def _laplace_weights(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, visible: torch.Tensor | None, blind: bool
) -> torch.Tensor:
    scores = _products(q, k)
    scores = scores / (k.shape[-2] if visible is None else visible.sum(-1, keepdim=True).clamp(min=1))
    if bias is not None:
        scores = scores + bias
    weights = laplace(scores)
    return weights if visible is None else weights * visible


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2))
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def chunk_length(length: int, chunk_size: int | None) -> int:
    """Return n, the tokens of a chunk of ``length`` tokens. Raises :class:`ModelError` where either is below 1."""
    _at_least_one("chunks", length=length, chunk_size=length if chunk_size is None else chunk_size)
    return length if chunk_size is None else min(chunk_size, length)


def split_chunks(x: torch.Tensor, chunk_size: int | None) -> torch.Tensor:
    """Cut ``x`` (B, L, W) into (B, C, n, W), zeros after L; n is ``chunk_size``, L where that is shorter or None."""
    length = x.shape[1]
    n = chunk_length(length, chunk_size)
    return F.pad(x, (0, 0, 0, -length % n)).unflatten(1, (-1, n))


def join_chunks(chunks: torch.Tensor, length: int) -> torch.Tensor:
    """Undo :func:`split_chunks`: (B, C, n, W) to (B, ``length``, W)."""
    return chunks.flatten(1, 2)[:, :length]


def chunk_mask(
    mask: torch.Tensor | None, length: int, chunk_size: int | None, device: torch.device
) -> torch.Tensor | None:
    """Return which tokens of :func:`split_chunks` are real, (B or 1, C, n), or None where all are.

    ``mask`` (B, L) is True, or not 0, at real tokens; None where the caller filled nothing up.
    """
    n = chunk_length(length, chunk_size)
    if mask is None:
        if length % n == 0:
            return None
        mask = torch.ones(1, length, dtype=torch.bool, device=device)
    return F.pad(mask.bool(), (0, -length % n)).unflatten(1, (-1, n))


class RelativeBias(nn.Module):
    """A bias on the scores that depends on how far a key lies from the query, j − i; one per head."""

    def between(self, first: int, last: int) -> torch.Tensor:
        """Return the biases (H, last − first + 1) of the offsets j − i = first … last."""
        raise TypeError(f"{type(self).__name__} must define between(first, last)")

    def forward(self, length: int) -> torch.Tensor:
        """Return the biases (H, length, length) of all pairs of positions."""
        return self.between(1 - length, length - 1).unfold(-1, length, 1).flip(-2)


class SimpleBias(RelativeBias):
    """A learned number for every offset within ``chunk`` tokens: a table (H, 2·chunk − 1)."""

    def __init__(self, chunk: int, heads: int = 1) -> None:
        super().__init__()
        _at_least_one("SimpleBias", chunk=chunk, heads=heads)
        self.chunk = chunk
        self.table = nn.Parameter(torch.empty(heads, 2 * chunk - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table."""
        nn.init.normal_(self.table, std=0.02)

    def between(self, first: int, last: int) -> torch.Tensor:
        """See :class:`RelativeBias`. Raises :class:`ModelError` for offsets that the table does not have."""
        reach = max(-first, last)
        if reach >= self.chunk:
            raise ModelError(
                f"SimpleBias: {reach + 1} tokens attend to each other, but the table is for chunk = {self.chunk}; "
                "use chunks of at most that, or the rotary bias, which has no table"
            )
        return self.table[:, self.chunk - 1 + first : self.chunk + last]


class RotaryBias(RelativeBias):
    """The product of two learned vectors (H, width), one turned by the query's position, one by the key's.

    With θ_s = 10000^(−2s/width), half a vector paired with its other half, (R_i α)·(R_j β) depends on j − i alone:
    Σ_s (α_s β_s + α'_s β'_s) cos((j − i)θ_s) + (α'_s β_s − α_s β'_s) sin((j − i)θ_s). It holds at any distance;
    ``chunk`` is the length that it is trained on, and limits nothing.
    """

    def __init__(self, chunk: int, width: int, heads: int = 1) -> None:
        super().__init__()
        _at_least_one("RotaryBias", chunk=chunk, width=width, heads=heads)
        if width % 2:
            raise ModelError(f"RotaryBias: width = {width}: must be even, since halves turn in pairs")
        self.chunk, self.width = chunk, width
        self.alpha = nn.Parameter(torch.empty(heads, width))
        self.beta = nn.Parameter(torch.empty(heads, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both vectors."""
        nn.init.normal_(self.alpha, std=0.02)
        nn.init.normal_(self.beta, std=0.02)

    def between(self, first: int, last: int) -> torch.Tensor:
        """See :class:`RelativeBias`; fp32 at least, whatever the module's dtype."""
        dtype = torch.promote_types(self.alpha.dtype, torch.float32)
        a, a_other = self.alpha.to(dtype).chunk(2, -1)
        b, b_other = self.beta.to(dtype).chunk(2, -1)
        half = self.width // 2
        frequencies = 10000 ** (-torch.arange(half, dtype=dtype, device=a.device) / half)
        angles = torch.arange(first, last + 1, dtype=dtype, device=a.device) * frequencies[:, None]
        return (a * b + a_other * b_other) @ angles.cos() + (a_other * b - a * b_other) @ angles.sin()


class ChunkState(NamedTuple):
    """What stepping remembers: keys (B, t, H·S) and values (B, t, E) of the t tokens of the current chunk so far."""

    keys: torch.Tensor
    values: torch.Tensor


class ChunkAttention(nn.Module):
    """Attention with a relative bias within chunks; the projections are the caller's.

    ``key_width`` is H·S, the width of queries and keys over all ``heads``. ``chunk_size`` may be changed at any time;
    None takes the whole sequence as one chunk, and then ``max_length`` sizes the table of the simple bias.
    Raises :class:`ModelError` for unknown names and sizes that do not fit.
    """

    def __init__(
        self,
        key_width: int,
        chunk_size: int | None,
        *,
        heads: int = 1,
        kind: Kind = "softmax",
        bias: BiasKind = "rotary",
        causal: bool = True,
        dropout: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        _at_least_one("ChunkAttention", key_width=key_width, heads=heads)
        if key_width % heads:
            raise ModelError(f"ChunkAttention: heads = {heads}: must divide the width {key_width}")
        if chunk_size is not None:
            _at_least_one("ChunkAttention", chunk_size=chunk_size)
        for name, value, allowed in (("attention", kind, KINDS), ("bias", bias, BIASES)):
            if value not in allowed:
                raise ModelError(f"ChunkAttention: {name} = {value!r}: one of {', '.join(allowed)}")
        if not 0 <= dropout < 1:
            raise ModelError(f"ChunkAttention: dropout = {dropout}: must be at least 0 and below 1")
        self.heads, self.kind, self.causal = heads, kind, causal
        self.chunk_size, self.dropout = chunk_size, dropout
        self.bias = _make_bias(bias, chunk_size if chunk_size is not None else max_length, key_width // heads, heads)

    def extra_repr(self) -> str:
        """Show what the parameters do not."""
        return f"chunk_size={self.chunk_size}, heads={self.heads}, {self.kind}, causal={self.causal}"

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend within the chunks of q, k (B, L, H·S) and v (B, L, E); ``mask`` (B, L) is True at real tokens."""
        length, n = q.shape[1], chunk_length(q.shape[1], self.chunk_size)
        if self.causal and mask is None:
            real = None  # what fills up the last chunk comes after all that counts
        else:
            real = chunk_mask(mask, length, self.chunk_size, q.device)
            real = None if real is None else real[:, :, None]
        q, k, v = (self._by_head(split_chunks(x, self.chunk_size)) for x in (q, k, v))
        bias = None if self.bias is None else self.bias(n)
        attended = attend(q, k, v, bias, self.kind, self.causal, real, self.dropout if self.training else 0.0)
        return join_chunks(attended.transpose(2, 3).flatten(3), length)

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: ChunkState | None
    ) -> tuple[torch.Tensor, ChunkState]:
        """Attend from one token: q, k (B, H·S), v (B, E); the state empties when its chunk is full.

        Raises :class:`UnsupportedError` where attention is not causal.
        """
        if not self.causal:
            raise UnsupportedError("step: attention that is not causal needs the whole sequence; use forward")
        keys, values = k[:, None], v[:, None]
        if state is not None:
            keys, values = torch.cat([state.keys, keys], 1), torch.cat([state.values, values], 1)
        count = keys.shape[1]
        q, k, v = (self._by_head(x[:, None]) for x in (q[:, None], keys, values))
        bias = None if self.bias is None else self.bias.between(1 - count, 0)[:, None]
        attended = attend(q, k, v, bias, self.kind, False, None, self.dropout if self.training else 0.0)
        if count == self.chunk_size:
            keys, values = keys[:, :0], values[:, :0]
        return attended.transpose(2, 3).flatten(3)[:, 0, 0], ChunkState(keys, values)

    def _by_head(self, chunks: torch.Tensor) -> torch.Tensor:
        """(B, C, n, H·S) to (B, C, H, n, S)."""
        return chunks.unflatten(-1, (self.heads, -1)).transpose(2, 3)


def _make_bias(kind: BiasKind, size: int | None, width: int, heads: int) -> RelativeBias | None:
    if kind == "none":
        return None
    if kind == "rotary":
        return RotaryBias(size or 1, width, heads)
    if size is None:
        raise ModelError("bias = 'simple' without chunks needs max_length, the size of its table")
    return SimpleBias(size, heads)


def _at_least_one(owner: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ModelError(f"{owner}: {name} = {value}: must be at least 1")

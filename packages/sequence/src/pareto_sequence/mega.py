"""MEGA with chunks (MEGA-chunk): a damped exponential moving average, then gated single-head attention within chunks.

X. Ma, C. Zhou, X. Kong, J. He, L. Gui, G. Neubig, J. May, L. Zettlemoyer, "Mega: Moving Average Equipped Gated
Attention", ICLR 2023, https://arxiv.org/abs/2209.10655. The baseline of A. Terzić et al., "TCNCA: Temporal CNN with
Chunked Attention for Efficient Training on Long Sequences", 2023, https://arxiv.org/abs/2312.05605.

Written from the formulas; Eq. (7.2) is in ``ema.py``, the block in ``attention.py``. Symbols: d ``hidden_size``, E
``value_size``, S ``shared_size``, N ``state_size``, C ``chunk_size``. Defaults are those of EnWik8 (39 M parameters).

Deviation: ``ema_algorithm`` may be one of the faster forms in ``ema.py``; ``fft``, with the whole kernel computed in
each pass, is the published one and the default.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pareto_core import Paper
from pareto_sequence._build import ChunkedMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class MEGA(ChunkedMethod):
    """MEGA-chunk."""

    paper = Paper(
        title="Mega: Moving Average Equipped Gated Attention",
        authors="X. Ma, C. Zhou, X. Kong, J. He, L. Gui, G. Neubig, J. May, L. Zettlemoyer",
        year=2023,
        url="https://arxiv.org/abs/2209.10655",
    )
    mixer = "mega"

    value_size: int = 1024
    shared_size: int = 128
    state_size: int = 16
    attention: Literal["softmax", "laplace"] = "softmax"
    bias: Literal["simple", "rotary"] = "rotary"
    ema_algorithm: Literal["fft", "factored", "truncated", "auto"] = "fft"

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self._require_positive("value_size", "shared_size", "state_size")

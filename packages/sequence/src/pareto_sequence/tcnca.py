"""TCNCA: MEGA's block with a temporal convolutional network in the place of its moving average.

A. Terzić, M. Hersche, G. Karunaratne, A. Sebastian, A. Rahimi, "TCNCA: Temporal CNN with Chunked Attention for
Efficient Training on Long Sequences", 2023, https://arxiv.org/abs/2312.05605.

Symbols: K ``kernel_size``, F ``dilation_factor``, D ``tcn_depth``, d ``hidden_size``, C ``chunk_size``. Dilations are
F^0 … F^(D-1). Defaults are EnWik8's, table 7.5; what that table leaves to MEGA is MEGA's.

Left open by the chapter, and chosen here: the norm inside the residual block is layer norm (``tcn_norm``), and the
residual ω ⊙ x of MEGA's moving average is not kept, since each residual block has its own.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pareto_sequence._build import ChunkedMethod, TCNMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCNCA(ChunkedMethod, TCNMethod):
    """A TCN over the whole sequence, gated single-head attention within chunks (Fig. 7.3)."""

    mixer = "tcnca"

    value_size: int = 1024
    shared_size: int = 128
    attention: Literal["softmax", "laplace"] = "softmax"
    bias: Literal["simple", "rotary"] = "rotary"

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self._require_positive("value_size", "shared_size")

"""TCNCGSHA: a TCN whose output is fed into gated single-head attention within chunks (Fig. 7.4, option 2).

A. Terzić, M. Hersche, G. Karunaratne, A. Sebastian, A. Rahimi, "TCNCA: Temporal CNN with Chunked Attention for
Efficient Training on Long Sequences", 2023, https://arxiv.org/abs/2312.05605, section 7.4.4.

Queries, keys and values are as wide as the embedding. ``match`` picks the width that has TCNCA's parameters, as in
table 7.4. The figure's caption calls it TCNC SHGA, the table TCNCGSHA; the table's name is used.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pareto_sequence._build import ChunkedMethod, TCNMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCNCGSHA(ChunkedMethod, TCNMethod):
    """TCN with chunked gated single-head attention."""

    mixer = "tcncgsha"

    attention: Literal["softmax", "laplace"] = "softmax"
    bias: Literal["simple", "rotary"] = "rotary"

    def width_step(self) -> int:
        """An even width where positions are rotated; a table of biases takes any."""
        return 2 if self.bias == "rotary" else 1

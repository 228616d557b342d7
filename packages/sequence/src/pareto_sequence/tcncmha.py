"""TCNCMHA: a TCN whose output is fed into multi-head attention within chunks (Fig. 7.4, option 1).

A. Terzić, M. Hersche, G. Karunaratne, A. Sebastian, A. Rahimi, "TCNCA: Temporal CNN with Chunked Attention for
Efficient Training on Long Sequences", 2023, https://arxiv.org/abs/2312.05605, section 7.4.4.

Four heads; queries, keys and values as wide as the embedding. ``match`` picks the width that has TCNCA's parameters, as
in table 7.4.
"""

from __future__ import annotations

import dataclasses

from pareto_sequence._build import ChunkedMethod, TCNMethod, require_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCNCMHA(ChunkedMethod, TCNMethod):
    """TCN with chunked multi-head attention."""

    mixer = "tcncmha"

    num_heads: int = 4

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        require_heads(self, self.num_heads)

    def width_step(self) -> int:
        """Heads of an even width, for the rotation of positions."""
        return 2 * self.num_heads

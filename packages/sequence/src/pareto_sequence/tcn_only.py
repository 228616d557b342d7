"""TCN: the temporal convolutional network alone, without attention (Fig. 7.4, option 3).

A. Terzić, M. Hersche, G. Karunaratne, A. Sebastian, A. Rahimi, "TCNCA: Temporal CNN with Chunked Attention for
Efficient Training on Long Sequences", 2023, https://arxiv.org/abs/2312.05605, section 7.4.4.

``match`` picks the width that has TCNCA's parameters, as in table 7.4.
"""

from __future__ import annotations

import dataclasses

from pareto_sequence._build import TCNMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCNOnly(TCNMethod):
    """A TCN in each layer, and the position-wise network."""

    mixer = "tcn"

"""Transformer: dense multi-head attention over the whole sequence, the baseline of every table.

A. Vaswani, N. Shazeer, N. Parmar, J. Uszkoreit, L. Jones, A. N. Gomez, Ł. Kaiser, I. Polosukhin, "Attention Is All You
Need", NeurIPS 2017, https://arxiv.org/abs/1706.03762.

Its cost is quadratic in the length. Deviation from the original: norms stand before the blocks (``prenorm``).
"""

from __future__ import annotations

import dataclasses

from pareto_core import Paper
from pareto_sequence._build import SequenceMethod, require_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerBaseline(SequenceMethod):
    """A Transformer of the same depth, causal for language models."""

    paper = Paper(
        title="Attention Is All You Need",
        authors="A. Vaswani, N. Shazeer, N. Parmar, J. Uszkoreit, L. Jones, A. N. Gomez, Ł. Kaiser, I. Polosukhin",
        year=2017,
        url="https://arxiv.org/abs/1706.03762",
    )
    mixer = "transformer"

    num_heads: int = 8
    ffn_size: int = 2048

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        require_heads(self, self.num_heads)

    def width_step(self) -> int:
        """Heads of an even width, for the rotation of positions."""
        return 2 * self.num_heads

"""Temporal convolutional network: the long-range mixer of TCNCA.

Aleksandar Terzić, Michael Hersche, Geethan Karunaratne, Abu Sebastian, Abbas Rahimi: "TCNCA: Temporal CNN with Chunked
Attention for Efficient Training on Long Sequences" (section 7.3 and figure 7.2), https://arxiv.org/abs/2312.05605.

A TCN is a cascade of ``tcn_depth`` (the paper's D) residual blocks over x of shape (B, L, width). Block i, counted from
0, convolves each channel with its own kernel of K taps spread by the dilation F^i, normalises over the channels, applies
SiLU, and adds its input. Decoders pad with zeros on the left, encoders wrap around.

The paper leaves open which norm stands in a block and whether the EMA's term omega * x stays beside the TCN; here
``norm`` is "layer" and ``omega`` off unless stated. Its text counts dilations from 0; they start at F^0 = 1.

A decoder's step costs O(K) per channel and block: each block keeps a ring buffer of its last inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.conv import conv_step, depthwise_conv
from pareto_sequence.norms import make_norm

SPAN_LIMIT = 2**31


def receptive_field(kernel_size: int, dilation_factor: int, depth: int) -> int:
    """Return the number of positions that an output of one TCN depends on: 1 + (K - 1) (F^0 + ... + F^(depth - 1)).

    Raises :class:`ModelError` where an argument is below 1 or a block's span reaches 2^31.
    """
    _check("kernel_size", kernel_size)
    _check("dilation_factor", dilation_factor)
    _check("depth", depth)
    span = (kernel_size - 1) * dilation_factor ** (depth - 1)
    if span >= SPAN_LIMIT:
        raise ModelError(
            f"dilation_factor = {dilation_factor}: (kernel_size - 1) * dilation_factor^(depth - 1) is {span}, "
            f"must be below {SPAN_LIMIT}"
        )
    return 1 + (kernel_size - 1) * sum(dilation_factor**block for block in range(depth))

"""The temporal block of each row of the ladder, by the name of its mixer; shapes as in :mod:`pareto_sequence.blocks`."""

from __future__ import annotations

from torch import nn

from pareto_sequence.blocks import Cascade, DenseAttention, Residual
from pareto_sequence.configuration import SequenceConfig
from pareto_sequence.tcn import TCN


def make_temporal(config: SequenceConfig) -> nn.Module:
    """Return the temporal block, norm and residual included, that ``config.mixer`` names."""
    if config.mixer == "transformer":
        inner: nn.Module = DenseAttention(
            config.hidden_size,
            config.num_heads,
            causal=config.causal,
            rotary=config.positions == "rotary",
            dropout=config.attention_dropout,
        )
    elif config.mixer == "tcn":
        inner = make_tcn(config)
    return Residual(inner, config.hidden_size, config.norm, config.prenorm, config.dropout)


def make_tcn(config: SequenceConfig) -> TCN:
    """Return the TCN of one layer: zeros on the left in a decoder, wrapped around in an encoder."""
    return TCN(
        config.hidden_size,
        config.kernel_size,
        config.dilation_factor,
        config.tcn_depth,
        norm=config.tcn_norm,
        circular=not config.causal,
        omega=config.tcn_omega,
        implementation=config.conv_implementation,
    )

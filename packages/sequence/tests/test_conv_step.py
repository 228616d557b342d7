"""One position at a time through a causal convolution."""

from __future__ import annotations

import pytest
import torch

from pareto_core.errors import ModelError
from pareto_sequence.conv import ConvState, conv_step, depthwise_conv


def example(batch, width, length, taps, dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    shapes = [(batch, width, length), (width, taps), (width,)]
    return [torch.randn(shape, generator=made, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (2, 1), (3, 5), (11, 4), (5, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_the_causal_convolution(taps, dilation, dtype):
    x, weight, bias = example(2, 3, 61, taps, dtype=dtype)
    wanted = depthwise_conv(x, weight, bias, dilation=dilation, implementation="reference")
    for begin in (0, 1, 20, 60):
        state = ConvState.after(x[..., :begin], taps, dilation) if begin else None
        for t in range(begin, 61):
            y, state = conv_step(x[..., t], state, weight, bias, dilation)
            torch.testing.assert_close(y, wanted[..., t], rtol=1e-6, atol=1e-5)


def test_steps_of_chosen_sequences():
    x, weight, _ = example(3, 2, 9, 4)
    state = ConvState.after(x[..., :8], 4, 2)
    before = state.ring.clone()
    chosen = torch.tensor([2, 0, 2, 1])
    y, kept = conv_step(x[chosen, :, 8], state.select(chosen), weight, dilation=2)
    wanted = depthwise_conv(x, weight, dilation=2)[chosen, :, 8]
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-5)
    assert kept.ring.shape == (7, 4, 2)
    assert torch.equal(state.ring, before)
    assert state.position == 0


def test_bad_steps():
    x, weight, _ = example(3, 2, 9, 4)
    state = ConvState.empty(x[..., 0], 4, 2)
    with pytest.raises(ModelError, match=r"state.ring is for a span of 6 and .*; kernel size 4, dilation 3 .* need 9"):
        conv_step(x[..., 0], state, weight, dilation=3)
    with pytest.raises(ModelError, match=r"inputs of shape \(3, 2\); .* need 6 and \(1, 2\)"):
        conv_step(x[:1, :, 0], state, weight, dilation=2)
    with pytest.raises(ModelError, match=r"x has shape \(3, 2, 9\); one step"):
        conv_step(x, state, weight, dilation=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_in_half_precision_round_once(dtype):
    x, weight, bias = (v.to(dtype) for v in example(2, 3, 30, 5))
    wanted = depthwise_conv(x.double(), weight.double(), bias.double(), dilation=2, implementation="reference")
    state = None
    for t in range(30):
        y, state = conv_step(x[..., t], state, weight, bias, 2)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), wanted[..., t], rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_step_keeps_no_graph():
    x, weight, _ = (v.requires_grad_() for v in example(1, 2, 1, 3))
    y, state = conv_step(x[..., 0], None, weight)
    assert not y.requires_grad
    assert not state.ring.requires_grad


@pytest.mark.parametrize(("taps", "dilation"), [(2, 10), (3, 7), (4, 5), (2, 900)])
@pytest.mark.parametrize("first_rows", [1, 2, 5])
def test_a_growing_ring_holds_what_the_filter_still_reads(taps, dilation, first_rows, monkeypatch):
    monkeypatch.setattr("pareto_sequence.conv.FIRST_ROWS", first_rows)
    x, weight, bias = example(2, 3, 61, taps)
    wanted = depthwise_conv(x, weight, bias, dilation=dilation, implementation="reference")
    for begin in (0, 1, 3, 14, 30):
        state = ConvState.after(x[..., :begin], taps, dilation) if begin else ConvState.empty(x[..., 0], taps, dilation)
        for t in range(begin, 61):
            y, state = conv_step(x[..., t], state, weight, bias, dilation)
            torch.testing.assert_close(y, wanted[..., t], rtol=1e-6, atol=1e-5)
        span = (taps - 1) * dilation
        assert len(state.ring) <= min(span + 1, 2 * 61)


def test_a_filter_longer_than_memory_steps():
    x, weight, bias = example(1, 2, 5, 2)
    state = ConvState.after(x[..., :3], 2, 2**31 - 1)
    y, state = conv_step(x[..., 3], state, weight, bias, 2**31 - 1)
    torch.testing.assert_close(y, weight[:, 1] * x[..., 3] + bias)
    assert len(state.ring) == 256

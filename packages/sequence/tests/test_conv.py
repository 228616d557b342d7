"""Every implementation of the convolution against its formula in float64, and the rules that they share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence import conv_native
from pareto_sequence.conv import choose, depthwise_conv, reference_conv

needs_native = pytest.mark.skipif(conv_native.native_or_none() is None, reason="the native module is not built")
IMPLEMENTATIONS = ["reference", "library", pytest.param("native", marks=needs_native)]
PADDINGS = ["causal", "circular"]
LENGTHS = [1, 2, 31, 63, 64, 65, 127, 130, 1000]
FILTERS = [(k, 1) for k in range(1, 18)] + [(3, 64), (11, 2), (11, 16), (11, 64), (17, 7), (31, 1), (31, 50)]

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_padding = pytest.mark.parametrize("padding", PADDINGS)


def example(batch, width, length, taps, seed=0, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    shapes = [(batch, width, length), (width, taps), (width,)]
    return [torch.randn(shape, generator=made, dtype=dtype) for shape in shapes]


def sources(length, taps, dilation, padding, k):
    """Where each position reads tap k from, and which of the positions read anything."""
    if padding == "circular":
        return (np.arange(length) + (k - (taps - 1) // 2) * dilation) % length, np.ones(length, bool)
    read = np.arange(length) - (taps - 1 - k) * dilation
    return np.maximum(read, 0), read >= 0


def expected(x, weight, bias, dilation, padding):
    """y in float64, and the sum of the sizes of all that was added for it."""
    x, weight, bias = (v.double().numpy() for v in (x, weight, bias))
    y = np.broadcast_to(bias[:, None], x.shape).copy()
    size = np.abs(y)
    for k in range(weight.shape[1]):
        at, reads = sources(x.shape[2], weight.shape[1], dilation, padding, k)
        term = np.where(reads, x[..., at] * weight[:, k, None], 0)
        y += term
        size += np.abs(term)
    return y, size


@every_implementation
@every_padding
@pytest.mark.parametrize("length", LENGTHS)
def test_formula(implementation, padding, length):
    for taps, dilation in FILTERS:
        x, weight, bias = example(3, 5, length, taps)
        y = depthwise_conv(x, weight, bias, dilation=dilation, padding=padding, implementation=implementation)
        wanted, size = expected(x, weight, bias, dilation, padding)
        # Each of K + 1 additions rounds, and each product may.
        np.testing.assert_array_less(np.abs(y.numpy() - wanted), (2 * taps + 2) * 2.0**-24 * size + 1e-30)


@every_implementation
def test_by_hand(implementation):
    x, weight = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[100.0, 10.0, 1.0]])
    causal = depthwise_conv(x, weight, implementation=implementation)
    assert causal.flatten().tolist() == [1, 12, 123, 234]
    dilated = depthwise_conv(x, weight, torch.tensor([0.5]), dilation=2, implementation=implementation)
    assert dilated.flatten().tolist() == [1.5, 2.5, 13.5, 24.5]
    circular = depthwise_conv(x, weight, padding="circular", implementation=implementation)
    assert circular.flatten().tolist() == [412, 123, 234, 341]
    wrapped = depthwise_conv(x, weight, padding="circular", dilation=5, implementation=implementation)
    assert wrapped.flatten().tolist() == [412, 123, 234, 341]


@every_implementation
@every_padding
@pytest.mark.parametrize(
    ("length", "taps", "dilation"),
    [(1, 1, 1), (1, 3, 4), (5, 3, 2), (63, 11, 64), (64, 2, 1), (65, 5, 16), (200, 17, 3), (517, 11, 64), (300, 31, 9)],
)
def test_gradients(implementation, padding, length, taps, dilation):
    single = [v.requires_grad_() for v in example(3, 5, length, taps)]
    double = [v.detach().double().requires_grad_() for v in single]
    made = torch.randn(3, 5, length, generator=torch.Generator().manual_seed(1))
    y = depthwise_conv(*single, dilation=dilation, padding=padding, implementation=implementation)
    y.backward(made)
    reference_conv(*double, dilation, padding).backward(made.double())
    for got, wanted in zip(single, double, strict=True):
        assert got.grad.shape == wanted.grad.shape
        torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=2e-6, atol=2e-6 * 3 * length**0.5 + 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "library"])
@every_padding
def test_gradients_by_differences(implementation, padding):
    for length, taps, dilation in [(5, 3, 2), (4, 3, 3), (1, 2, 1)]:
        arguments = [v.requires_grad_() for v in example(2, 2, length, taps, dtype=torch.float64)]

        def run(x, weight, bias, dilation=dilation):
            return depthwise_conv(x, weight, bias, dilation=dilation, padding=padding, implementation=implementation)

        assert torch.autograd.gradcheck(run, arguments)
        assert torch.autograd.gradgradcheck(run, arguments)


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 300)),
    taps=st.integers(1, 40),
    dilation=st.integers(1, 400),
    padding=st.sampled_from(PADDINGS),
    seed=st.integers(0, 99),
)
def test_native_for_any_geometry(shape, taps, dilation, padding, seed):
    single = [v.requires_grad_() for v in example(*shape, taps, seed)]
    double = [v.detach().double().requires_grad_() for v in single]
    y = depthwise_conv(*single, dilation=dilation, padding=padding, implementation="native")
    wanted = reference_conv(*double, dilation, padding)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=2e-6 * taps**0.5 * 4)
    y.sum().backward()
    wanted.sum().backward()
    for got, right in zip(single, double, strict=True):
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=1e-5, atol=1e-4)


@every_implementation
@every_padding
def test_only_some_gradients(implementation, padding):
    for wanted in [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]:
        arguments = [v.requires_grad_(wants) for v, wants in zip(example(2, 3, 70, 5), wanted, strict=True)]
        options = {"dilation": 3, "padding": padding}
        depthwise_conv(*arguments, **options, implementation=implementation).square().sum().backward()
        grads = [None if v.grad is None else v.grad.clone() for v in arguments]
        for v in arguments:
            v.grad = None
        depthwise_conv(*arguments, **options, implementation="reference").square().sum().backward()
        for v, grad in zip(arguments, grads, strict=True):
            assert (v.grad is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(grad, v.grad, rtol=1e-4, atol=1e-3)


@every_implementation
def test_other_strides(implementation):
    x, weight, bias = example(3, 5, 90, 7)
    wanted = depthwise_conv(x, weight, bias, dilation=4, implementation="reference")
    strided = torch.zeros(3, 5, 180)[..., ::2].copy_(x)
    channels_last = x.transpose(1, 2).contiguous().transpose(1, 2)
    misaligned = torch.zeros(x.numel() + 1)[1:].view_as(x).copy_(x)
    odd_weight = weight.T.contiguous().T
    for view in (strided, channels_last, misaligned):
        for options in ({}, {"weight": odd_weight}):
            got = depthwise_conv(view, options.get("weight", weight), bias, dilation=4, implementation=implementation)
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-5)
    # Gradients of all sizes alike come as one expanded number.
    x.requires_grad_()
    depthwise_conv(x, weight, bias, implementation=implementation).sum().backward()
    assert x.grad.shape == x.shape


@every_implementation
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [40, 64, 300])
def test_what_is_not_seen_does_not_matter(implementation, bad, length):
    x, weight, bias = example(2, 3, length, 5)
    clean = depthwise_conv(x, weight, bias, dilation=4, implementation=implementation)
    for at in (0, 17, length - 1):
        spoilt = x.clone()
        spoilt[:, :, at] = bad
        y = depthwise_conv(spoilt, weight, bias, dilation=4, implementation=implementation)
        seen = torch.zeros(length, dtype=torch.bool)
        seen[[t for t in range(at, min(at + 17, length)) if (t - at) % 4 == 0]] = True
        torch.testing.assert_close(y[..., ~seen], clean[..., ~seen], rtol=0, atol=0)
        assert not y[..., seen].isfinite().any()


@needs_native
def test_an_unseen_gradient_does_not_matter():
    x, weight, _ = example(1, 2, 300, 5)
    x.requires_grad_()
    y = depthwise_conv(x, weight, dilation=4, implementation="native")
    grad = torch.ones_like(y)
    grad[..., 100] = float("nan")
    y.backward(grad)
    assert x.grad.isnan().any(dim=1).any(dim=0).nonzero().flatten().tolist() == [84, 88, 92, 96, 100]


@every_implementation
def test_without_gradients(implementation):
    x, weight, bias = example(2, 3, 70, 5)
    wanted = depthwise_conv(x, weight, bias, implementation="reference")
    weight.requires_grad_()
    with torch.no_grad():
        y = depthwise_conv(x, weight, bias, implementation=implementation)
        assert not y.requires_grad
        torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(depthwise_conv(x + 0, weight, bias, implementation=implementation), wanted)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_through_single(dtype):
    x, weight, bias = (v.to(dtype).requires_grad_() for v in example(2, 3, 200, 11))
    y = depthwise_conv(x, weight, bias, dilation=4, implementation="native")
    y.sum().backward()
    assert y.dtype == x.grad.dtype == weight.grad.dtype == bias.grad.dtype == dtype
    double = [v.detach().double().requires_grad_() for v in (x, weight, bias)]
    wanted = reference_conv(*double, 4, "causal")
    wanted.sum().backward()
    # One rounding to half precision at the end; the rest is far below it.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=step, atol=1e-5)
    for got, right in zip((x, weight, bias), double, strict=True):
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=step, atol=1e-4)


@every_padding
def test_autocast_casts_as_torch_does(padding):
    x, weight, bias = example(2, 3, 50, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv(x.bfloat16(), weight, bias, padding=padding)
        own = depthwise_conv(x, weight, bias, padding=padding)
    assert y.dtype == own.dtype == torch.bfloat16
    assert torch.equal(y, own)


def test_what_auto_means(monkeypatch):
    x, weight, bias = example(1, 2, 20, 3)
    if conv_native.native_or_none() is not None:
        assert choose(x, weight) == "native"
    assert choose(x.bfloat16(), weight.bfloat16()) == "library"
    assert choose(x.to("meta"), weight.to("meta")) == "library"
    y = depthwise_conv(x, weight, bias)
    monkeypatch.setattr(conv_native, "native_or_none", lambda: None)
    assert choose(x, weight) == "library"
    torch.testing.assert_close(depthwise_conv(x, weight, bias), y)
    with pytest.raises(UnsupportedError, match="native convolution cannot be loaded"):
        depthwise_conv(x, weight, bias, implementation="native")


@every_implementation
@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)])
def test_no_rows(implementation, shape):
    x, weight, bias = (v.requires_grad_() for v in example(*shape, 3))
    y = depthwise_conv(x, weight, bias, implementation=implementation)
    assert y.shape == shape
    y.sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()


@every_implementation
@every_padding
def test_the_largest_span(implementation, padding):
    x, weight, bias = example(1, 2, 6, 3)
    dilation = 2**30 - 1
    y = depthwise_conv(x, weight, bias, dilation=dilation, padding=padding, implementation=implementation)
    np.testing.assert_allclose(y.numpy(), expected(x, weight, bias, dilation, padding)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"kernel size 3 with dilation 1073741824 spans 2147483648 positions"):
        depthwise_conv(x, weight, bias, dilation=2**30, padding=padding, implementation=implementation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 2, 0)}, r"x has shape \(1, 2, 0\); .* length of at least 1"),
        ({"x": torch.zeros(2, 6)}, r"x has shape \(2, 6\)"),
        ({"x": torch.zeros(1, 2, 6, dtype=torch.int64)}, "x has dtype torch.int64; a real floating-point"),
        ({"weight": torch.zeros(2, 0)}, r"weight has shape \(2, 0\); .*kernel size of at least 1"),
        ({"weight": torch.zeros(3, 4)}, r"weight has shape \(3, 4\); \(width 2"),
        ({"weight": torch.zeros(2, 4, dtype=torch.float64)}, "weight is torch.float64"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); \(width 2,\)"),
        ({"bias": torch.zeros(2, device="meta")}, "bias is torch.float32 on meta"),
        ({"dilation": 0}, "dilation = 0: a whole number of at least 1"),
        ({"dilation": 1.5}, "dilation = 1.5"),
        ({"dilation": True}, "dilation = True"),
        ({"dilation": 10**400}, "too large|spans"),
        ({"padding": "same"}, "padding = 'same': one of causal, circular"),
        ({"implementation": "fast"}, "implementation = 'fast': one of auto, reference"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"x": torch.zeros(1, 2, 6), "weight": torch.zeros(2, 4), "bias": torch.zeros(2)} | changes
    with pytest.raises(ModelError, match=message):
        depthwise_conv(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


@needs_native
def test_native_says_what_it_does_not_take():
    with pytest.raises(ModelError, match="float64; implementation 'native' takes float32"):
        depthwise_conv(torch.zeros(1, 2, 6).double(), torch.zeros(2, 3).double(), implementation="native")
    with pytest.raises(UnsupportedError, match="runs on the CPU; x is on meta"):
        depthwise_conv(torch.zeros(1, 2, 6).to("meta"), torch.zeros(2, 3).to("meta"), implementation="native")

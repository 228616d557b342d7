"""Gradients of gradients, and torch.func, through what the kernels compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap

from pareto_sequence.conv import Padding, depthwise_conv
from pareto_sequence.conv_gradients import library_gradients
from pareto_sequence.conv_native import native_or_none
from pareto_sequence.ema import DampedEMA
from pareto_sequence.tcn import TCN

pytestmark = pytest.mark.skipif(native_or_none() is None, reason="the native module is not built")

# Taps that all read, taps that read padding alone, and a span that wraps around more than once.
GEOMETRIES = [((2, 3, 9), 3, 2), ((1, 2, 5), 4, 3), ((2, 1, 4), 3, 7)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twins(circular: bool) -> tuple[TCN, TCN]:
    """The same TCN by native kernels, and in float64 by torch's operations."""
    torch.manual_seed(0)
    native = TCN(4, 3, 2, 3, circular=circular)
    double = TCN(4, 3, 2, 3, circular=circular, implementation="library").double()
    double.load_state_dict(native.state_dict())
    return native, double


def agree(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found.double() - wanted).detach().abs().max()) <= 1e-4 * max(1.0, float(wanted.detach().abs().max()))


@pytest.mark.parametrize(("shape", "taps", "dilation"), GEOMETRIES)
@pytest.mark.parametrize("padding", ["causal", "circular"])
def test_differentiable_gradients_are_the_references(
    shape: tuple[int, int, int], taps: int, dilation: int, padding: Padding
) -> None:
    x, weight, bias = (drawn(*s).double().requires_grad_() for s in (shape, (shape[1], taps), (shape[1],)))
    out = depthwise_conv(x, weight, bias, dilation=dilation, padding=padding, implementation="reference")
    seed = drawn(*shape, seed=1).double()
    wanted = torch.autograd.grad(out, (x, weight, bias), seed)
    found = library_gradients(x, weight, seed, dilation, padding, (True, True, True))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert library_gradients(x, weight, seed, dilation, padding, (False, False, False)) == (None, None, None)


@pytest.mark.parametrize("circular", [False, True])
def test_a_gradient_penalty_trains_as_with_torchs_operations(circular: bool) -> None:
    results = []
    for tcn in twins(circular):
        x = drawn(2, 9, 4).to(tcn.blocks[0].weight.dtype).requires_grad_()
        (slope,) = torch.autograd.grad(tcn(x * x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in tcn.parameters())])
    for found, wanted in zip(*results, strict=True):
        agree(found, wanted)


@pytest.mark.parametrize(("shape", "taps", "dilation"), GEOMETRIES)
@pytest.mark.parametrize("padding", ["causal", "circular"])
def test_second_derivatives_of_one_convolution(
    shape: tuple[int, int, int], taps: int, dilation: int, padding: Padding
) -> None:
    results = []
    for implementation, dtype in (("native", torch.float32), ("reference", torch.float64)):
        x, weight, bias = (drawn(*s).to(dtype).requires_grad_() for s in (shape, (shape[1], taps), (shape[1],)))
        y = depthwise_conv(x, weight, bias, dilation=dilation, padding=padding, implementation=implementation)
        first = torch.autograd.grad(y.square().sum(), (x, weight, bias), create_graph=True)
        total = sum((part.square().sum() for part in first), torch.zeros((), dtype=dtype))
        results.append(torch.autograd.grad(total, (x, weight, bias)))
    for found, wanted in zip(*results, strict=True):
        agree(found, wanted)


def of_input(tcn: TCN, x: torch.Tensor) -> torch.Tensor:
    return grad(lambda x: tcn(x).square().sum())(x)


def of_each_sample(tcn: TCN, x: torch.Tensor) -> torch.Tensor:
    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(tcn, parameters, (row[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(dict(tcn.named_parameters()), x)
    return torch.cat([value.flatten() for value in found.values()])


def of_parameters_forwards(tcn: TCN, x: torch.Tensor) -> torch.Tensor:
    found = jacfwd(lambda p: functional_call(tcn, p, (x,)).square().sum())(dict(tcn.named_parameters()))
    return torch.cat([value.flatten() for value in found.values()])


TRANSFORMS: dict[str, Callable[[TCN, torch.Tensor], torch.Tensor]] = {
    "grad": of_input,
    "vmap": lambda tcn, x: vmap(tcn)(torch.stack([x, 2 * x, x * x])),
    "jvp": lambda tcn, x: jvp(tcn, (x,), (x.square(),))[1],
    "hessian": lambda tcn, x: hessian(lambda x: tcn(x).square().sum())(x[:1, :3]),
    "gradient of each sample": of_each_sample,
    "jacfwd of parameters": of_parameters_forwards,
}


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("circular", [False, True])
def test_transforms_of_torch_func(transform: str, circular: bool) -> None:
    native, double = twins(circular)
    x = drawn(2, 5, 4)
    agree(TRANSFORMS[transform](native, x), TRANSFORMS[transform](double, x.double()))


@pytest.mark.parametrize("algorithm", ["fft", "truncated"])
def test_the_moving_average_too(algorithm: str) -> None:
    torch.manual_seed(0)
    single = DampedEMA(4, 3, algorithm=algorithm)
    double = DampedEMA(4, 3, algorithm="fft").double()
    double.load_state_dict(single.state_dict())
    x = drawn(2, 5, 4)
    found, wanted = (
        vmap(grad(lambda row, ema=ema: ema(row[None]).square().sum()))(x.to(ema.omega.dtype))
        for ema in (single, double)
    )
    agree(found, wanted)


def test_an_ordinary_backward_pass_stays_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pareto_sequence.conv_gradients.library_gradients", lambda *_: pytest.fail("torch's"))
    monkeypatch.setattr("pareto_sequence.norm_native.torch_gradients", lambda *_: pytest.fail("torch's"))
    native, _ = twins(False)
    native(drawn(2, 9, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in native.parameters())

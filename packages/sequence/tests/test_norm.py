from __future__ import annotations

import math

import pytest
import torch

from pareto_sequence import conv_native
from pareto_sequence.norm_native import COST, fits, norm_silu_add
from pareto_sequence.tcn import TCN

native = conv_native.native_or_none()
pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")
ISAS = native.available() if native else []


def reference(c, x, weight, bias, epsilon):
    normed = torch.nn.functional.layer_norm(c.transpose(1, 2), c.shape[1:2], weight, bias, epsilon).transpose(1, 2)
    return x + normed * torch.sigmoid(normed)


def drawn(batch, width, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    c, x, grad = torch.randn(3, batch, width, length, generator=generator)
    return c * 3 + 1, x, torch.randn(width, generator=generator), torch.randn(width, generator=generator), grad


SHAPES = [(1, 1, 1), (2, 3, 15), (1, 5, 16), (3, 7, 17), (1, 64, 100), (2, 33, 1000), (1, 130, 257), (1, 2100, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_against_float64(shape):
    *inputs, grad = drawn(*shape)
    fast = [value.clone().requires_grad_() for value in inputs]
    slow = [value.double().requires_grad_() for value in inputs]
    got, want = norm_silu_add(*fast, 1e-5), reference(*slow, 1e-5)
    got.backward(grad)
    want.backward(grad.double())
    for a, b in [(got, want), *((a.grad, b.grad) for a, b in zip(fast, slow, strict=True))]:
        # With one channel what is normalised is 0, and what remains of its gradient rounding alone.
        a, b = a.detach(), b.detach()
        scale = max(float(b.abs().max()), 1.0)
        assert float((a.double() - b).abs().max()) < 3e-6 * scale * math.sqrt(shape[0] * shape[2] / 100 + 1)


def run(isa, threads, c, x, weight, bias, grad):
    out, c_grad = torch.empty_like(c), torch.empty_like(c)
    mean, rstd = torch.empty(2, c.shape[0], c.shape[2]).unbind()
    weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
    native.norm_silu_add(c, x, weight, bias, 1e-5, out, mean, rstd, threads, isa)
    native.norm_silu_add_gradient(c, grad, weight, bias, mean, rstd, c_grad, weight_grad, bias_grad, threads, isa)
    return out, c_grad, weight_grad, bias_grad


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_agree_and_threads_change_no_bit(isa):
    c, x, weight, bias, grad = drawn(2, 70, 333)
    one, three = run(isa, 1, c, x, weight, bias, grad), run(isa, 3, c, x, weight, bias, grad)
    for a, b, other in zip(one, three, run("baseline", 1, c, x, weight, bias, grad), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, other, rtol=2e-5, atol=2e-5)


def test_large_offsets_and_constant_channels():
    c = torch.full((1, 8, 20), 1e4) + torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
    ones, zeros = torch.ones(8), torch.zeros(8)
    got = norm_silu_add(c, torch.zeros_like(c), ones, zeros, 1e-5)
    want = reference(c.double(), torch.zeros_like(c), ones.double(), zeros.double(), 1e-5)
    assert float((got - want).abs().max()) < 2e-3  # 1e4 holds steps of 1e-3
    flat = norm_silu_add(torch.full((1, 8, 20), 3.0), torch.zeros(1, 8, 20), ones, zeros, 1e-5)
    assert torch.equal(flat, torch.zeros(1, 8, 20))


def test_extreme_values_saturate_and_nan_stays_at_its_position():
    c = torch.zeros(1, 2, 40)
    c[0, 0], c[0, 1] = 1e3, -1e3
    got = norm_silu_add(c, torch.zeros_like(c), torch.full((2,), 200.0), torch.zeros(2), 1e-5)
    assert torch.allclose(got[0, 0], torch.tensor(200.0))
    assert (got[0, 1].abs() < 1e-30).all()
    c[0, 1, 7] = math.nan
    got = norm_silu_add(c, torch.zeros_like(c), torch.ones(2), torch.zeros(2), 1e-5)
    assert got[0, :, 7].isnan().all()
    assert int(got.isnan().sum()) == 2


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("shape", [(2, 37, 10), (1, 300, 33)])
def test_a_tcn_by_native_kernels_is_the_one_by_torch(circular, shape):
    torch.manual_seed(0)
    tcn = TCN(shape[2], 5, 3, 3, circular=circular)
    x, grad = torch.randn(2, *shape).unbind()
    results = []
    for implementation in ("auto", "library"):
        for block in tcn.blocks:
            block.implementation = implementation
        ours = x.clone().requires_grad_()
        y = tcn(ours)
        results.append([y, *torch.autograd.grad(y, [ours, *tcn.parameters()], grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * float(b.detach().abs().max() + 1))


def test_what_fits_and_what_is_refused():
    x = torch.zeros(1, 2, 3)
    assert fits(x)
    assert not fits(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(x)
    assert COST > 1
    with pytest.raises(ValueError, match="a value per channel"):
        norm_silu_add(x, x, torch.ones(3), torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match="one shape"):
        norm_silu_add(x, torch.zeros(1, 2, 4), torch.ones(2), torch.ones(2), 1e-5)
    assert norm_silu_add(torch.zeros(1, 2, 0), torch.zeros(1, 2, 0), torch.ones(2), torch.ones(2), 1e-5).numel() == 0

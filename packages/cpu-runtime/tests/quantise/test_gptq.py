from __future__ import annotations

import pytest
import torch

from pareto_cpu_runtime.quantise.config import GPTQConfig, Precision
from pareto_cpu_runtime.quantise.gptq import gptq, inverse_factor, lazy_blocks
from pareto_cpu_runtime.quantise.grid import USUAL_MULTIPLIER
from pareto_cpu_runtime.quantise.rtn import round_to_nearest


def correlated(k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(4 * k, k // 4, generator=generator) @ torch.randn(k // 4, k, generator=generator)
    return common + 0.3 * torch.randn(4 * k, k, generator=generator)


def obq_reference(weight: torch.Tensor, hessian: torch.Tensor, group: int, damping: float) -> torch.Tensor:
    """Optimal Brain Quantization in column order, float64; the inverse is updated by elimination, not by Cholesky."""
    w = weight.double().clone()
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    codes = torch.zeros(weight.shape, dtype=torch.long)
    scale = torch.zeros(len(w), dtype=torch.float64)
    for j in range(w.shape[1]):
        if j % group == 0:
            cells = w[:, j : j + group]
            extreme = cells.gather(1, cells.abs().argmax(1, keepdim=True))[:, 0]
            scale = ((-extreme / 8).float() / USUAL_MULTIPLIER).half().double() * USUAL_MULTIPLIER
        q = (w[:, j] / scale).round().clamp(-8, 7)
        codes[:, j] = q.long() + 8
        error = (w[:, j] - q * scale) / inverse[j, j]
        w -= error[:, None] * inverse[None, j, :]
        inverse -= inverse[:, j, None] * inverse[None, j, :] / inverse[j, j]
        inverse[j, :], inverse[:, j] = 0, 0
        inverse[j, j] = 1
    return codes


@pytest.mark.parametrize(("group", "width"), [(32, 128), (32, 40), (64, 48), (96, 32)])
def test_equals_the_float64_column_loop(group: int, width: int) -> None:
    x = correlated(96 if group != 64 else 128)
    weight = torch.randn(7, x.shape[1], generator=torch.Generator().manual_seed(2))
    hessian = 2 * x.t() @ x
    size = "channel" if group == 96 else group
    found = gptq(weight, hessian, Precision(group_size=size), GPTQConfig(block_columns=width))
    expected = obq_reference(weight, hessian, group, 0.01)
    # A weight that lies between two codes may go either way in fp32, and its row with it.
    same = (found.codes.long() == expected).all(1)
    assert int(same.sum()) >= 6


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_less_error_than_rounding(bits: int, symmetric: bool, activation_order: bool) -> None:
    x = correlated(128)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    precision = Precision(bits=bits, group_size=32, symmetric=symmetric)
    config = GPTQConfig(activation_order=activation_order, block_columns=48)
    matrices = gptq(weight, 2 * x.t() @ x, precision, config), round_to_nearest(weight, precision)
    ours, plain = (float((x @ (m.dequantise() - weight).t()).norm()) for m in matrices)
    assert ours < 0.8 * plain
    matrices[0].check("weight")


def test_uncorrelated_inputs_change_nothing() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    found = gptq(weight, torch.eye(64), Precision(group_size=32), GPTQConfig())
    assert torch.equal(found.codes, round_to_nearest(weight, Precision(group_size=32)).codes)


def test_inputs_that_are_never_active() -> None:
    x = correlated(64)
    x[:, 10:20] = 0
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for hessian in (2 * x.t() @ x, torch.zeros(64, 64)):
        matrix = gptq(weight, hessian, Precision(group_size=32), GPTQConfig())
        matrix.check("weight")
        assert float((matrix.dequantise() - weight).abs().max()) < 1.5


def test_zero_weights_stay_zero() -> None:
    x = correlated(64)
    matrix = gptq(torch.zeros(3, 64), x.t() @ x, Precision(group_size=32, symmetric=False), GPTQConfig())
    assert not matrix.dequantise().any()


def test_factor() -> None:
    x = correlated(48)
    h = (x.t() @ x).double()
    factor = inverse_factor(h.float(), 0.01).double()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(48)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped), rtol=1e-3, atol=1e-7)


def test_damping_grows_where_it_must() -> None:
    # Eigenvalues of 3 and -1: positive definite only from a damping of 1 on.
    factor = inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.5)
    assert bool(factor.isfinite().all())


@pytest.mark.parametrize(
    ("k", "group", "width"), [(128, 32, 128), (96, 32, 40), (128, 64, 48), (100, 100, 30), (96, 32, 64)]
)
def test_lazy_blocks_never_straddle_a_group(k: int, group: int, width: int) -> None:
    blocks = list(lazy_blocks(k, group, width))
    assert [column for block in blocks for column in range(*block)] == list(range(k))
    for first, last in blocks:
        whole = first % group == 0 and last % group == 0
        assert whole or first // group == (last - 1) // group

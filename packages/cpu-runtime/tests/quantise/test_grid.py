from __future__ import annotations

import math

import pytest
import torch

from pareto_core.errors import ModelError
from pareto_cpu_runtime.quantise.config import Precision
from pareto_cpu_runtime.quantise.grid import USUAL_MULTIPLIER, code_range, make_grid, multiplier_of, weight_grid
from pareto_cpu_runtime.quantise.matrix import Matrices, QuantisedLinear
from pareto_cpu_runtime.quantise.rtn import round_to_nearest

CHANNEL = Precision(group_size="channel")


def reference(weight: torch.Tensor, group: int, bits: int, symmetric: bool) -> torch.Tensor:
    """What rounding gives in float64 loops, by the definition; the scale alone goes through fp16."""
    out = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = [float(v) for v in weight[row, start : start + group].double()]
            if symmetric:
                scale, zero = -max(values, key=lambda v: (abs(v), -v)) / 2 ** (bits - 1), 0
                lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            else:
                scale = (max(*values, 0.0) - min(*values, 0.0)) / (2**bits - 1)
                lowest, highest = 0, 2**bits - 1
            scale = float((torch.tensor(scale, dtype=torch.float32) / USUAL_MULTIPLIER).half()) * USUAL_MULTIPLIER
            if not symmetric:
                zero = min(max(round(-min(*values, 0.0) / scale), 0), highest)
            for i, value in enumerate(values):
                code = min(max(round(value / scale) + zero, lowest), highest)
                out[row, start + i] = (code - zero) * scale
    return out


def test_hand_computed_symmetric() -> None:
    # The extreme is -4, so the scale is 4 / 8 = 0.5: codes -8, 2, 7 (8 is clipped), 0, 1 around the zero of 8.
    weight = torch.tensor([[-4.0, 1.0, 3.9, 0.2, 0.3]])
    matrix = round_to_nearest(weight, CHANNEL)
    assert matrix.codes.tolist() == [[0, 10, 15, 8, 9]]
    assert float(matrix.scales) * matrix.multiplier == 0.5
    assert matrix.zeros is None
    assert matrix.dequantise().tolist() == [[-4.0, 1.0, 3.5, 0.0, 0.5]]


def test_an_extreme_above_zero_gives_a_scale_below() -> None:
    matrix = round_to_nearest(torch.tensor([[4.0, -3.9, 1.0]]), CHANNEL)
    assert float(matrix.scales) * matrix.multiplier == -0.5
    assert matrix.dequantise().tolist() == [[4.0, -3.5, 1.0]]


def test_hand_computed_asymmetric() -> None:
    # From -1 to 2 in 15 steps of 0.2; the zero is code 5.
    matrix = round_to_nearest(torch.tensor([[-1.0, 2.0, 0.29, 0.0]]), Precision(group_size="channel", symmetric=False))
    assert matrix.zeros is not None
    assert matrix.zeros.tolist() == [[5]]
    assert matrix.codes.tolist() == [[0, 15, 6, 5]]


def test_hand_computed_three_bits() -> None:
    matrix = round_to_nearest(torch.tensor([[-4.0, 3.0, 1.4]]), Precision(bits=3, group_size="channel"))
    assert matrix.codes.tolist() == [[4, 11, 9]]  # -4, 3, 1 around 8
    assert matrix.dequantise().tolist() == [[-4.0, 3.0, 1.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 96])
def test_against_float64_loops(group: int, bits: int, symmetric: bool) -> None:
    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(group + bits)) * 0.1
    grid = weight_grid(weight, group, bits, symmetric)
    found = grid.values(grid.codes(weight)).double()
    torch.testing.assert_close(found, reference(weight, group, bits, symmetric), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("group", [32, 64, 128, 256, 512, 1024, "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_group_size_is_within_half_a_step(group: int | str, symmetric: bool) -> None:
    weight = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0))
    matrix = round_to_nearest(weight, Precision(group_size=group, symmetric=symmetric))
    size = 2048 if group == "channel" else int(group)
    step = (matrix.scales.float() * matrix.multiplier).abs().repeat_interleave(size, 1)
    # Half a step, or a whole one at the end that a symmetric grid lacks, and fp16's rounding of the scale.
    allowed = step * (1.01 if symmetric else 0.51)
    assert bool(((matrix.dequantise() - weight).abs() <= allowed).all())
    assert matrix.scales.shape == (3, 2048 // size)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-10, 1e-3, 1.0, 1e4, 1e30, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_every_size_are_held(size: float, symmetric: bool) -> None:
    weight = torch.linspace(-1, 1, 64).view(1, 64) * size
    matrix = round_to_nearest(weight, Precision(group_size="channel", symmetric=symmetric))
    matrix.check("weight")
    assert math.frexp(matrix.multiplier)[0] == 0.5
    error = (matrix.dequantise() - weight).abs().max()
    assert float(error) <= max(abs(size) * 0.13, 1e-40)


def test_zero_weights_stay_zero() -> None:
    for symmetric in (True, False):
        matrix = round_to_nearest(torch.zeros(2, 64), Precision(group_size=32, symmetric=symmetric))
        matrix.check("weight")
        assert not matrix.dequantise().any()


def test_matrices_usually_share_a_multiplier() -> None:
    assert {multiplier_of(x) for x in (2.0**-14, 1e-3, 0.1, 0.5)} == {USUAL_MULTIPLIER}
    assert multiplier_of(100.0) == 64.0


def test_outliers_cost_their_own_group_only() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    spiked = weight.clone()
    spiked[0, 5] = 1000.0
    found = round_to_nearest(spiked, Precision(group_size=32)).dequantise()
    same = round_to_nearest(weight, Precision(group_size=32)).dequantise()
    assert torch.equal(found[1:], same[1:])
    assert torch.equal(found[0, 32:], same[0, 32:])
    assert abs(float(found[0, 5]) - 1000.0) < 1.0


def test_bad_input_names_the_tensor() -> None:
    with pytest.raises(ModelError, match=r"up_proj has 96 inputs, which the group size 64"):
        round_to_nearest(torch.zeros(4, 96), Precision(group_size=64), "up_proj")
    with pytest.raises(ModelError, match="weight up_proj holds NaN"):
        round_to_nearest(torch.full((4, 64), math.nan), Precision(group_size=64), "up_proj")


def test_parts_that_do_not_fit_are_refused() -> None:
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.float16)
    with pytest.raises(ModelError, match="need scales and zeros of 4 x 4"):
        QuantisedLinear(codes, scales, None, 1.0, 16, 4)
    with pytest.raises(ModelError, match="must be uint8"):
        QuantisedLinear(codes.int(), scales, None, 1.0, 32, 4)
    with pytest.raises(ModelError, match="codes outside 4 … 11"):
        QuantisedLinear(codes, scales, None, 1.0, 32, 3).check("x")
    with pytest.raises(ModelError, match="NaN"):
        QuantisedLinear(codes, scales * math.nan, None, 1.0, 32, 4).check("x")


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("k", [32, 33])
def test_matrices_hold_what_they_are_given(bits: int, k: int) -> None:
    weight = torch.randn(3, k, generator=torch.Generator().manual_seed(k))
    matrix = round_to_nearest(weight, Precision(bits=bits, group_size="channel", symmetric=False))
    held = Matrices({"a": matrix})["a"]
    assert torch.equal(held.codes, matrix.codes)
    assert torch.equal(held.dequantise(), matrix.dequantise())


def test_aligned_is_exact_or_refused() -> None:
    matrix = round_to_nearest(torch.randn(3, 64), Precision(group_size=32))
    assert torch.equal(matrix.aligned(2.0**-4).dequantise(), matrix.dequantise())
    with pytest.raises(ModelError, match="exactly"):
        matrix.aligned(2.0**30)


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"), [(3, True, (4, 11)), (4, True, (0, 15)), (8, False, (0, 255))]
)
def test_code_range(bits: int, symmetric: bool, expected: tuple[int, int]) -> None:
    assert code_range(bits, symmetric) == expected


def test_parts_of_a_grid() -> None:
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(3))
    grid = weight_grid(weight, 32, 4, False)
    part = grid.columns(32, 96)
    assert torch.equal(part.codes(weight[:, 32:96]), grid.codes(weight)[:, 32:96])
    low, high = -torch.ones(3, 4), torch.ones(3, 4)
    assert make_grid(low, high, 32, 4, True, 1.0).multiplier == 1.0

"""Every kernel against a float64 reference, over odd shapes, every group size and unusual numbers."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pareto_cpu_runtime import _native

TABLE = {name: (compute, here == "yes") for name, compute, here in _native.kernels()}
EVERY_KERNEL = [
    pytest.param(name, marks=pytest.mark.skipif(not here, reason=f"this processor or system lacks {name}"))
    for name, (_, here) in TABLE.items()
]
HERE = [name for name, (_, here) in TABLE.items() if here]
STORES = [(4, False), (4, True), (8, False), (8, True)]
POOLS = {threads: _native.Pool(threads) for threads in (1, 2, 3, 5)}

every_kernel = pytest.mark.parametrize("kernel", EVERY_KERNEL)
every_fp32_kernel = pytest.mark.parametrize(
    "kernel", [param for param in EVERY_KERNEL if TABLE[param.values[0]][0] == "fp32"]
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A weight in panels, and the float64 matrix that it stands for, by codes less zero points and their scales."""

    weight: _native.Weight
    differences: np.ndarray  # (n, groups, group)
    scales: np.ndarray  # (n, groups, 1)

    @property
    def matrix(self) -> np.ndarray:
        return (self.differences * self.scales).reshape(self.differences.shape[0], -1)


def quantised(n, k, group, bits=4, asymmetric=False, *, seed=0, scales=None, multiplier=1.0, place=None) -> Case:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    if scales is None:
        scales = rng.uniform(0.001, 0.02, (n, k // group))
    scales = np.ascontiguousarray(np.broadcast_to(scales, (n, k // group)), dtype=np.float16)
    zeros = rng.integers(0, 2**bits, (n, k // group), dtype=np.uint8) if asymmetric else None
    size = _native.packed_bytes(n, k, group, bits, asymmetric)
    data = np.empty(size, np.uint8) if place is None else place(size)
    _native.pack(codes, scales.view(np.uint16), zeros, bits, data)
    weight = _native.Weight.of(data, n, k, group, bits, asymmetric, multiplier)
    middle = np.full(scales.shape, 2 ** (bits - 1)) if zeros is None else zeros
    differences = codes.reshape(n, k // group, group).astype(np.float64) - middle[..., None]
    return Case(weight=weight, differences=differences, scales=scales.astype(np.float64)[..., None] * multiplier)


def dense(n, k, dtype, seed=0, place=None) -> Case:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bits = 8 * dtype.itemsize
    size = _native.packed_bytes(n, k, k, bits)
    data = np.empty(size, np.uint8) if place is None else place(size)
    _native.pack_dense(values, data)
    weight = _native.Weight.of(data, n, k, k, bits)
    return Case(weight=weight, differences=values.double().numpy()[:, None, :], scales=np.ones((n, 1, 1)))


def rows(m, k, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)


def product(kernel, case, x, threads=1) -> np.ndarray:
    y = np.full((x.shape[0], case.differences.shape[0]), np.nan, np.float32)
    _native.multiply(POOLS[threads], case.weight, x, y, kernel)
    return y


def largest_error(compute: str, case: Case, x: np.ndarray) -> np.ndarray:
    """What |y - reference| may be at most, (m, n), by the roundings that a compute type has.

    Adding t terms in fp32 costs at most t * 2^-24 of the sum of their sizes. int8 moves a value of a row by at most
    half a step, 1/254 of the largest of its span (groups of at least 128 inputs together, where they come out even);
    bf16 by 2^-8 of itself, fp16 by 2^-11, and fp16 rounds up to 16 sums on the way. Where results are subnormal in
    fp32 or fp16, a fixed amount is added.
    """
    n, groups, group = case.differences.shape
    sizes = np.abs(case.differences * case.scales)
    parts = np.abs(x.astype(np.float64)).reshape(-1, groups, group)
    by_value = parts.reshape(len(x), -1) @ sizes.reshape(n, -1).T
    peaks = parts.max(axis=2)
    if compute == "int8":
        span = next((span for span in range(128 // group, 1, -1) if groups % span == 0), 1)
        peaks = peaks.reshape(-1, groups // span, span).max(axis=2).repeat(span, axis=1)
    by_peak = peaks @ (sizes + np.abs(case.scales)).sum(axis=2).T
    adding = (group + groups + 8) * 2.0**-23 * (by_value + by_peak / 254 * (compute == "int8"))
    steps = np.abs(case.differences).sum(axis=2).max() * groups * (1 + np.abs(case.scales).max())
    subnormal = 2.0**-149 * 128 * steps
    own = {
        "fp32": 0.0,
        "int8": by_peak / 254 * 1.001,
        "bf16": by_value * 2.0**-8 * 1.001 + by_peak * 2.0**-100,
        "fp16": by_value * 17 * 2.0**-11 + by_peak * 2.0**-20,
    }[compute]
    return adding + own + subnormal


def check(kernel, case, x, threads=1) -> None:
    y = product(kernel, case, x, threads)
    wanted = x.astype(np.float64) @ case.matrix.T
    error = np.abs(y - wanted)
    allowed = largest_error(TABLE[kernel][0], case, x)
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times the error that is explained"


@every_kernel
@pytest.mark.parametrize(("bits", "asymmetric"), STORES)
def test_every_number_of_rows(kernel, bits, asymmetric):
    case = quantised(77, 160, 32, bits, asymmetric)
    for m in range(1, 41):
        check(kernel, case, rows(m, 160, seed=m))


@every_kernel
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 20, 32, 33, 48, 63, 64, 100, 128, 256, 512, 1024])
def test_every_group_size(kernel, group):
    for bits, asymmetric in STORES:
        case = quantised(65, 2 * group, group, bits, asymmetric, seed=group)
        for m in (1, 3, 6, 17) if group < 100 else (2, 13):
            check(kernel, case, rows(m, 2 * group))


@every_kernel
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 2), (3, 5), (63, 31), (64, 64), (65, 97), (129, 255), (200, 1023)])
def test_scales_per_channel_and_odd_shapes(kernel, n, k):
    for bits, asymmetric in STORES:
        case = quantised(n, k, k, bits, asymmetric)
        for m in (1, 2, 4, 5, 13):
            check(kernel, case, rows(m, k))


@every_kernel
@pytest.mark.parametrize(("bits", "asymmetric"), STORES)
def test_groups_longer_than_what_is_unpacked_at_a_time(kernel, bits, asymmetric):
    case = quantised(66, 8999, 8999, bits, asymmetric)
    x = rows(7, 8999)
    check(kernel, case, x)
    for i in range(7):
        assert np.array_equal(product(kernel, case, x[i : i + 1])[0], product(kernel, case, x)[i])


@every_kernel
def test_error_relative_to_the_largest_result(kernel):
    """What the roundings come to on random numbers.

    int8: a step is 1/127 of a group's largest value, about 2.7 standard deviations at group 128, and an error is
    spread evenly over a step: 2.7 / 127 / sqrt(12) = 0.6 % of a standard deviation. y has the same ratio of errors to
    values; the largest of some thousand varies by half as much again.
    """
    limits = {"fp32": 1e-6, "int8": 1e-2, "bf16": 3e-3, "fp16": 2e-3}
    for group in (32, 128):
        case = quantised(256, 512, group)
        for m in (1, 24):
            x = rows(m, 512)
            wanted = x.astype(np.float64) @ case.matrix.T
            error = np.abs(product(kernel, case, x) - wanted).max() / np.abs(wanted).max()
            assert error < limits[TABLE[kernel][0]]


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unquantised_weights(kernel, dtype):
    for n, k in [(1, 1), (64, 4), (65, 33), (130, 257), (66, 1100)]:
        case = dense(n, k, dtype)
        if TABLE[kernel][0] != "fp32":
            with pytest.raises(ValueError, match=f"no kernel '{kernel}'"):
                product(kernel, case, rows(1, k))
            continue
        for m in (1, 2, 3, 4, 5, 12, 13, 30):
            check(kernel, case, rows(m, k))


@every_kernel
@pytest.mark.parametrize(("bits", "asymmetric"), STORES)
def test_a_row_is_the_same_alone_and_among_others_and_on_any_threads(kernel, bits, asymmetric):
    case = quantised(331, 192, 64, bits, asymmetric)
    x = rows(531, 192)
    x[7] *= 1e20
    x[20, 5] = np.nan
    together = product(kernel, case, x)
    for m in [*range(1, 41), 239, 240, 241, 252, 516, 517, 530]:
        for threads in (1, 2, 3, 5) if m in (1, 2, 5, 13, 241) else (1,):
            assert np.array_equal(product(kernel, case, x[:m], threads), together[:m], equal_nan=True)
    for first in (1, 20, 41, 300, 530):
        for m in (1, 2, 11):
            alone = product(kernel, case, x[first : first + m])
            assert np.array_equal(alone, together[first : first + m], equal_nan=True)


@every_fp32_kernel
def test_a_row_through_unquantised_weights_is_the_same_alone(kernel):
    case = dense(130, 1500, torch.bfloat16)
    x = rows(27, 1500)
    together = product(kernel, case, x, threads=5)
    for m in range(1, 27):
        assert np.array_equal(product(kernel, case, x[:m], threads=1), together[:m])


@every_kernel
@pytest.mark.parametrize("scale", [0.0, 2.0**-24, 2.0**-14, 65504.0])
@pytest.mark.parametrize("multiplier", [2.0**-30, 1.0, 2.0**20])
def test_zero_and_extreme_scales(kernel, scale, multiplier):
    for bits, asymmetric in STORES:
        case = quantised(70, 96, 32, bits, asymmetric, scales=scale, multiplier=multiplier)
        for m in (1, 5):
            check(kernel, case, rows(m, 96))
            if scale == 0.0:
                assert not product(kernel, case, rows(m, 96)).any()


@every_kernel
def test_scales_that_differ_widely_between_groups(kernel):
    scales = np.tile([0.0, 1e-7, 1.0, 60000.0], (70, 1))
    for bits, asymmetric in STORES:
        for m in (1, 3, 14):
            check(kernel, quantised(70, 128, 32, bits, asymmetric, scales=scales), rows(m, 128))


@every_kernel
@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-38, 1e-30, 1e-20, 1e20, 1e30])
def test_very_small_and_very_large_rows(kernel, size):
    for bits, asymmetric in STORES:
        case = quantised(70, 96, 32, bits, asymmetric)
        for m in (1, 6):
            x = (rows(m, 96).astype(np.float64) * size).astype(np.float32)
            x[0, 32:64] = 0.0
            check(kernel, case, x)


@every_kernel
def test_rows_of_zeros_give_zeros(kernel):
    for bits, asymmetric in STORES:
        for m in (1, 13):
            y = product(kernel, quantised(70, 96, 32, bits, asymmetric), np.zeros((m, 96), np.float32))
            assert not y.any()
            assert not np.signbit(y).any()


@every_kernel
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 2, 4, 5, 14])
def test_nan_and_infinity_stay_in_their_row(kernel, value, m):
    for bits, asymmetric in STORES:
        case = quantised(70, 96, 32, bits, asymmetric)
        x = rows(m, 96)
        clean = product(kernel, case, x)
        x[m // 2, 40] = value
        y = product(kernel, case, x)
        assert not np.isfinite(y[m // 2]).any()
        if np.isnan(value):
            assert np.isnan(y[m // 2]).all()
        others = np.arange(m) != m // 2
        assert np.array_equal(y[others], clean[others])


@every_kernel
@pytest.mark.parametrize("offset", [1, 2, 3, 31])
def test_misaligned_arrays(kernel, offset):
    def place(size):
        return np.empty(size + offset, np.uint8)[offset:]

    x = np.empty(9 * 96 + offset, np.float32)[offset:].reshape(9, 96)
    x[:] = rows(9, 96)
    for bits, asymmetric in STORES:
        case = quantised(70, 96, 32, bits, asymmetric, place=place)
        for m in (1, 9):
            wanted = product(kernel, quantised(70, 96, 32, bits, asymmetric), rows(9, 96)[:m])
            y = np.empty(m * 70 + offset, np.float32)[offset:].reshape(m, 70)
            _native.multiply(POOLS[1], case.weight, x[:m], y, kernel)
            assert np.array_equal(y, wanted)
    if TABLE[kernel][0] == "fp32":
        for dtype in (torch.float32, torch.bfloat16):
            check(kernel, dense(70, 97, dtype, place=place), rows(5, 97))


class Guarded:
    """Arrays that end at, or begin behind, a page that no one may touch: an access outside ends the process."""

    def __init__(self, at_end: bool):
        self.at_end = at_end
        self.kept: list[mmap.mmap] = []
        self.libc = ctypes.CDLL(None, use_errno=True)

    def place(self, size: int, dtype=np.uint8) -> np.ndarray:
        page = mmap.PAGESIZE
        inner = -(-size // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        self.kept.append(memory)
        first = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
        for guard in (first, first + page + inner):
            if self.libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        at = page + (inner - size if self.at_end else 0)
        return np.frombuffer(memory, np.uint8, size, at).view(dtype)

    def copy(self, values: np.ndarray) -> np.ndarray:
        out = self.place(values.nbytes, values.dtype).reshape(values.shape)
        out[:] = values
        return out


@every_kernel
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_no_access_outside_the_arrays(kernel, at_end):
    guarded = Guarded(at_end)
    cases = [quantised(n, k, group, *store, place=guarded.place) for store in STORES
             for n, k, group in [(65, 66, 33), (70, 96, 32), (1, 5, 5)]]  # fmt: skip
    if TABLE[kernel][0] == "fp32":
        cases += [dense(70, 33, dtype, place=guarded.place) for dtype in (torch.float32, torch.bfloat16)]
    for case in cases:
        n, groups, group = case.differences.shape
        for m in (1, 2, 3, 4, 5, 8, 9, 13, 25):
            x = guarded.copy(rows(m, groups * group))
            y = guarded.copy(np.zeros((m, n), np.float32))
            _native.multiply(POOLS[1], case.weight, x, y, kernel)
            wanted = rows(m, groups * group).astype(np.float64) @ case.matrix.T
            assert (np.abs(y - wanted) <= largest_error(TABLE[kernel][0], case, x)).all()


def silu(x):
    return x / (1 + np.exp(-x))


@every_kernel
@pytest.mark.parametrize("m", [1, 4, 5, 15])
def test_epilogue_bias_activation_and_gate(kernel, m):
    case = quantised(128, 96, 32, seed=3)
    table, bias = rows(16, 96), rows(1, 128)[0]
    program = _native.Program(POOLS[2], 16)
    x = program.buffer(96)
    program.embed(table, x)
    program.linear(case.weight, x, bias=bias, activation="silu", gated=True, kernel=kernel)
    program.finish()
    tokens = np.arange(m, dtype=np.int32)
    y = np.empty((m, 64), np.float32)
    program.run(tokens, np.zeros(m, np.int32), tokens, tokens, y)
    sums = (product(kernel, case, table[:m]).astype(np.float64) + bias).reshape(m, 4, 2, 16)
    np.testing.assert_allclose(y, (silu(sums[:, :, 0]) * sums[:, :, 1]).reshape(m, 64), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "same", [["avx_vnni", "amx_int8"], ["avx2", "avx512f"]], ids=["int8", "fp32 by fused multiply-add"]
)
def test_kernels_that_add_up_in_the_same_order_agree_bit_by_bit(same):
    here = [name for name in same if TABLE[name][1]]
    if len(here) < 2:
        pytest.skip(f"this processor or system has fewer than two of {', '.join(same)}")
    for bits, asymmetric in STORES:
        case = quantised(70, 192, 64, bits, asymmetric)
        first, *others = (product(kernel, case, rows(17, 192)) for kernel in here)
        assert all(np.array_equal(first, other) for other in others)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.sampled_from(HERE),
    m=st.integers(1, 30),
    n=st.integers(1, 200),
    groups=st.integers(1, 6),
    group=st.integers(1, 70),
    store=st.sampled_from(STORES),
    threads=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 1000),
)
def test_any_shape(kernel, m, n, groups, group, store, threads, seed):
    check(kernel, quantised(n, groups * group, group, *store, seed=seed), rows(m, groups * group, seed), threads)


def test_the_best_kernel_is_chosen_and_can_be_overruled():
    case, x = quantised(64, 64, 32), rows(3, 64)
    assert np.array_equal(product("auto", case, x), product(HERE[0], case, x))
    for compute in {TABLE[name][0] for name in HERE}:
        best = next(name for name in HERE if TABLE[name][0] == compute)
        y = np.empty((3, 64), np.float32)
        _native.multiply(POOLS[1], case.weight, x, y, "auto", compute)
        assert np.array_equal(y, product(best, case, x))
    assert "scalar" in HERE


def test_groups_whose_sums_no_int32_holds_go_to_another_kernel():
    int8 = [name for name in HERE if TABLE[name][0] == "int8"]
    for k, fits in ((65536, True), (65540, False)):
        codes, scales, zeros = np.full((1, k), 255, np.uint8), np.full((1, 1), 2**-14, np.float16), np.zeros((1, 1))
        data = np.empty(_native.packed_bytes(1, k, k, 8, True), np.uint8)
        _native.pack(codes, scales.view(np.uint16), zeros.astype(np.uint8), 8, data)
        weight = _native.Weight.of(data, 1, k, k, 8, True)
        x, y = np.ones((1, k), np.float32), np.empty((1, 1), np.float32)
        for kernel in ("auto", *HERE):
            if kernel in int8 and not fits:
                with pytest.raises(ValueError, match=f"no kernel '{kernel}'"):
                    _native.multiply(POOLS[1], weight, x, y, kernel)
                continue
            _native.multiply(POOLS[1], weight, x, y, kernel)
            assert y[0, 0] == pytest.approx(255 * k * 2.0**-14, rel=0.01)


def test_what_cannot_be_multiplied_is_refused():
    case = quantised(8, 8, 8)
    with pytest.raises(ValueError, match="no kernel 'avx1024'"):
        product("avx1024", case, rows(1, 8))
    with pytest.raises(ValueError, match="x must have k columns"):
        product("auto", case, rows(1, 9))
    with pytest.raises(ValueError, match="y must be"):
        _native.multiply(POOLS[1], case.weight, rows(2, 8), np.empty((1, 8), np.float32))

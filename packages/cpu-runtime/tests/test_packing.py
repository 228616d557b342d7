"""Weights in panels: the format, its inverse, and input that it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pareto_cpu_runtime import _native

STORES = [(4, False), (4, True), (8, False), (8, True)]


def test_where_a_code_lies():
    """Output 70 is column 6 of the second panel, whose group 1 holds inputs 4 to 7; a byte has outputs 6 and 22."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (100, 8), dtype=np.uint8)
    scales = rng.integers(0, 2**15, (100, 2), dtype=np.uint16)
    data = np.empty(_native.packed_bytes(100, 8, 4), np.uint8)
    _native.pack(codes, scales, None, 4, data)
    groups = data.reshape(2, 2, 128 + 128)
    assert groups[1, 1, :128].view(np.uint16)[6] == scales[70, 1]
    assert groups[1, 1, 128 + 4 * 6 + 3] == codes[70, 7] | codes[64 + 22, 7] << 4
    assert groups[0, 0, 128 + 64 + 4 * 5 + 2] == codes[32 + 5, 2] | codes[48 + 5, 2] << 4


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 140), groups=st.integers(1, 5), group=st.integers(1, 40), store=st.sampled_from(STORES))
def test_unpacking_gives_what_was_packed(n, groups, group, store):
    bits, asymmetric = store
    rng = np.random.default_rng(n)
    codes = rng.integers(0, 2**bits, (n, groups * group), dtype=np.uint8)
    scales = rng.integers(0, 2**16, (n, groups), dtype=np.uint16)
    zeros = rng.integers(0, 2**bits, (n, groups), dtype=np.uint8) if asymmetric else None
    data = np.empty(_native.packed_bytes(n, groups * group, group, bits, asymmetric), np.uint8)
    _native.pack(codes, scales, zeros, bits, data)
    back = [np.empty_like(a) if a is not None else None for a in (codes, scales, zeros)]
    _native.Weight.of(data, n, groups * group, group, bits, asymmetric).unpack(*back)
    for packed, unpacked in zip((codes, scales, zeros), back, strict=True):
        assert packed is unpacked is None or np.array_equal(packed, unpacked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_unquantised_weights(dtype):
    values = torch.randn(67, 31).to(dtype)
    data = np.empty(_native.packed_bytes(67, 31, 31, 8 * dtype.itemsize), np.uint8)
    _native.pack_dense(values, data)
    back = torch.empty_like(values)
    _native.Weight.of(data, 67, 31, 31, 8 * dtype.itemsize).unpack_dense(back)
    assert torch.equal(back, values)
    # Input 2 of output 65: second panel, 64 outputs of each input, inputs filled up to 32.
    panels = torch.from_numpy(data).view(dtype).view(2, 32, 64)
    assert panels[1, 2, 1] == values[65, 2]
    assert not panels[1, :, 3:].any()
    assert not panels[:, 31].any()


def pack_with(**changed):
    arrays = {
        "codes": np.zeros((2, 8), np.uint8),
        "scales": np.zeros((2, 2), np.uint16),
        "zeros": None,
        "bits": 4,
        "out": np.zeros(_native.packed_bytes(2, 8, 4), np.uint8),
    }
    return _native.pack(**(arrays | changed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _native.packed_bytes(0, 8, 8), "at least 1"),
        (lambda: _native.packed_bytes(2**40, 8, 8), "at most"),
        (lambda: _native.packed_bytes(8, 8, 3), "group must divide k"),
        (lambda: _native.packed_bytes(8, 8, 8, 5), "bits must be"),
        (lambda: _native.packed_bytes(8, 8, 4, 32), "group k"),
        (lambda: _native.packed_bytes(8, 8, 8, 16, True), "zero points"),
        (lambda: _native.Weight.of(np.zeros(10, np.uint8), 8, 8, 8), "packed data has 10 bytes"),
        (lambda: pack_with(codes=np.full((2, 8), 16, np.uint8)), "end at 15"),
        (lambda: pack_with(scales=np.zeros((2, 3), np.uint16)), "must divide k"),
        (lambda: pack_with(scales=np.zeros((3, 2), np.uint16)), "a row per output"),
        (lambda: pack_with(zeros=np.zeros((2, 1), np.uint8)), "shape of scales"),
        (lambda: pack_with(out=np.zeros(9, np.uint8)), "wrong size"),
        (lambda: pack_with(bits=16), "pack_dense"),
        (lambda: _native.pack_dense(np.zeros((2, 8)), np.zeros(9, np.uint8)), "fp32 or bf16"),
        (lambda: _native.pack_dense(np.zeros((2, 8), np.float32), np.zeros(9, np.uint8)), "wrong size"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()

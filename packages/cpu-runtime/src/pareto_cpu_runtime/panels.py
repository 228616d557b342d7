"""The packed layout in numpy: slower than the native module's, for machines where that is not built.

The layout is described in ``native/packed.h``; here it is a chain of reshapes. Panels of 64 outputs; per group 64 fp16
scales, 64 uint8 zeros where asymmetric, then quads of 4 inputs, of which a u4 quad holds outputs c and 16 + c (c < 16)
of each half panel in the low and high nibble of one byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PANEL, QUAD = 64, 4
Bytes = NDArray[np.uint8]


def quads(group: int) -> int:
    """Quads of inputs in a group."""
    return -(-group // QUAD)


def group_bytes(group: int, bits: int, asymmetric: bool) -> int:
    """Bytes of one group of one panel; ``bits`` is 4 or 8."""
    return PANEL * (3 if asymmetric else 2) + quads(group) * PANEL * QUAD * bits // 8


def packed_bytes(n: int, k: int, group: int, bits: int, asymmetric: bool) -> int:
    """Bytes of a packed matrix of n outputs and k inputs."""
    return -(-n // PANEL) * (k // group) * group_bytes(group, bits, asymmetric)


def pack(codes: Bytes, scales: NDArray[np.float16], zeros: Bytes | None, bits: int) -> Bytes:
    """Return the panels (bytes,) of codes (n, k), scales and zeros (n, groups)."""
    n, k = codes.shape
    groups = scales.shape[1]
    group, panels = k // groups, -(-n // PANEL)
    rows = panels * PANEL - n
    middle = 2 ** (bits - 1)
    all_zeros = np.full(scales.shape, middle, np.uint8) if zeros is None else zeros
    all_zeros = np.pad(all_zeros, ((0, rows), (0, 0)), constant_values=middle)
    inputs = np.repeat(all_zeros[:, :, None], quads(group) * QUAD, 2)
    inputs[:n, :, :group] = codes.reshape(n, groups, group)
    out = np.empty((panels, groups, group_bytes(group, bits, zeros is not None)), np.uint8)
    headers = np.pad(scales, ((0, rows), (0, 0))).reshape(panels, PANEL, groups).transpose(0, 2, 1)
    out[:, :, : 2 * PANEL] = np.ascontiguousarray(headers).view(np.uint8)
    if zeros is not None:
        out[:, :, 2 * PANEL : 3 * PANEL] = all_zeros.reshape(panels, PANEL, groups).transpose(0, 2, 1)
    start = PANEL * (2 if zeros is None else 3)
    out[:, :, start:] = _to_quads(inputs.reshape(panels, PANEL, groups, quads(group), QUAD), bits)
    return out.reshape(-1)


def _to_quads(inputs: Bytes, bits: int) -> Bytes:
    """(panels, 64, groups, quads, 4) codes to (panels, groups, bytes)."""
    panels, _, groups = inputs.shape[:3]
    if bits == 8:
        return inputs.transpose(0, 2, 3, 1, 4).reshape(panels, groups, -1)
    halves = inputs.reshape(panels, 2, 2, 16, groups, inputs.shape[3], QUAD)
    merged = halves[:, :, 0] | (halves[:, :, 1] << 4)  # (panels, half, 16, groups, quads, 4)
    return merged.transpose(0, 3, 4, 1, 2, 5).reshape(panels, groups, -1)


def unpack(
    data: Bytes, n: int, k: int, group: int, bits: int, asymmetric: bool
) -> tuple[Bytes, NDArray[np.float16], Bytes | None]:
    """Return codes (n, k), scales and zeros (n, groups) of panels: the inverse of :func:`pack`."""
    groups, panels = k // group, -(-n // PANEL)
    cells = data.reshape(panels, groups, group_bytes(group, bits, asymmetric))
    scales = np.ascontiguousarray(cells[:, :, : 2 * PANEL]).view(np.float16).transpose(0, 2, 1).reshape(-1, groups)[:n]
    start, zeros = 2 * PANEL, None
    if asymmetric:
        zeros = np.ascontiguousarray(cells[:, :, start : 3 * PANEL].transpose(0, 2, 1).reshape(-1, groups)[:n])
        start = 3 * PANEL
    inputs = _from_quads(cells[:, :, start:], quads(group), bits)
    codes = inputs.reshape(panels * PANEL, groups, -1)[:n, :, :group].reshape(n, k)
    return np.ascontiguousarray(codes), np.ascontiguousarray(scales), zeros


def _from_quads(cells: Bytes, count: int, bits: int) -> Bytes:
    """(panels, groups, bytes) to (panels, 64, groups, quads * 4) codes."""
    panels, groups = cells.shape[:2]
    if bits == 8:
        inputs = cells.reshape(panels, groups, count, PANEL, QUAD).transpose(0, 3, 1, 2, 4)
    else:
        merged = cells.reshape(panels, groups, count, 2, 16, QUAD).transpose(0, 3, 4, 1, 2, 5)
        inputs = np.stack((merged & 15, merged >> 4), 2)  # (panels, half, nibble, 16, groups, quads, 4)
    return inputs.reshape(panels, PANEL, groups, count * QUAD)


def scales_finite(data: Bytes, group: int, bits: int, asymmetric: bool) -> bool:
    """Whether every fp16 scale in the panels is a finite number."""
    cells = data.reshape(-1, group_bytes(group, bits, asymmetric))
    return bool(np.isfinite(np.ascontiguousarray(cells[:, : 2 * PANEL]).view(np.float16)).all())

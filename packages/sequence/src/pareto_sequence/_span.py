"""How far a TCN's filters reach, counted without powers of thousands of digits."""

from __future__ import annotations

#: distances between taps, and between a filter's first and last, are 32-bit integers in the kernels
SPAN_LIMIT = 2**31


def last_dilation(factor: int, depth: int) -> int:
    """Return factor^(depth - 1), or of a power that reaches :data:`SPAN_LIMIT` the first that does."""
    dilation = 1
    for _ in range(depth - 1 if factor > 1 else 0):
        dilation *= factor
        if dilation >= SPAN_LIMIT:
            break
    return dilation


def reach_problem(kernel_size: int, factor: int, depth: int, depth_name: str) -> str:
    """Say which of dilation and span is beyond the limit, and what would be within; empty where neither is."""
    dilation = last_dilation(factor, depth)
    power = f"dilation_factor^({depth_name} - 1)"
    for what, value in ((power, dilation), (f"(kernel_size - 1) * {power}", (kernel_size - 1) * dilation)):
        if value >= SPAN_LIMIT:
            return f"{what} must be below {SPAN_LIMIT}; take a smaller factor or {depth_name}"
    return ""

"""Kronecker products beside a weight: the matrix itself, and ``y + scale * x @ kron(a, b)`` without forming it.

``a`` is (m1, n1) and ``b`` (m2, n2) throughout, ``x`` (…, m1·m2) and ``y`` (…, n1·n2). Two matrix products do it, one
with each factor; the one that comes first gives the intermediate h, which the gradient of the other factor needs.
Autograd would keep h until then; the gradients here are written out instead, and compute large intermediates again
rather than keep them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

#: ``(y, x, a, b, scale)`` to ``y + scale * x @ kron(a, b)``
Add = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

#: in_features · out_features from which h is computed again in the backward pass. From there that costs a hundredth of
#: the frozen layer's time: balanced factors, 512 tokens, one core of an EPYC, forward and backward took 9.3 instead of
#: 8.3 % on top of the frozen layer at 4096². Below it costs more: 12.7 instead of 11.1 % at 2048², 25.3 instead of
#: 22.5 % at 1024², 30 instead of 26 % at 768² (all but 2048² beside other work, each pair in turns).
RECOMPUTED_SIZE = 4096 * 4096


def kron(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Kronecker product of ``a`` (m1, n1) and ``b`` (m2, n2): the matrix (m1·m2, n1·n2) itself."""
    # Eq. (4.1)
    return torch.einsum("ij,kl->ikjl", a, b).reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def kron_linear(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``x @ kron(a, b)`` for ``x`` of shape (…, m1·m2), giving (…, n1·n2) without forming the product."""
    m1, n1, m2, n2 = *a.shape, *b.shape
    y = x.new_zeros(*x.shape[:-1], n1 * n2)
    return cheaper_order(m1, n1, m2, n2)(y, x, a, b, 1.0)


def add_a_first(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``y + scale * x @ kron(a, b)``, contracting with ``a`` first; shapes as in :func:`kron_linear`."""
    return _trained(_AFirst, y, x, a, b, scale) if _trains(a, b) else _a_first(y, x, a, b, scale)[0]


def add_b_first(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``y + scale * x @ kron(a, b)``, contracting with ``b`` first; shapes as in :func:`kron_linear`."""
    return _trained(_BFirst, y, x, a, b, scale) if _trains(a, b) else _b_first(y, x, a, b, scale)[0]


def multiplications(m1: int, n1: int, m2: int, n2: int) -> tuple[int, int]:
    """Multiplications per row of (A first, B first)."""
    return n1 * m2 * (m1 + n2), m1 * n2 * (m2 + n1)


def cheaper_order(m1: int, n1: int, m2: int, n2: int) -> Add:
    """Return :func:`add_a_first` or :func:`add_b_first`, whichever multiplies less (A first on a tie)."""
    a_first, b_first = multiplications(m1, n1, m2, n2)
    return add_a_first if a_first <= b_first else add_b_first


def nearest_shapes(
    a_shape: tuple[int, int], in_features: int, out_features: int, count: int = 4
) -> list[tuple[int, int]]:
    """Shapes of A that factor the layer, nearest to ``a_shape`` in parameters first, then in form."""

    def distance(shape: tuple[int, int]) -> tuple[float, float]:
        ratios = [math.log(mine / asked) for mine, asked in zip(shape, a_shape, strict=True)]
        return abs(math.log(parameters(shape) / parameters(a_shape))), sum(map(abs, ratios))

    def parameters(shape: tuple[int, int]) -> float:
        size = shape[0] * shape[1]
        return size + in_features * out_features / size

    return sorted(((m, n) for m in _divisors(in_features) for n in _divisors(out_features)), key=distance)[:count]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _a_first(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and h = Aᵀ·X of every row, of shape (rows, n1, m2)."""
    (m1, _), (m2, n2) = a.shape, b.shape
    # Eq. (4.2)
    h = _each(a.t(), x.reshape(-1, m1, m2))
    # Eq. (4.3)
    return torch.addmm(y.reshape(-1, n2), h.view(-1, m2), b, alpha=scale).view(y.shape), h


def _b_first(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and h = X·B of every row, of shape (rows, m1, n2)."""
    (m1, n1), (m2, n2) = a.shape, b.shape
    # Eq. (4.2)
    h = torch.mm(x.reshape(-1, m2), b).view(-1, m1, n2)
    # Eq. (4.3)
    return torch.baddbmm(y.reshape(-1, n1, n2), a.t().expand(len(h), n1, m1), h, alpha=scale).view(y.shape), h


def _each(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``matrix @ row`` for each of ``rows``."""
    return torch.bmm(matrix.expand(len(rows), *matrix.shape), rows)


def _sum_of_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum over rows of ``left[row] @ right[row].T``: each row's product where these are no larger than the rows.

    Else, and where rounding each product to half precision would lose digits, as one product of transposed copies. On
    one core of an EPYC, 512 rows, copies cost 1 to 4 % of a frozen layer of 1024² more; at 2048² neither is faster.
    """
    (p, size), q = left.shape[1:], right.shape[1]
    if p * q <= (p + q) * size and left.element_size() >= 4:
        return torch.bmm(left, right.transpose(1, 2)).sum(0)
    return left.transpose(0, 1).flatten(1) @ right.transpose(0, 1).flatten(1).t()


def _trains(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether gradients are to be written out: a compiler decides by itself what it computes again.

    They are for the backward pass; in forward mode (``torch.func.jvp``, ``hessian``), PyTorch derives the plain path.
    """
    wanted = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return wanted and not torch.compiler.is_compiling() and forward_ad._current_level < 0


def _trained(
    order: Any, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        y, x, a, b = y.to(dtype), x.to(dtype), a.to(dtype), b.to(dtype)
    keep = x.shape[-1] * y.shape[-1] < RECOMPUTED_SIZE
    result: torch.Tensor = order.apply(y, x, a, b, scale, keep)[0]
    return result


class _Recomputing(torch.autograd.Function):
    """What both orders remember between the passes: x and the factors, and h where it is to be kept."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, x, a, b, ctx.scale, _ = inputs
        h = output[1]
        ctx.set_materialize_grads(False)
        if h is not None:
            ctx.mark_non_differentiable(h)
        ctx.save_for_backward(x, a, b, h)


class _AFirst(_Recomputing):
    """:func:`_a_first` with its gradients; gives h as well where it is to be kept."""

    @staticmethod
    def forward(
        y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        result, h = _a_first(y, x, a, b, scale)
        return result, h if keep else None

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        (x, a, b), h = _recall(ctx)
        (m1, n1), (m2, n2) = a.shape, b.shape
        rows, g_rows = x.reshape(-1, m1, m2), g.reshape(-1, n2)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[3]:
            h = _each(a.t(), rows) if h is None else h
            grad_b = ctx.scale * (h.view(-1, m2).t() @ g_rows)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_h = (g_rows @ (ctx.scale * b).t()).view(-1, n1, m2)
            grad_a = _sum_of_products(rows, grad_h) if ctx.needs_input_grad[2] else None
            grad_x = _each(a, grad_h).view(x.shape) if ctx.needs_input_grad[1] else None
        return g, grad_x, grad_a, grad_b, None, None


class _BFirst(_Recomputing):
    """:func:`_b_first` with its gradients; gives h as well where it is to be kept."""

    @staticmethod
    def forward(
        y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        result, h = _b_first(y, x, a, b, scale)
        return result, h if keep else None

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        (x, a, b), h = _recall(ctx)
        (m1, n1), (m2, n2) = a.shape, b.shape
        rows, g_rows = x.reshape(-1, m2), g.reshape(-1, n1, n2)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[2]:
            h = torch.mm(rows, b).view(-1, m1, n2) if h is None else h
            grad_a = ctx.scale * _sum_of_products(h, g_rows)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            grad_h = _each(ctx.scale * a, g_rows).view(-1, n2)
            grad_b = rows.t() @ grad_h if ctx.needs_input_grad[3] else None
            grad_x = (grad_h @ b.t()).view(x.shape) if ctx.needs_input_grad[1] else None
        return g, grad_x, grad_a, grad_b, None, None


def _recall(ctx: Any) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """``(x, a, b)`` and h; no h where gradients are to be differentiated again, since a kept one is a constant."""
    *inputs, h = ctx.saved_tensors
    return inputs, None if torch.is_grad_enabled() else h

from __future__ import annotations

import pytest
import torch

from pareto_sequence import conv_native
from pareto_sequence.turn_native import turned

native = conv_native.native_or_none()
pytestmark = pytest.mark.skipif(native is None, reason="the native module is not built")

SHAPES = [(1, 1, 1), (2, 1, 70), (2, 70, 1), (3, 31, 33), (2, 32, 64), (1, 65, 97), (2, 0, 5), (0, 4, 5), (1, 200, 128)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_is_where_torch_has_it(shape, threads):
    x = torch.randn(shape)
    out = torch.empty(shape[0], shape[2], shape[1])
    native.turn(x, out, threads)
    assert torch.equal(out, x.transpose(1, 2))


def test_the_gradient_is_turned_back_and_views_are_read_as_they_are():
    x = torch.randn(2, 9, 40)[:, :, 3:].requires_grad_()
    y = turned(x)
    assert y.is_contiguous()
    assert torch.equal(y, x.transpose(1, 2))
    weight = torch.randn(2, 37, 9)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(gradient, weight.transpose(1, 2))
    (constant,) = torch.autograd.grad(turned(x).sum(), x)  # an expanded gradient
    assert torch.equal(constant, torch.ones_like(x))


def test_nothing_beside_the_output_is_written():
    around = torch.full((3, 7, 5), -1.0)
    native.turn(torch.ones(1, 5, 7), around[1:2], 2)
    assert (around[0] == -1).all()
    assert (around[1] == 1).all()
    assert (around[2] == -1).all()


def test_wrong_shapes_and_overlap_are_refused():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="last two dimensions exchanged"):
        native.turn(x, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="overlap"):
        native.turn(x, x.view(2, 4, 3))
    with pytest.raises(ValueError, match="threads"):
        native.turn(x, torch.zeros(2, 4, 3), 0)


def test_it_can_be_differentiated_twice():
    x = torch.randn(2, 5, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad((turned(x) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.equal(second, 6 * x)

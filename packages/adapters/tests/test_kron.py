from __future__ import annotations

import itertools

import pytest
import torch

from pareto_adapters import _kron as kernels
from pareto_adapters import kron, kron_linear
from pareto_adapters._kron import add_a_first, add_b_first, cheaper_order, multiplications, nearest_shapes

#: (m1, n1, m2, n2), square layers and others, factors of size one and primes among them
SHAPES = [(2, 3, 5, 7), (1, 1, 4, 6), (4, 6, 1, 1), (3, 1, 1, 5), (7, 2, 3, 11), (2, 8, 8, 2), (8, 2, 2, 8)]

ORDERS = [add_a_first, add_b_first]


@pytest.fixture(params=["kept", "recomputed"])
def hidden(request, monkeypatch) -> str:
    """What becomes of the intermediate between the passes; layers this small would keep theirs."""
    monkeypatch.setattr(kernels, "RECOMPUTED_SIZE", 0 if request.param == "recomputed" else 2**62)
    return request.param


def inputs(shape: tuple[int, int, int, int], rows: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """(y, x, a, b), all of which take gradients."""
    m1, n1, m2, n2 = shape
    sizes = [(rows, n1 * n2), (rows, m1 * m2), (m1, n1), (m2, n2)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, dtype=dtype, generator=generator).requires_grad_() for size in sizes]


def naive(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Element by element from the definition, for one row."""
    (m1, n1), (m2, n2) = a.shape, b.shape
    y = [x.new_zeros(()) for _ in range(n1 * n2)]
    for i, j, k, m in itertools.product(range(m1), range(n1), range(m2), range(n2)):
        y[j * n2 + m] = y[j * n2 + m] + x[i * m2 + k] * a[i, j] * b[k, m]
    return torch.stack(y)


def test_hand_computed():
    a = torch.tensor([[1.0, 2.0]])
    b = torch.tensor([[1.0], [10.0]])
    assert kron(a, b).tolist() == [[1.0, 2.0], [10.0, 20.0]]
    assert kron_linear(torch.tensor([3.0, 5.0]), a, b).tolist() == [53.0, 106.0]


def test_equation_4_2_from_the_left_is_row_major():
    torch.manual_seed(0)
    a, b, x = torch.randn(2, 3).double(), torch.randn(4, 5).double(), torch.randn(15).double()
    torch.testing.assert_close(torch.kron(a, b) @ x, (a @ x.reshape(3, 5) @ b.T).flatten())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("add", ORDERS)
def test_outputs_and_gradients_equal_the_reference(shape, add, hidden):
    torch.manual_seed(0)
    m1, n1, m2, n2 = shape
    a = torch.randn(m1, n1, dtype=torch.float64, requires_grad=True)
    b = torch.randn(m2, n2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, m1 * m2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, n1 * n2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, n1 * n2, dtype=torch.float64)
    ours = add(y, x, a, b, 0.7)
    reference = y + 0.7 * (x @ torch.kron(a, b))
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(kron(a, b), torch.kron(a, b))
    torch.testing.assert_close(kron_linear(x, a, b), x @ torch.kron(a, b))
    torch.testing.assert_close(kron_linear(x[0, 0], a, b), naive(x[0, 0], a, b))
    mine = torch.autograd.grad((ours * weights).sum(), (x, y, a, b))
    theirs = torch.autograd.grad((reference * weights).sum(), (x, y, a, b))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("add", ORDERS)
def test_first_and_second_derivatives_of_strided_inputs(add, hidden):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(4, 5, dtype=torch.float64).T[:, :4].requires_grad_(True)
    y = torch.randn(9, 5, dtype=torch.float64).T.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda *args: add(*args, 1.5), (y, x, a, b))
    assert torch.autograd.gradgradcheck(lambda *args: add(*args, 1.5), (y, x, a, b))


@pytest.mark.parametrize("frozen", [{1}, {2}, {3}, {1, 2}, {1, 3}, {0, 1}, {2, 3}])
@pytest.mark.parametrize("add", ORDERS)
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(add, frozen, hidden):
    given = inputs((2, 3, 5, 7))
    for number in frozen:
        given[number].requires_grad_(False)
    (add(*given, 0.7) ** 2).sum().backward()
    mine = [tensor.grad for tensor in given]
    for tensor in given:
        tensor.grad = None
    y, x, a, b = given
    ((y + 0.7 * x @ torch.kron(a, b)) ** 2).sum().backward()
    for number, (one, tensor) in enumerate(zip(mine, given, strict=True)):
        assert (one is None) == (number in frozen)
        if one is not None:
            torch.testing.assert_close(one, tensor.grad)


@pytest.mark.parametrize("add", ORDERS)
def test_factors_that_are_used_twice_get_both_gradients(add, hidden):
    y, x, a, b = inputs((2, 2, 3, 3))
    (add(y, add(y, x, a, b, 0.5), a, b, 2.0) ** 2).sum().backward()
    mine = [tensor.grad.clone() for tensor in (y, x, a, b)]
    product = torch.kron(a, b)
    reference = torch.autograd.grad(((y + 2.0 * (y + 0.5 * x @ product) @ product) ** 2).sum(), (y, x, a, b))
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("add", ORDERS)
def test_gradients_in_bfloat16_are_as_exact_as_its_digits(add, hidden):
    exact, rounded = inputs((8, 4, 4, 16), rows=200), inputs((8, 4, 4, 16), rows=200, dtype=torch.bfloat16)
    for one, other in zip(rounded, exact, strict=True):
        other.data.copy_(one.data.double())
    weights = torch.randn(200, 64, dtype=torch.float64).bfloat16()
    (add(*exact, 1.5) * weights.double()).sum().backward()
    add(*rounded, 1.5).backward(weights)
    for one, other in zip(rounded, exact, strict=True):
        assert one.grad.dtype == torch.bfloat16
        assert (one.grad.double() - other.grad).norm() < 4 * torch.finfo(torch.bfloat16).eps * other.grad.norm()


@pytest.mark.parametrize("add", ORDERS)
def test_autocast_computes_as_it_does_for_a_plain_product(add, hidden):
    y, x, a, b = inputs((4, 2, 3, 5), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = add(y, x, a, b, 1.5)
        assert ours.dtype == (x @ torch.kron(a, b)).dtype == torch.bfloat16
    ours.float().square().sum().backward()
    mine = [tensor.grad.clone() for tensor in (y, x, a, b)]
    reference = torch.autograd.grad((y + 1.5 * x @ torch.kron(a, b)).square().sum(), (y, x, a, b))
    for one, other in zip(mine, reference, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm()


def saved_bytes(run) -> int:
    """Bytes of the distinct tensors that are kept from the forward to the backward pass of ``run``."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("add", ORDERS)
def test_recomputing_halves_what_a_square_layer_keeps(add, hidden):
    y, x, a, b = inputs((16, 16, 16, 16), rows=64, dtype=torch.float32)
    factors, activation = 2 * 16 * 16 * 4, 64 * 256 * 4
    expected = {"kept": 2 * activation, "recomputed": activation}[hidden] + factors
    assert saved_bytes(lambda: add(y, x, a, b, 1.0)) == expected


@pytest.mark.parametrize(("width", "activations"), [(1024, 2), (4096, 1)])
def test_large_layers_recompute_and_small_ones_do_not(width, activations):
    y, x, a, b = inputs((32, 32, width // 32, width // 32), rows=4, dtype=torch.float32)
    factors = (a.numel() + b.numel()) * 4
    assert saved_bytes(lambda: add_a_first(y, x, a, b, 1.0)) == activations * 4 * width * 4 + factors


@pytest.mark.parametrize("add", ORDERS)
def test_compiles_as_one_graph(add, hidden):
    given = inputs((2, 3, 5, 7))
    compiled = torch.compile(lambda *args: add(*args, 0.7), fullgraph=True, backend="eager")
    ours, plain = compiled(*given), add(*given, 0.7)
    torch.testing.assert_close(ours, plain)
    mine = torch.autograd.grad(ours.square().sum(), given)
    for one, other in zip(mine, torch.autograd.grad(plain.square().sum(), given), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("add", ORDERS)
def test_gradients_of_each_row_by_vmap(add, hidden):
    _, x, a, b = inputs((2, 3, 5, 7))

    def loss(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return add(torch.zeros(1, 21, dtype=x.dtype), x[None], a, b, 0.7).square().sum()

    for_each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(a, b, x)
    for row in range(len(x)):
        product = 0.7 * x[row] @ torch.kron(a, b)
        for one, other in zip(for_each, torch.autograd.grad(product.square().sum(), (a, b)), strict=True):
            torch.testing.assert_close(one[row], other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close(dtype):
    torch.manual_seed(0)
    a, b, x = torch.randn(6, 4), torch.randn(4, 8), torch.randn(10, 24)
    ours = kron_linear(x.to(dtype), a.to(dtype), b.to(dtype))
    assert ours.dtype == dtype
    error = (ours.float() - x @ torch.kron(a, b)).abs().max() / (x @ torch.kron(a, b)).abs().max()
    assert error < 10 * torch.finfo(dtype).eps


def test_empty_batch():
    assert kron_linear(torch.zeros(0, 6), torch.ones(2, 3), torch.ones(3, 2)).shape == (0, 6)


def test_order_is_the_cheaper_one():
    a_first, b_first = multiplications(2, 384, 384, 2)
    assert b_first == 192 * a_first or a_first == 192 * b_first
    assert cheaper_order(24, 16, 16, 24) is add_a_first
    assert cheaper_order(16, 24, 24, 16) is add_b_first
    for shape in SHAPES:
        a_cost, b_cost = multiplications(*shape)
        assert (cheaper_order(*shape) is add_a_first) == (a_cost <= b_cost)


def test_multiplications_are_those_of_the_two_products():
    m1, n1, m2, n2 = 2, 3, 5, 7
    assert multiplications(m1, n1, m2, n2) == (n1 * m1 * m2 + n1 * m2 * n2, m1 * m2 * n2 + n1 * m1 * n2)


def test_nearest_shapes_factor_the_layer_and_start_with_the_same_size():
    found = nearest_shapes((32, 24), 384, 384)
    assert all(384 % m == 0 and 384 % n == 0 for m, n in found)
    assert found[0] == (32, 24)
    assert nearest_shapes((5, 7), 6, 10, count=99)[0] in itertools.product((1, 2, 3, 6), (1, 2, 5, 10))


@pytest.mark.parametrize("order", ORDERS)
def test_forward_mode_and_second_derivatives(hidden, order):
    y, x, a, b = inputs((2, 3, 3, 2))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return order(y, x, a, b, 0.5).square().sum()

    def plain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (y + 0.5 * x @ kron(a, b)).square().sum()

    tangents = torch.ones_like(a), torch.ones_like(b)
    torch.testing.assert_close(torch.func.jvp(loss, (a, b), tangents), torch.func.jvp(plain, (a, b), tangents))
    for mine, expected in zip(torch.func.hessian(loss)(a, b), torch.func.hessian(plain)(a, b), strict=True):
        torch.testing.assert_close(mine, expected)

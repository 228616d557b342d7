import pytest
import torch
from torch.nn import functional as F

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.tcn import TCN, receptive_field

torch.manual_seed(0)


def by_loops(tcn: TCN, x: torch.Tensor) -> torch.Tensor:
    """The cascade position by position in float64, its norm torch's own."""
    y = x.double()
    length = x.shape[1]
    for block in tcn.blocks:
        taps, weight = block.weight.shape[1], block.weight.double()
        convolved = torch.zeros_like(y)
        for t in range(length):
            for k in range(taps):
                if tcn.circular:
                    place = (t + (k - (taps - 1) // 2) * block.dilation) % length
                else:
                    place = t - (taps - 1 - k) * block.dilation
                if place >= 0:
                    convolved[:, t] += weight[:, k] * y[:, place]
        convolved = convolved + block.bias.double()
        norm = F.layer_norm(convolved, (x.shape[2],), block.norm.weight.double(), block.norm.bias.double())
        y = y + F.silu(norm)
    return y if tcn.omega is None else y + tcn.omega.double() * x.double()


def perturbed(tcn: TCN) -> TCN:
    with torch.no_grad():
        for parameter in tcn.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return tcn


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(
    ("kernel", "factor", "depth", "length"), [(3, 2, 3, 17), (4, 3, 2, 5), (1, 5, 1, 3), (5, 7, 2, 1)]
)
def test_equals_loops_in_float64(circular: bool, kernel: int, factor: int, depth: int, length: int) -> None:
    tcn = perturbed(TCN(6, kernel, factor, depth, circular=circular, omega=depth == 2))
    x = torch.randn(2, length, 6)
    torch.testing.assert_close(tcn(x).double(), by_loops(tcn, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("circular", [False, True])
def test_gradients_equal_those_of_the_loops(circular: bool) -> None:
    tcn = perturbed(TCN(3, 3, 2, 2, circular=circular)).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *tcn.parameters()]
    seed = torch.randn(2, 5, 3, dtype=torch.float64)
    ours = torch.autograd.grad(tcn(x), wanted, seed)
    for own, expected in zip(ours, torch.autograd.grad(by_loops(tcn, x), wanted, seed), strict=True):
        torch.testing.assert_close(own, expected)


# ListOps, Text, Image and Retrieval and Path, EnWik8, recall at length 64, 1,024 and 4,096 (tables 7.5 and 7.6).
SETTINGS = {(15, 14, 2): 211, (7, 4, 3): 127, (11, 8, 3): 731, (15, 12, 3): 2199, (15, 2, 3): 99, (15, 8, 3): 1023}


@pytest.mark.parametrize(("setting", "expected"), [*SETTINGS.items(), ((15, 14, 3), 2955)])
def test_receptive_field_is_where_the_gradient_reaches(setting: tuple[int, int, int], expected: int) -> None:
    assert receptive_field(*setting) == expected
    tcn = TCN(2, *setting).double()
    with torch.no_grad():
        for block in tcn.blocks:
            block.weight.abs_().add_(0.1)
    x = torch.randn(1, expected + 40, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(tcn(x)[0, -1, 0], x)
    reached = gradient[0].abs().sum(-1).nonzero().flatten()
    assert int(reached.max()) == x.shape[1] - 1
    assert x.shape[1] - int(reached.min()) == expected == tcn.receptive_field


def test_steps_and_prefill_equal_the_forward_pass() -> None:
    tcn = perturbed(TCN(4, 3, 3, 3, omega=True)).eval()
    x = torch.randn(3, 40, 4)
    whole = tcn(x)
    for read in (0, 1, 7, 39):
        state = None
        if read:
            y, state = tcn.prefill(x[:, :read])
            torch.testing.assert_close(y, whole[:, :read])
        for t in range(read, 40):
            y, state = tcn.step(x[:, t], state)
            torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_an_encoder_wraps_each_row_at_its_own_length(norm: str) -> None:
    tcn = perturbed(TCN(4, 5, 3, 3, circular=True, norm=norm)).eval()
    lengths, x = [11, 4, 1], torch.randn(3, 11, 4)
    mask = (torch.arange(11)[None] < torch.tensor(lengths)[:, None]).long()
    y = tcn(x, mask)
    for row, length in enumerate(lengths):
        alone = tcn(x[row : row + 1, :length])
        torch.testing.assert_close(y[row : row + 1, :length], alone, rtol=1e-5, atol=1e-5)


def test_a_decoder_reads_zeros_where_the_mask_is_zero() -> None:
    tcn = perturbed(TCN(4, 3, 2, 2)).eval()
    x, mask = torch.randn(1, 9, 4), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(tcn(x, mask)[:, 3:], tcn(x[:, 3:]))


def test_bad_input_is_refused_by_name() -> None:
    for arguments, message in [
        ((0, 3, 2, 2), "width = 0"),
        ((4, 0, 2, 2), "kernel_size = 0"),
        ((4, 3, 0, 2), "dilation_factor = 0"),
        ((4, 3, 2, 0), "depth = 0"),
        ((4, 3, 2000, 4), "dilation_factor = 2000: .* must be below 2147483648"),
        ((4, 1, 10**6, 4), r"dilation_factor = 1000000: dilation_factor\^\(depth - 1\) must be below 2147483648"),
        ((4, 3, 10**6, 2000), "dilation_factor = 1000000: .* must be below"),
        ((4, 3, 10**5000, 2), "dilation_factor = a value of type int that is too large to show: .* must be below"),
    ]:
        with pytest.raises(ModelError, match=message):
            TCN(*arguments)
    with pytest.raises(ModelError, match="norm = 'batch'"):
        TCN(4, 3, 2, 2, norm="batch")
    tcn = TCN(4, 3, 2, 2)
    with pytest.raises(ModelError, match="length 0"):
        tcn(torch.randn(1, 0, 4))
    with pytest.raises(ModelError, match=r"shape \(1, 3, 5\): expected \(B, L, D\) with D = 4"):
        tcn(torch.randn(1, 3, 5))
    with pytest.raises(UnsupportedError, match="circular"):
        TCN(4, 3, 2, 2, circular=True).step(torch.randn(1, 4))
    with pytest.raises(ModelError, match="implementation = 'bogus': expected one of auto, reference"):
        TCN(4, 3, 2, 2, implementation="bogus")


def test_a_decoder_reads_nothing_of_what_the_mask_hides() -> None:
    tcn = perturbed(TCN(4, 3, 2, 2)).eval()
    x, mask = torch.randn(1, 9, 4), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    x[0, 1] = float("nan")
    torch.testing.assert_close(tcn(x, mask)[:, 3:], tcn(x[:, 3:]))

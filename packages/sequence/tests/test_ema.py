from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from scipy.special import expit

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence.ema import DampedEMA, fft_convolve, smooth_size

ALGORITHMS = ["fft", "factored", "truncated", "auto"]
#: logits of α and δ: near 0, in the middle, and where αδ rounds to 1 in bf16, fp16 and fp32
LOGITS = [-18.0, -10.0, -6.0, 0.0, 7.0, 10.0, 18.0, 40.0]


def make(width: int = 3, state_size: int = 4, seed: int = 0, **options) -> DampedEMA:
    torch.manual_seed(seed)
    return DampedEMA(width, state_size, **options)


@pytest.fixture
def linear(monkeypatch) -> None:
    """No SiLU: it takes large negative averages to 0, and with them the scale that errors are measured by."""
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: x)


def silu(x: np.ndarray) -> np.ndarray:
    return x * expit(x)


def average(ema: DampedEMA, x: torch.Tensor) -> np.ndarray:
    """Eq. 7.2 in float64 by SciPy's linear filter, one average at a time; ``x`` is (B, L, D)."""
    a, d, beta, gamma, omega = (
        p.detach().double().numpy() for p in (ema.alpha_logit, ema.delta_logit, ema.beta, ema.gamma, ema.omega)
    )
    values = x.double().numpy()
    y = values * omega
    for channel, n in itertools.product(range(ema.width), range(ema.state_size)):
        q = 1 - expit(a[channel, n]) * expit(d[channel, n])
        scale = expit(a[channel, n]) * beta[channel, n] * gamma[channel, n] / math.sqrt(ema.state_size)
        y[..., channel] += lfilter([scale], [1.0, -q], values[..., channel], axis=1)
    return y


def recurrence(ema: DampedEMA, x: torch.Tensor) -> np.ndarray:
    """The same with the activation."""
    return silu(average(ema, x))


def loops(ema: DampedEMA, x: torch.Tensor) -> torch.Tensor:
    """The definition, token by token, differentiable; both ways where ``ema`` is."""
    width, count = ema.width, ema.state_size
    alpha, delta = torch.sigmoid(ema.alpha_logit), torch.sigmoid(ema.delta_logit)

    def run(rows: slice, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        h, outputs = torch.zeros(len(x), width, count, dtype=x.dtype), []
        for token in tokens:
            h = alpha[rows] * ema.beta[rows] * token[..., None] + (1 - alpha[rows] * delta[rows]) * h
            outputs.append((ema.gamma[rows] * h).sum(-1) / count**0.5)
        return outputs

    tokens = list(x.unbind(1))
    y = torch.stack(run(slice(0, width), tokens), 1) + ema.omega * x
    if ema.bidirectional:
        ahead = run(slice(width, None), tokens[::-1])[::-1]
        y = y + torch.stack([*ahead[1:], torch.zeros_like(ahead[0])], 1)
    return torch.nn.functional.silu(y)


def by_steps(ema: DampedEMA, x: torch.Tensor) -> torch.Tensor:
    state, outputs = None, []
    for token in x.unbind(1):
        y, state = ema.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


def assert_close(y: torch.Tensor, expected: np.ndarray, share: float = 1e-5) -> None:
    error = np.abs(y.detach().double().numpy() - expected).max()
    assert error <= share * np.abs(expected).max(), (error, np.abs(expected).max())


def extremes() -> DampedEMA:
    """One channel for every pair of logits, one average each; no ω, so that small averages are not hidden."""
    ema = make(len(LOGITS) ** 2, 1)
    pairs = torch.tensor(list(itertools.product(LOGITS, LOGITS)))
    with torch.no_grad():
        ema.alpha_logit.copy_(pairs[:, :1])
        ema.delta_logit.copy_(pairs[:, 1:])
        ema.omega.zero_()
    return ema


def assert_channels_close(y: torch.Tensor, expected: np.ndarray) -> None:
    """Within 1e-5 of each channel's own maximum."""
    error = np.abs(y.detach().double().numpy() - expected).max((0, 1)) / np.abs(expected).max((0, 1))
    assert error.max() <= 1e-5, error


def test_hand_computed():
    ema = make(1, 1)
    with torch.no_grad():
        for parameter, value in [(ema.alpha_logit, 0.0), (ema.delta_logit, 0.0), (ema.beta, 2.0), (ema.gamma, 3.0)]:
            parameter.fill_(value)
        ema.omega.fill_(0.5)
    # alpha = delta = 1/2: q = 3/4, taps 3, 9/4, 27/16
    assert ema.kernel(3).tolist() == [[3.0, 2.25, 1.6875]]
    y = ema(torch.tensor([[[1.0], [0.0], [2.0]]])).flatten()
    torch.testing.assert_close(y, torch.nn.functional.silu(torch.tensor([3.5, 2.25, 1.6875 + 6 + 1])))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 100, 4097, 65536])
def test_extreme_decays_agree_with_the_float64_recurrence(algorithm, length, linear):
    ema = extremes()
    ema.algorithm = algorithm
    x = torch.randn(1, length, ema.width)
    with torch.no_grad():
        # A truncated kernel is as long as its slowest channel: by themselves, channels truncate where they can.
        if algorithm == "truncated" and length > 1000:
            some = range(0, ema.width, 5 if length < 5000 else 21)
            y = torch.cat([channel(ema, i)(x[..., i : i + 1]) for i in some], -1)
            assert_channels_close(y, average(ema, x)[..., list(some)])
        else:
            assert_channels_close(ema(x), average(ema, x))


def channel(ema: DampedEMA, index: int) -> DampedEMA:
    """An average of one channel of ``ema``."""
    single = DampedEMA(1, ema.state_size, algorithm=ema.algorithm, tolerance=ema.tolerance)
    state = {name: value[index : index + 1] for name, value in ema.state_dict().items()}
    single.load_state_dict(state)
    return single


@pytest.mark.parametrize("length", [1, 2, 17, 1000])
def test_steps_agree_with_the_float64_recurrence(length, linear):
    ema = extremes()
    x = torch.randn(2, length, ema.width)
    with torch.no_grad():
        y = by_steps(ema, x)
        assert_channels_close(y, average(ema, x))
        assert_channels_close(ema(x), y.double().numpy())


@pytest.mark.parametrize("algorithm", ["fft", "factored", "truncated"])
@pytest.mark.parametrize("deviation", [0.2, 2.0, 6.0])
def test_errors_stay_within_1e_5_of_what_a_channel_could_give(algorithm, deviation, linear):
    """Inputs of alternating sign cancel in slow averages: the output says little of the sum that it comes from."""
    length = 5000 if algorithm == "truncated" else 65536
    x = (1.0 - 2.0 * (torch.arange(length) % 2))[None, :, None].expand(1, length, 6)
    for seed in range(3):
        ema = make(6, 16, seed, algorithm=algorithm)
        with torch.no_grad():
            ema.alpha_logit.normal_(std=deviation)
            ema.delta_logit.normal_(std=deviation)
            ema.omega.zero_()
            impulse = torch.zeros(1, length, 6)
            impulse[:, 0] = 1.0
            largest = np.abs(average(ema, impulse)).sum((0, 1))  # of an input within -1 and 1
            error = np.abs(ema(x).double().numpy() - average(ema, x)).max((0, 1))
        assert (error <= 1e-5 * largest).all(), error / largest


def test_steps_agree_over_65536_tokens(linear):
    ema = extremes()
    x = torch.ones(1, 65536, ema.width)  # of one sign: rounding of the state adds up
    with torch.no_grad():
        assert_channels_close(by_steps(ema, x), average(ema, x))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("width", "state_size", "length"), [(1, 1, 1), (3, 4, 5), (5, 2, 33), (8, 16, 1025)])
def test_random_parameters_agree_with_the_float64_recurrence(algorithm, width, state_size, length):
    ema = make(width, state_size, algorithm=algorithm)
    with torch.no_grad():
        ema.alpha_logit.normal_(std=4)
        ema.delta_logit.normal_(std=4)
    x = torch.randn(3, length, width)
    assert_close(ema(x), recurrence(ema, x))
    assert_close(by_steps(ema, x), recurrence(ema, x))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 20])
def test_outputs_and_gradients_equal_loops(algorithm, bidirectional, length):
    ema = make(bidirectional=bidirectional, algorithm=algorithm, tolerance=1e-15).double()
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, length, 3, dtype=torch.float64)
    y, expected = ema(x), loops(ema, x)
    torch.testing.assert_close(y, expected)
    leaves = [x, *ema.parameters()]
    gradients = torch.autograd.grad((y * weights).sum(), leaves)
    for mine, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_stay_finite_and_right_where_q_is_nought(algorithm):
    ema = extremes()
    ema.algorithm = algorithm
    precise = extremes().double()
    precise.algorithm = "fft"
    x = torch.randn(1, 50, ema.width)
    ema(x).sum().backward()
    precise(x.double()).sum().backward()
    for mine, reference in zip(ema.parameters(), precise.parameters(), strict=True):
        scale = reference.grad.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(mine.grad.double() / scale, reference.grad / scale, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_step_equal_loops():
    ema = make().double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *ema.parameters()]
    gradients = torch.autograd.grad(by_steps(ema, x).square().sum(), leaves)
    for mine, reference in zip(gradients, torch.autograd.grad(loops(ema, x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_future_does_not_leak_into_the_past(algorithm):
    ema = make(algorithm=algorithm)
    x = torch.randn(1, 4096, 3)
    changed = x.clone()
    changed[:, 2000:] += 1e3
    difference = (ema(changed) - ema(x))[:, :2000].abs().max().item()
    # A transform spreads its rounding over the whole sequence: 1e-6 of the largest value.
    assert difference <= (0 if algorithm in ("truncated", "auto") else 2e-3)
    assert (ema(changed) - ema(x))[:, 2000].abs().max() > 1


def test_both_ways_see_the_future_but_count_the_token_once():
    ema = make(1, 2, bidirectional=True)
    impulse = torch.zeros(1, 9, 1)
    impulse[:, 4] = 1
    convolved = fft_convolve(impulse.transpose(1, 2), ema.kernel(9)).flatten()
    kernel = ema.kernel(9)
    torch.testing.assert_close(convolved[4:], kernel[0, :5])
    torch.testing.assert_close(convolved[:4], kernel[1, :4].flip(0))


@pytest.mark.parametrize("length", [1, 2, 3, 10, 99, 4096])
def test_the_factored_kernel_equals_the_powers(length):
    ema = make(8, 16)
    assert ema.factored_kernel(length).shape == (8, length)
    torch.testing.assert_close(ema.factored_kernel(length), ema.kernel(length), rtol=1e-5, atol=1e-6)


def test_the_kernel_equals_numpy_in_float64():
    ema = extremes()
    p = {name: value.double().numpy() for name, value in ema.state_dict().items()}
    q = 1 - expit(p["alpha_logit"]) * expit(p["delta_logit"])
    expected = (expit(p["alpha_logit"]) * p["beta"] * p["gamma"]) * q ** np.arange(64)
    error = np.abs(ema.kernel(64).detach().numpy() - expected).max(1)
    assert (error <= 1e-6 * np.abs(expected[:, 0])).all()
    assert ema.kernel(64).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_is_rounded_once(dtype, algorithm):
    ema = make(8, 16, algorithm=algorithm).to(dtype)
    x = torch.randn(2, 700, 8).to(dtype)
    expected = recurrence(ema, x)
    y = ema(x)
    assert y.dtype == dtype
    assert ema.kernel(5).dtype == torch.float32
    assert_close(y, expected, share=2 * torch.finfo(dtype).eps)
    assert_close(by_steps(ema, x[:, :50]), expected[:, :50], share=2 * torch.finfo(dtype).eps)


def test_autocast_leaves_the_arithmetic_alone():
    ema = make(4, 4)
    x = torch.randn(1, 50, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, kernel = ema(x), by_steps(ema, x)
    assert torch.equal(y, ema(x))
    assert torch.equal(kernel, by_steps(ema, x))


def test_taps_bound_what_is_left_out():
    ema = make(16, 16)
    taps = ema.taps(10**6)
    assert 60 < taps < 300  # the facts: about 104 taps at the start
    kernel = ema.double().kernel(4000).detach()
    whole = (ema._scale().abs() / -torch.expm1(ema._log_q())).sum(1)
    assert (kernel[:, taps:].abs().sum(1) <= ema.tolerance * whole).all()
    assert ema.taps(5) == 5
    with torch.no_grad():
        ema.alpha_logit[0, 0] = -800  # αδ underflows: q = 1, which never decays
    assert ema.taps(10**6) == 10**6


def test_auto_truncates_where_that_is_short(monkeypatch):
    used = []
    ema = make(2, 2, algorithm="auto")
    monkeypatch.setattr("pareto_sequence.ema.fft_convolve", lambda x, k: used.append("fft") or x)
    monkeypatch.setattr("pareto_sequence.ema.direct_convolve", lambda x, k: used.append(k.shape[1]) or x)
    taps = ema.taps(4096)
    ema(torch.randn(1, 4096, 2))
    with torch.no_grad():
        ema.alpha_logit[0, 0] = -12
    ema(torch.randn(1, 4096, 2))
    assert used == [taps, "fft"]


def test_initialisation():
    ema = make(200, 16)
    assert ema.alpha_logit.std().item() == pytest.approx(0.2, rel=0.1)
    assert ema.delta_logit.std().item() == pytest.approx(0.2, rel=0.1)
    assert ema.gamma.std().item() == pytest.approx(1, rel=0.1)
    assert ema.omega.std().item() == pytest.approx(1, rel=0.2)
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    assert (ema.beta - signs).std().item() == pytest.approx(0.02, rel=0.1)
    assert sum(p.numel() for p in ema.parameters()) == 200 * (4 * 16 + 1)
    assert sum(p.numel() for p in make(200, 16, bidirectional=True).parameters()) == 200 * (8 * 16 + 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loaded_weights_count_at_once_in_evaluation(algorithm):
    ema, other = make(algorithm=algorithm).eval(), make(seed=1, algorithm=algorithm).eval()
    x = torch.randn(1, 30, 3)
    with torch.no_grad():
        assert not torch.allclose(ema(x), other(x))
        ema.load_state_dict(other.state_dict())
        assert torch.equal(ema(x), other(x))


def test_a_state_of_lower_precision_is_taken_on():
    ema = make()
    x = torch.randn(2, 9, 3)
    _, state = ema.step(x[:, 0])
    assert state.dtype == torch.float64
    torch.testing.assert_close(ema.step(x[:, 1], state.float()), ema.step(x[:, 1], state), rtol=1e-6, atol=1e-6)


def test_shapes_can_be_counted_without_memory():
    ema = make().to("meta")
    assert ema(torch.empty(2, 9, 3, device="meta")).shape == (2, 9, 3)
    assert ema.step(torch.empty(2, 3, device="meta"))[1].shape == (2, 3, 4)


def test_smooth_sizes():
    for least in [*range(1, 300), 8191, 8194, 131071]:
        size = smooth_size(least)
        candidates = (c for c in itertools.count(least) if not _rest(c) > 1)
        assert size == next(candidates)


def _rest(number: int) -> int:
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(1, 0, 3), "length L must be at least 1"),
        (torch.zeros(1, 4, 2), "D = 3"),
        (torch.zeros(4, 3), r"\(B, L, D\)"),
        (torch.zeros(1, 4, 3, dtype=torch.int64), "floating-point"),
    ],
)
def test_bad_inputs(x, text):
    with pytest.raises(ModelError, match=text):
        make()(x)


def test_bad_steps_and_options():
    with pytest.raises(ModelError, match=r"\(B, D\)"):
        make().step(torch.zeros(1, 1, 3))
    with pytest.raises(ModelError, match=r"state is \(1, 3, 2\), must be \(1, 3, 4\)"):
        make().step(torch.zeros(1, 3), torch.zeros(1, 3, 2))
    with pytest.raises(UnsupportedError, match="bidirectional"):
        make(bidirectional=True).step(torch.zeros(1, 3))
    for options, text in [
        ({"width": 0}, "width = 0"),
        ({"width": 2, "state_size": 0}, "state_size = 0"),
        ({"width": 2, "algorithm": "slow"}, "algorithm = 'slow'"),
        ({"width": 2, "tolerance": 0.0}, "tolerance = 0.0"),
    ]:
        with pytest.raises(ModelError, match=text):
            DampedEMA(**options)

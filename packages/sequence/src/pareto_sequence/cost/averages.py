"""The damped moving average by its parallel algorithms, over lengths and state sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator

import torch

from pareto_core import ModelError
from pareto_sequence.cost.turns import Case, Row, Settings, answers, require_close, speedups, take_turns
from pareto_sequence.ema import Algorithm, DampedEMA

TABLE = "ema"
BASE = "FFT"
#: the other algorithms of :class:`~pareto_sequence.ema.DampedEMA` by what the table calls them
OTHERS: dict[str, Algorithm] = {"FFT, kernel from factors": "factored", "truncated": "truncated"}
#: positions over which both are compared with the recurrence, step by step
STEPPED = 256
TOLERANCE = 1e-5


def measure(
    lengths: Iterable[int],
    states: Iterable[int],
    width: int,
    settings: Settings,
    progress: Callable[[str], Callable[[float], None]],
) -> Iterator[Row]:
    """Rows for every length and state size, one sequence of ``width`` channels, causal, newly initialised."""
    states = list(states)
    for length in lengths:
        for state in states:
            found, x, modules = cases(length, state, width, settings.device)
            check(found, x, modules)
            place: dict[str, int | str] = {"length": length, "state": state, "width": width}
            times = take_turns(found, settings, progress(f"EMA, length {length}, state {state}"))
            yield from speedups(TABLE, place, times, BASE)


def cases(
    length: int, state: int, width: int, device: str
) -> tuple[dict[str, Case], torch.Tensor, dict[str, DampedEMA]]:
    """The algorithms with the same parameters and input (1, length, width)."""
    torch.manual_seed(0)
    published = DampedEMA(width, state, algorithm="fft").to(device)
    modules = {BASE: published}
    for name, algorithm in OTHERS.items():
        modules[name] = copy.deepcopy(published)
        modules[name].algorithm = algorithm
    x = torch.randn(1, length, width).to(device).requires_grad_()

    def by(module: DampedEMA) -> Case:
        return Case(lambda: module(x), (x, *module.parameters()))

    return {name: by(module) for name, module in modules.items()}, x, modules


def check(found: dict[str, Case], x: torch.Tensor, modules: dict[str, DampedEMA]) -> None:
    """Compare all with each other, and their first positions with the recurrence; raises ModelError."""
    expected = stepped(modules[BASE], x.detach()[:, :STEPPED])
    results = {name: answers(case) for name, case in found.items()}
    for name, (output, *gradients) in results.items():
        what = f"EMA by {name}, length {x.shape[1]}, state {modules[name].state_size}"
        require_close(f"{what}: its output", output[:, :STEPPED], expected, TOLERANCE)
        require_close(f"{what}: its output", output, results[BASE][0], TOLERANCE)
        if len(gradients) != len(results[BASE]) - 1:
            raise ModelError(f"{what}: not the parameters of {BASE}: not timed")
        for got, right in zip(gradients, results[BASE][1:], strict=True):
            require_close(f"{what}: a gradient", got, right, 10 * TOLERANCE)


@torch.no_grad()
def stepped(module: DampedEMA, x: torch.Tensor) -> torch.Tensor:
    """The output at every position of x (B, L, D), one step after the other."""
    state = None
    outputs = []
    for position in range(x.shape[1]):
        output, state = module.step(x[:, position], state)
        outputs.append(output)
    return torch.stack(outputs, 1)


@torch.no_grad()
def recurrence(module: DampedEMA, x: torch.Tensor) -> torch.Tensor:
    """The output for x (B, L, D) by Eq. (7.2) in float64, token after token, both ways where the averages run so."""
    alpha, delta = module.alpha_logit.double().sigmoid(), module.delta_logit.double().sigmoid()
    taken = alpha * module.beta.double()
    given = module.gamma.double() / math.sqrt(module.state_size)
    values = x.double()

    def run(rows: slice, tokens: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(len(x), module.width, module.state_size, dtype=torch.float64, device=x.device)
        outputs = []
        for token in tokens.unbind(1):
            state = taken[rows] * token[..., None] + (1 - alpha * delta)[rows] * state
            outputs.append((given[rows] * state).sum(-1))
        return torch.stack(outputs, 1)

    y = run(slice(0, module.width), values) + module.omega.double() * values
    if module.bidirectional:
        # What follows a token, and not the token itself.
        y[:, :-1] += run(slice(module.width, None), values.flip(1)).flip(1)[:, 1:]
    return torch.nn.functional.silu(y)

"""Whole models: TCNCA beside MEGA-chunk as in Figs. 7.5 to 7.7, what bounds the ratio, and time per token over lengths.

Both have the same layers but for the mixer. The TCN has three residual blocks; its kernel is as large as gives it the
moving average's parameters, and its dilation factor the smallest with which the whole network covers the sequence
(section 7.4.5). MEGA's kernel is computed in each pass, over the whole length, as published; beside it stand MEGA
with its kernel made from two short tables of powers, and with its kernel truncated where the rest is negligible.

Before anything is timed, the published average is compared with its recurrence and the algorithms' gradients with each
other, at the length that is timed but at :data:`CHECKED` positions at most; the algorithms' outputs are compared at the
whole length. ``checked`` in a row's place is the longest at which they were: less than its length only where memory did
not suffice.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pareto_core import ModelError
from pareto_sequence.configuration import SequenceConfig
from pareto_sequence.cost.averages import TOLERANCE, recurrence
from pareto_sequence.cost.convolutions import own
from pareto_sequence.cost.turns import (
    DIRECTIONS,
    OUT_OF_MEMORY,
    Case,
    Estimate,
    Row,
    Settings,
    Times,
    answers,
    is_out_of_memory,
    require_close,
    speedups,
    take_turns,
)
from pareto_sequence.ema import DampedEMA
from pareto_sequence.modeling import SequenceForCausalLM, SequenceForSequenceClassification
from pareto_sequence.tcn import TCN, receptive_field

Progress = Callable[[str], Callable[[float], None]]

BASE = "MEGA-chunk (FFT, as published)"
FACTORED = "MEGA-chunk (FFT, kernel from factors)"
TRUNCATED = "MEGA-chunk (truncated kernel)"
TCNCA = "TCNCA (own kernel)"
LIBRARY = "TCNCA (library's convolution)"
WITHOUT = "without the mixer"
#: each algorithm, and the one of the same model that it must agree with
COMPARED = ((FACTORED, BASE), (TRUNCATED, BASE), (TCNCA, LIBRARY))
DEPTH = 3
#: largest differences between two algorithms of one model, in parts of the largest value
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
#: positions at which gradients are compared, and the average with its recurrence, at most: several chunks
CHECKED = 4096


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of both models; ``decoding`` (causal) or encoding; ``state`` is the EMA's."""

    width: int
    state: int = 16
    decoding: bool = True
    layers: int = 8
    chunk: int = 1024
    vocabulary: int = 256

    @property
    def mode(self) -> str:
        """What the chapter calls it."""
        return "decoding" if self.decoding else "encoding"

    def configuration(self, mixer: str, **fields: Any) -> SequenceConfig:
        """Sizes in MEGA's proportions: values twice, queries and keys a quarter of the width."""
        return SequenceConfig(
            mixer=mixer,
            causal=self.decoding,
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            value_size=2 * self.width,
            ffn_size=2 * self.width,
            shared_size=max(2, self.width // 4),
            state_size=self.state,
            num_layers=self.layers,
            chunk_size=self.chunk,
            num_labels=2,
            **fields,
        )


def matched_kernel(width: int, state: int, bidirectional: bool) -> int:
    """The K with which a TCN of three blocks has as many parameters as the moving average, to the nearest."""
    target = sum(p.numel() for p in DampedEMA(width, state, bidirectional=bidirectional).parameters())

    def count(kernel_size: int) -> int:
        return sum(p.numel() for p in TCN(width, kernel_size, 1, DEPTH).parameters())

    per_tap = count(2) - count(1)
    return max(2, round((target - count(1)) / per_tap) + 1)


def covering_factor(length: int, kernel_size: int, layers: int) -> int:
    """The smallest F with which ``layers`` TCNs of three blocks, one after the other, see ``length`` positions."""
    factor = 1
    while layers * (receptive_field(kernel_size, factor, DEPTH) - 1) + 1 < length:
        factor += 1
    return factor


def measure(lengths: Iterable[int], shapes: Iterable[Shape], settings: Settings, progress: Progress) -> Iterator[Row]:
    """Rows of the table ``models`` for every shape and length, one sequence at a time."""
    lengths = list(lengths)
    for shape in shapes:
        for length in lengths:
            yield from measure_one(length, shape, settings, progress)


def measure_one(length: int, shape: Shape, settings: Settings, progress: Progress) -> list[Row]:
    """Rows of one cell; where even building the models or checking them takes more memory than there is, all say so."""
    place: dict[str, int | str] = {
        "mode": shape.mode,
        "state": shape.state,
        "width": shape.width,
        "length": length,
        "layers": shape.layers,
        "chunk": shape.chunk,
    }
    place["K"] = matched_kernel(shape.width, shape.state, not shape.decoding)
    place["F"] = covering_factor(length, int(place["K"]), shape.layers)
    try:
        built = models(length, shape, settings.device)
        check(built, shape, min(length, CHECKED), settings.device)
        place["checked"] = checked_length(built, shape, length, min(length, CHECKED), settings.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        names = (BASE, FACTORED, TRUNCATED, TCNCA, LIBRARY, WITHOUT)
        return [Row("models", name, way, place, problem=OUT_OF_MEMORY) for name in names for way in DIRECTIONS]
    tokens = draw(length, shape, settings.device)
    cases = {name: case_of(model, tokens) for name, model in built.items()}
    what = f"{shape.mode}, state {shape.state}, width {shape.width}, length {length}"
    return speedups("models", place, take_turns(cases, settings, progress(what)), BASE, WITHOUT)


def models(length: int, shape: Shape, device: str) -> dict[str, nn.Module]:
    """The models of a cell, by case; algorithms of one model share their weights' values."""
    kernel_size = matched_kernel(shape.width, shape.state, not shape.decoding)
    factor = covering_factor(length, kernel_size, shape.layers)
    tcn = {"kernel_size": kernel_size, "dilation_factor": factor, "tcn_depth": DEPTH}
    mega = build(shape, "mega", device, ema_algorithm="fft")
    tcnca = build(shape, "tcnca", device, conv_implementation=own(device), **tcn)
    return {
        BASE: mega,
        FACTORED: like(mega, build(shape, "mega", device, ema_algorithm="factored")),
        TRUNCATED: like(mega, build(shape, "mega", device, ema_algorithm="truncated")),
        TCNCA: tcnca,
        LIBRARY: like(tcnca, build(shape, "tcnca", device, conv_implementation="library", **tcn)),
        WITHOUT: without_mixer(mega),
    }


def build(shape: Shape, mixer: str, device: str, **fields: Any) -> nn.Module:
    """A newly initialised model, in evaluation mode: nothing is dropped."""
    torch.manual_seed(0)
    cls: Any = SequenceForCausalLM if shape.decoding else SequenceForSequenceClassification
    model: nn.Module = cls(shape.configuration(mixer, **fields)).to(device).eval()
    return model


def like(model: nn.Module, other: nn.Module) -> nn.Module:
    """``other`` with the weights of ``model``."""
    other.load_state_dict(model.state_dict())
    return other


class PassThrough(nn.Module):
    """A mixer that costs nothing: it returns its input."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """Return ``x`` (B, L, D)."""
        return x


def without_mixer(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose moving averages pass their input through; raises ModelError where it has none."""
    bare = copy.deepcopy(model)
    parents = [
        (module, name)
        for module in bare.modules()
        for name, child in module.named_children()
        if isinstance(child, DampedEMA)
    ]
    if not parents:
        raise ModelError("the model has no moving average that could be left out")
    for module, name in parents:
        setattr(module, name, PassThrough())
    return bare


def draw(length: int, shape: Shape, device: str) -> torch.Tensor:
    """Random tokens (1, length)."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(shape.vocabulary, (1, length), generator=generator).to(device)


def case_of(model: nn.Module, tokens: torch.Tensor) -> Case:
    """Forward to the logits, backward to every parameter."""
    return Case(lambda: model(input_ids=tokens).logits, list(model.parameters()))


def check(built: dict[str, nn.Module], shape: Shape, length: int, device: str) -> None:
    """Compare MEGA's average with its recurrence, the algorithms of MEGA with each other, and TCNCA's convolutions.

    Outputs and gradients, at ``length`` positions. Raises ModelError where they differ.
    """
    check_average(built[BASE], shape, length, device)
    tokens = draw(length, shape, device)
    for name, reference in COMPARED:
        found, expected = (answers(case_of(built[which], tokens)) for which in (name, reference))
        what = f"{name}, {shape.mode}, length {length}, width {shape.width}"
        require_close(f"{what}: its logits", found[0], expected[0], OUTPUT_TOLERANCE)
        flat, right = (torch.cat([gradient.flatten() for gradient in pair[1:]]) for pair in (found, expected))
        require_close(f"{what}: its gradients", flat, right, GRADIENT_TOLERANCE)


@torch.no_grad()
def check_average(model: nn.Module, shape: Shape, length: int, device: str) -> None:
    """Compare the moving average of the first layer with its recurrence in float64; raises ModelError."""
    average = next(module for module in model.modules() if isinstance(module, DampedEMA))
    x = torch.randn(1, length, shape.width, generator=torch.Generator().manual_seed(length)).to(device)
    what = f"{BASE}, {shape.mode}, length {length}, width {shape.width}: its moving average"
    require_close(what, average(x), recurrence(average, x), TOLERANCE)


def checked_length(built: dict[str, nn.Module], shape: Shape, length: int, known: int, device: str) -> int:
    """Compare outputs at ``length`` positions and return it, or ``known`` where memory does not suffice for that.

    Raises ModelError where they differ.
    """
    try:
        check_outputs(built, shape, length, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return known
    return length


@torch.no_grad()
def check_outputs(built: dict[str, nn.Module], shape: Shape, length: int, device: str) -> None:
    """Compare what the algorithms of either model put out at ``length`` positions; raises ModelError."""
    tokens = draw(length, shape, device)
    for name, reference in COMPARED:
        found, expected = (built[which](input_ids=tokens).logits for which in (name, reference))
        what = f"{name}, {shape.mode}, length {length}, width {shape.width}: its logits"
        require_close(what, found, expected, OUTPUT_TOLERANCE)


def measure_tokens(lengths: Iterable[int], shape: Shape, settings: Settings, progress: Progress) -> Iterator[Row]:
    """Rows of the table ``tokens``: time over lengths, and its time per token to that at the shortest length.

    All lengths of a model take turns. F is the same for all: the network covers the longest.
    """
    lengths = sorted(lengths)
    built = models(lengths[-1], shape, settings.device)
    known = min(lengths[0], CHECKED)
    check(built, shape, known, settings.device)
    checked = {length: checked_length(built, shape, length, known, settings.device) for length in lengths}
    for name in (TCNCA, TRUNCATED, BASE):
        cases = {str(length): case_of(built[name], draw(length, shape, settings.device)) for length in lengths}
        times = take_turns(cases, settings, progress(f"time per token of {name}"))
        yield from _per_token(name, checked, shape, times)


def _per_token(name: str, checked: dict[int, int], shape: Shape, times: Times) -> list[Row]:
    rows = []
    shortest = min(checked)
    base = str(shortest)
    for length in checked:
        place: dict[str, int | str] = {
            "length": length, "width": shape.width, "mode": shape.mode, "layers": shape.layers, "chunk": shape.chunk,
            "checked": checked[length],
        }  # fmt: skip
        for way in DIRECTIONS:
            if str(length) in times.failed:
                rows.append(Row("tokens", name, way, place, problem=OUT_OF_MEMORY))
                continue
            ratio = times.speedup(base, str(length), way) if base in times.seconds else None
            if ratio is not None:
                share = shortest / length
                ratio = Estimate(ratio.value * share, ratio.low * share, ratio.high * share)
            milliseconds = times.milliseconds(str(length), way)
            rows.append(Row("tokens", name, way, place, milliseconds, f"length {base}", ratio))
    return rows

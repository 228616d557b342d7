"""The depthwise dilated convolution: own kernel, library and FFT, forward and backward, over lengths and dilations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn import functional as F

from pareto_sequence.conv import depthwise_conv
from pareto_sequence.cost.turns import Case, Row, Settings, answers, require_close, speedups, take_turns
from pareto_sequence.ema import smooth_size

TABLE = "convolution"
BASE = "library"
#: largest differences to float64, in parts of the largest value: outputs, and sums over all positions
OUTPUT_TOLERANCE, SUM_TOLERANCE = 1e-5, 1e-4


def own(device: str) -> str:
    """Name of the package's own implementation on ``device``."""
    return "triton" if device.startswith("cuda") else "native"


def measure(
    lengths: Iterable[int],
    dilations: Iterable[int],
    width: int,
    kernel_size: int,
    settings: Settings,
    progress: Callable[[str], Callable[[float], None]],
) -> Iterator[Row]:
    """Rows for every length and dilation, one sequence of ``width`` channels, left-padded (causal)."""
    dilations = list(dilations)
    for length in lengths:
        for dilation in dilations:
            found = cases(length, dilation, width, kernel_size, settings.device)
            check(found, length, dilation)
            place: dict[str, int | str] = {"length": length, "dilation": dilation, "width": width, "K": kernel_size}
            times = take_turns(found, settings, progress(f"convolution, length {length}, dilation {dilation}"))
            yield from speedups(TABLE, place, times, BASE)


def cases(length: int, dilation: int, width: int, kernel_size: int, device: str) -> dict[str, Case]:
    """The implementations on the same input, weight and bias."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    x, weight, bias = draw(1, width, length), draw(width, kernel_size), draw(width)

    def by(implementation: str) -> Case:
        def forward() -> torch.Tensor:
            return depthwise_conv(x, weight, bias, dilation=dilation, implementation=implementation)

        return Case(forward, (x, weight, bias))

    return {
        "library": by("library"),
        f"own ({own(device)})": by(own(device)),
        "FFT": Case(lambda: fft_conv(x, weight, bias, dilation), (x, weight, bias)),
    }


def check(found: dict[str, Case], length: int, dilation: int) -> None:
    """Compare outputs and gradients with torch's own operator in float64; raises ModelError: it is not timed then."""
    x, weight, bias = (t.detach().double().cpu().requires_grad_() for t in found[BASE].inputs)
    padded = F.pad(x, ((weight.shape[1] - 1) * dilation, 0))
    double = Case(
        lambda: F.conv1d(padded, weight[:, None], bias, dilation=dilation, groups=len(bias)), (x, weight, bias)
    )
    expected = answers(double)
    parts = ("output", "gradient of the input", "gradient of the weight", "gradient of the bias")
    tolerances = (OUTPUT_TOLERANCE, OUTPUT_TOLERANCE, SUM_TOLERANCE, SUM_TOLERANCE)
    for name, case in found.items():
        for part, got, right, tolerance in zip(parts, answers(case), expected, tolerances, strict=True):
            what = f"{name}, length {length}, dilation {dilation}: its {part}"
            require_close(what, got.cpu(), right, tolerance)


def fft_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dilation: int) -> torch.Tensor:
    """The causal convolution of x (B, D, L) by the Fourier transform of the taps at their delays."""
    length, kernel_size = x.shape[-1], weight.shape[1]
    seen = min(kernel_size, (length - 1) // dilation + 1)  # taps whose delay lies within the sequence
    taps = weight.new_zeros(len(weight), length)
    delays = torch.arange(seen, device=x.device) * dilation
    taps = taps.index_copy(1, delays, weight.flip(1)[:, :seen])
    size = smooth_size(2 * length - 1)
    product = torch.fft.rfft(x, size) * torch.fft.rfft(taps, size)
    return torch.fft.irfft(product, size)[..., :length] + bias[:, None]

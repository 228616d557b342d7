"""The models of the self-test: one that sleeps, one on the pretended device, one on CUDA, one that really computes."""

from __future__ import annotations

import contextlib
import mmap
import re
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pareto_runner.selftest.device import DEVICE
from pareto_runner.selftest.diary import COLD, MIB, Diary
from pareto_runner.selftest.work import NAMES, WORK, Work, Workload, sleep_until

#: a spike rises for so long, in so many steps, and is gone with the last
SPIKE_SECONDS, SPIKE_STEPS = 0.02, 8
LOAD_SPIKE = 32 * MIB
#: bytes that the model holds on its device, and that a call takes there for a moment
HELD, MOMENTARY = 16 * MIB, 24 * MIB
#: width of the model that computes
WIDTH = 512


class Model(nn.Module):
    """Base: answers with a constant, counts its calls by the kind of work, and keeps a diary."""

    workload: ClassVar[Workload]

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._answer = torch.ones(1, 1)
        self._tokens = torch.ones(1, 64, dtype=torch.long)
        self._calls: Counter[str] = Counter()
        self._diary = Diary(log)

    def _begin(self, request: torch.Tensor) -> tuple[str, Work, int, float]:
        """Return the work that is asked for: its name, what it is, its number, and how long it takes this time."""
        self._diary.keep()
        name = NAMES[int(request[0, 0])]
        work, number = WORK[name], self._calls[name]
        self._calls[name] += 1
        return name, work, number, work.seconds * (COLD[number] if number < len(COLD) else 1.0)


class HostModel(Model):
    """Sleeps or spins, and holds memory for a moment."""

    workload = "host"

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.weight = nn.Parameter(torch.ones(4))
        self._step: tuple[str, int, int, float] | None = None
        register_optimizer_step_post_hook(self._end_step)

    def note_loading(self) -> None:
        """Note what is in use before anything, and hold memory for a moment, as loading does."""
        now = time.perf_counter()
        self._diary.write("born", 0, resident_exactly(), now, now)
        peak = spike(LOAD_SPIKE)
        self._diary.write("load", 0, peak, now, time.perf_counter())

    def forward(self, request: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Do what the first number of ``request`` (items, 1) asks for; with ``labels``, give a loss to train on.

        In training, a call ends with the optimizer's step.
        """
        start = time.perf_counter()
        name, work, number, seconds = self._begin(request)
        peak = 0
        if work.spike_every and number % work.spike_every == work.spike_every - 1:
            peak = spike(work.spike_mib * MIB)
        work.until(start + seconds)
        if self.training:
            self._step = name, number, peak, start
        else:
            self._diary.write(name, number, peak, start, time.perf_counter())
        loss = None if labels is None else self.weight.square().mean()
        return SimpleNamespace(loss=loss, logits=self._answer)

    def _end_step(self, *_: Any) -> None:
        if self._step is not None:
            self._diary.write(*self._step, time.perf_counter())
            self._step = None

    def generate(
        self,
        request: torch.Tensor,
        max_new_tokens: int,
        min_new_tokens: int,
        do_sample: bool,
        num_beams: int,
        streamer: Any = None,
    ) -> torch.Tensor:
        """Say the prompt, then one token, then bursts of tokens at known times."""
        start = time.perf_counter()
        name, work, number, seconds = self._begin(request)
        times, count, pause = [start], 1, seconds
        if streamer is not None:
            streamer.put(request)
        while len(times) <= max_new_tokens:
            work.until(times[-1] + pause)
            times += [time.perf_counter()] * count
            if streamer is not None:
                streamer.put(self._tokens[0, :count])
            count, pause = work.burst, work.gap
        self._diary.write(name, number, 0, *times, time.perf_counter())
        return self._tokens[:, :max_new_tokens]


class DeviceModel(Model):
    """Asks the pretended device for its work and returns before that is done."""

    workload = "device"

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self._placed = False

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to the device, once; whatever else PyTorch is told, the model stays there."""
        if not self._placed:
            self._placed = True
            DEVICE.allocate(HELD)
            weakref.finalize(self, DEVICE.free, HELD)
        return self

    def forward(self, request: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Do what the first number of ``request`` (items, 1) asks for."""
        start = time.perf_counter()
        name, _, number, seconds = self._begin(request)
        DEVICE.allocate(MOMENTARY)
        DEVICE.launch(seconds, lambda end: self._note(name, number, HELD + MOMENTARY, start, end))
        DEVICE.free(MOMENTARY)
        return SimpleNamespace(loss=None, logits=self._answer)

    def generate(
        self,
        request: torch.Tensor,
        max_new_tokens: int,
        min_new_tokens: int,
        do_sample: bool,
        num_beams: int,
        streamer: Any = None,
    ) -> torch.Tensor:
        """Say the prompt, then tokens that the device has yet to make."""
        start = time.perf_counter()
        name, work, number, seconds = self._begin(request)
        times = [start]
        for put in range(max_new_tokens + 1):
            if put:
                DEVICE.launch(seconds if put == 1 else work.gap, times.append)
            if streamer is not None:
                streamer.put(self._tokens[0, :1])
        DEVICE.launch(0.0, lambda end: self._note(name, number, 0, *times, end))
        return self._tokens[:, :max_new_tokens]

    def _note(self, *event: Any) -> None:
        """Called by the device, between two pieces of work."""
        self._diary.write(*event)
        self._diary.keep()


class CudaModel(Model):
    """Takes memory of a CUDA device for a moment."""

    workload = "cuda"

    def forward(self, request: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Do what the first number of ``request`` (items, 1) asks for."""
        start = time.perf_counter()
        name, _, number, _ = self._begin(request)
        peak = torch.cuda.memory_allocated() + MOMENTARY
        block = torch.zeros(MOMENTARY, dtype=torch.uint8, device="cuda")
        del block
        self._diary.write(name, number, peak, start, time.perf_counter())
        return SimpleNamespace(loss=None, logits=self._answer)


class ComputeModel(nn.Module):
    """Multiplies matrices: real work of a few milliseconds, in as many steps as it is told."""

    workload: ClassVar[Workload] = "compute"

    def __init__(self, matmuls: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self._weight = torch.randn(WIDTH, WIDTH, generator=random) / WIDTH**0.5
        self._matmuls = matmuls

    def forward(self, request: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Multiply a matrix of as many rows as ``request`` has."""
        values = self._weight[: len(request)]
        for _ in range(self._matmuls):
            values = values @ self._weight
        return SimpleNamespace(loss=None, logits=values)


def spike(size: int) -> int:
    """Hold ``size`` bytes more, rising to it; returns the bytes that were resident at the top."""
    before = resident_exactly()
    start, step = time.perf_counter(), size // SPIKE_STEPS
    with mmap.mmap(-1, size) as block:
        with contextlib.suppress(OSError):  # few large pages come faster; without them, many small ones
            block.madvise(mmap.MADV_HUGEPAGE)
        for number in range(SPIKE_STEPS):
            sleep_until(start + (number + 1) / SPIKE_STEPS * SPIKE_SECONDS)
            block[number * step : (number + 1) * step : mmap.PAGESIZE] = bytes(step // mmap.PAGESIZE)
    return before + size


def resident_exactly() -> int:
    """Bytes resident now, summed over all mappings: slower and more exact than the kernel's running count."""
    with open("/proc/self/smaps_rollup") as file:
        found = re.search(r"^Rss:\s+(\d+) kB", file.read(), re.M)
    assert found is not None, "the kernel does not say what is resident"
    return int(found[1]) * 1024

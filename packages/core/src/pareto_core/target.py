"""The third concept: a target, the hardware that a model runs and is measured on."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from pareto_core.task import Request


@dataclasses.dataclass(frozen=True)
class Probe:
    """Whether a target is here; ``reason`` says why not, or what was found."""

    available: bool
    reason: str


class Target(abc.ABC):
    """A kind of hardware. One file per target; nothing outside it branches on the kind."""

    name: ClassVar[str]
    #: where PyTorch puts tensors, and DeepSpeed's name of its accelerator (None: DeepSpeed does not run there)
    device: ClassVar[str]
    deepspeed_accelerator: ClassVar[str | None]
    default_precision: ClassVar[str] = "fp32"

    @abc.abstractmethod
    def probe(self) -> Probe:
        """Look for the hardware without initialising it."""

    @abc.abstractmethod
    def prepare(self, model: Any, request: Request) -> Callable[[], Any]:
        """Place the model and the request's inputs; return the call that will be timed."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished what was asked of it."""

    @abc.abstractmethod
    def reset_peak_memory(self) -> None:
        """Forget the highest memory use seen so far."""

    @abc.abstractmethod
    def peak_memory(self) -> int:
        """Bytes at the highest point since :meth:`reset_peak_memory`."""

    @abc.abstractmethod
    def describe(self) -> dict[str, str]:
        """Model, driver and what else decides the speed."""

"""The pretended device of the instruments' self-test, which no list of targets shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pareto_core import Probe, Request, Target
from pareto_runner.selftest.device import DEVICE
from pareto_runner.targets.calls import make_call


class SelfTestTarget(Target):
    """A device that works while its caller goes on."""

    name: ClassVar[str] = "selftest"
    device: ClassVar[str] = "selftest"
    deepspeed_accelerator: ClassVar[str | None] = None

    def probe(self) -> Probe:
        """Always here."""
        return Probe(True, "a thread that pretends to be a device")

    def prepare(self, model: Any, request: Request) -> Callable[[], Any]:
        """Move the model to the device; PyTorch, which does not know it, keeps the inputs."""
        return make_call(model.to(self.device), request, "cpu")

    def synchronize(self) -> None:
        """Wait for the thread."""
        DEVICE.synchronize()

    def reset_peak_memory(self) -> None:
        """Reset the device's own count."""
        DEVICE.reset_peak()

    def peak_memory(self) -> int:
        """The device's own count."""
        return DEVICE.peak_bytes

    def describe(self) -> dict[str, str]:
        """There is nothing to say of it."""
        return {}


TARGET = SelfTestTarget

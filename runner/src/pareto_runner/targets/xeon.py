"""x86 servers: threads and affinity follow ``sched_getaffinity``; memory is the kernel's own high-water mark."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, ClassVar

from pareto_core import Probe, Request, Target
from pareto_runner.machine import CPUS, cpu_model, isa_flags
from pareto_runner.memory import peak_host_bytes, reset_host_peak
from pareto_runner.targets.calls import make_call


class XeonTarget(Target):
    """Any x86-64 server on Linux; every table says which CPU it was."""

    name: ClassVar[str] = "xeon"
    device: ClassVar[str] = "cpu"
    deepspeed_accelerator: ClassVar[str | None] = "cpu"
    default_precision: ClassVar[str] = "fp32"

    def probe(self) -> Probe:
        """Available on Linux on x86-64."""
        if platform.system() != "Linux":
            return Probe(False, f"needs Linux (this is {platform.system()}): peaks are read from /proc")
        if platform.machine() not in ("x86_64", "AMD64"):
            return Probe(False, f"needs an x86-64 processor (this is {platform.machine()})")
        return Probe(True, f"{cpu_model()}, {CPUS} CPUs")

    def prepare(self, model: Any, request: Request) -> Callable[[], Any]:
        """Leave everything in host memory."""
        return make_call(model, request, "cpu")

    def synchronize(self) -> None:
        """Nothing runs asynchronously on the CPU."""

    def reset_peak_memory(self) -> None:
        """Reset this process's VmHWM."""
        reset_host_peak()

    def peak_memory(self) -> int:
        """VmHWM in bytes."""
        return peak_host_bytes()

    def describe(self) -> dict[str, str]:
        """CPU model, instruction sets and the CPUs that may be used."""
        return {
            "cpu": cpu_model(),
            "isa": " ".join(isa_flags()),
            "cpus": str(CPUS),
        }


TARGET = XeonTarget

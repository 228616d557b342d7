"""CUDA GPUs: bf16 by default; memory is the allocator's peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pareto_core import Probe, Request, Target
from pareto_runner.machine import gpu_description
from pareto_runner.targets.calls import make_call


class GpuTarget(Target):
    """The first visible CUDA device."""

    name: ClassVar[str] = "gpu"
    device: ClassVar[str] = "cuda"
    deepspeed_accelerator: ClassVar[str | None] = "cuda"
    default_precision: ClassVar[str] = "bf16"

    def probe(self) -> Probe:
        """Available where the driver lists a device and PyTorch was built for CUDA."""
        found = gpu_description()
        if not found:
            return Probe(False, "no NVIDIA GPU: the driver's nvidia-smi is missing or lists none")
        import torch

        if torch.version.cuda is None:
            return Probe(False, f"{found['gpu']} is here, but this PyTorch ({torch.__version__}) is built without CUDA")
        return Probe(True, f"{found['gpu']}, driver {found['driver']}")

    def prepare(self, model: Any, request: Request) -> Callable[[], Any]:
        """Move the model and the inputs to the device."""
        return make_call(model, request, self.device)

    def synchronize(self) -> None:
        """Wait for all kernels."""
        import torch

        torch.cuda.synchronize()

    def reset_peak_memory(self) -> None:
        """Reset the allocator's peak."""
        import torch

        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> int:
        """Bytes that tensors held at the peak."""
        import torch

        return int(torch.cuda.max_memory_allocated())

    def describe(self) -> dict[str, str]:
        """GPU model, driver, and PyTorch's CUDA version."""
        import torch

        return {**gpu_description(), "cuda": str(torch.version.cuda)}


TARGET = GpuTarget

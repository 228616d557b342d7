"""TPUs: reported as unsupported until models go through torchax to JAX here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pareto_core import Probe, Request, Target, UnsupportedError

REASON = "DeepSpeed has no TPU accelerator, and this version does not bring models to JAX yet; use --target xeon or gpu"


class TpuTarget(Target):
    """Answers every run with an ``unsupported`` row that carries its reason."""

    name: ClassVar[str] = "tpu"
    device: ClassVar[str] = "tpu"
    deepspeed_accelerator: ClassVar[str | None] = None

    def probe(self) -> Probe:
        """Never available in this version."""
        return Probe(False, REASON)

    def prepare(self, model: Any, request: Request) -> Callable[[], Any]:
        """Refuse."""
        raise UnsupportedError(REASON)

    def synchronize(self) -> None:
        """Refuse."""
        raise UnsupportedError(REASON)

    def reset_peak_memory(self) -> None:
        """Refuse."""
        raise UnsupportedError(REASON)

    def peak_memory(self) -> int:
        """Refuse."""
        raise UnsupportedError(REASON)

    def describe(self) -> dict[str, str]:
        """Nothing is known of a TPU that was not looked for."""
        return {}


TARGET = TpuTarget

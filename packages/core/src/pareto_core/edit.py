"""The :class:`~pareto_core.method.Edit` of an ordinary PyTorch optimizer, where nothing is sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class LocalEdit:
    """Reads and writes parameters and optimizer state in place.

    ``optimizer`` holds the state; values are converted to fp32 when read and to the stored dtype when written.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def get(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``parameter`` in fp32."""
        return parameter.detach().float().clone()

    def set(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Write ``value`` to ``parameter``."""
        parameter.data.copy_(value)

    def get_state(self, parameter: torch.Tensor, key: str) -> torch.Tensor | None:
        """Return a copy of the optimizer state ``key`` in fp32, None before the first step."""
        state = self._optimizer.state.get(parameter, {})
        return state[key].detach().float().clone() if key in state else None

    def set_state(self, parameter: torch.Tensor, key: str, value: torch.Tensor) -> None:
        """Write the optimizer state ``key``; before the first step there is none and nothing happens."""
        state = self._optimizer.state.get(parameter, {})
        if key in state:
            state[key].copy_(value)

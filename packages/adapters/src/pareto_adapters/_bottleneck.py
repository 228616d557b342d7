"""What the adapters with a bottleneck share: its width, and the projections down to it and up again."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from pareto_adapters._peft import BlockConfig, Cell, check_count


@dataclasses.dataclass
class BottleneckConfig(BlockConfig):
    """Configuration of an adapter whose hidden layer has ``r`` units. Raises :class:`ConfigError` for less than one."""

    r: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "r")


class BottleneckCell(Cell):
    """``down`` to r units, a function that a subclass names, and ``up`` again, both with a bias."""

    def __init__(self, config: BottleneckConfig, in_features: int, out_features: int, function: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, config.r)
        self.function = function
        self.up = nn.Linear(config.r, out_features)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) to (…, out_features)."""
        return self.up(self.function(self.down(x)))

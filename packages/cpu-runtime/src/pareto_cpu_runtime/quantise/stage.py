"""One step of the layer-by-layer flow: a block (or the output embedding) with its inputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pareto_cpu_runtime.quantise.calibration import Arguments
from pareto_cpu_runtime.quantise.config import Precision, QuantisationConfig
from pareto_cpu_runtime.quantise.operators import linears, set_weight, weight_of


@dataclasses.dataclass
class Stage:
    """A block to be quantised.

    ``module`` is a copy of the block in fp32 that a method may change; ``source`` the block as it was given.
    ``precisions`` holds, by name within the block, how each operator is quantised. ``inputs`` (samples, length, width)
    come from the quantised blocks before, ``reference`` from the original ones. ``arguments`` maps a number of rows
    to the block's other arguments for so many; None for an operator of its own.
    """

    name: str
    module: nn.Module
    precisions: Mapping[str, Precision]
    inputs: torch.Tensor
    reference: torch.Tensor
    arguments: Mapping[int, Arguments] | None
    rows: int
    config: QuantisationConfig

    @property
    def is_block(self) -> bool:
        """Whether this is one of the repeated blocks, not the output embedding."""
        return self.arguments is not None

    def operators(self) -> dict[str, nn.Module]:
        """Return the operators to be quantised by name within the block."""
        return {name: module for name, module in linears(self.module).items() if name in self.precisions}

    def full_name(self, operator: str) -> str:
        """Return the operator's name in the model."""
        return f"{self.name}.{operator}" if operator else self.name

    def call(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of ``module`` (the block or one like it) for rows of hidden states."""
        if self.arguments is None:
            output: torch.Tensor = module(hidden)
            return output
        return self.arguments[len(hidden)].run(module, hidden)

    def outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the block's outputs (samples, length, width), in the dtype of ``hidden``, which is overwritten.

        The outputs take the inputs' place: two streams of activations are all that is held.
        """
        with torch.no_grad():
            for start in range(0, len(hidden), self.rows):
                part = hidden[start : start + self.rows]
                part.copy_(self.call(self.module, part.float()))
        return hidden

    def each_input(self, visit: Callable[[str, torch.Tensor], None], names: Mapping[str, Any] | None = None) -> None:
        """Run the block over its inputs; ``visit`` gets each operator's name and inputs (tokens, k) in fp32.

        ``names`` are the operators to look at, by default those to be quantised.
        """
        chosen = {n: m for n, m in linears(self.module).items() if n in (self.precisions if names is None else names)}
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, module in chosen.items():
                stack.enter_context(_watched(module, name, visit))
            for start in range(0, len(self.inputs), self.rows):
                self.call(self.module, self.inputs[start : start + self.rows].float())

    def weight(self, operator: str) -> torch.Tensor:
        """Return the weight (n, k) that the copy holds now."""
        return weight_of(self.module.get_submodule(operator))

    def set_weight(self, operator: str, weight: torch.Tensor) -> None:
        """Write the weight (n, k) of the copy."""
        set_weight(self.module.get_submodule(operator), weight)


@contextlib.contextmanager
def _watched(module: nn.Module, name: str, visit: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        visit(name, args[0].detach().reshape(-1, args[0].shape[-1]).float())

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()

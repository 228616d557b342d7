"""One step of the layer-by-layer flow: a block (or the output embedding) with its inputs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pareto_cpu_runtime.quantise.calibration import Arguments
from pareto_cpu_runtime.quantise.config import Precision, QuantisationConfig
from pareto_cpu_runtime.quantise.operators import is_linear, linears, set_weight, weight_of


@dataclasses.dataclass(frozen=True)
class InputGroup:
    """Operators of a block that read the same tensor, and the norm that gives it, None where none does."""

    norm: str | None
    operators: tuple[str, ...]


@dataclasses.dataclass
class Stage:
    """A block to be quantised.

    ``module`` is a copy of the block in fp32 that a method may change; ``source`` the block as it was given.
    ``precisions`` holds, by name within the block, how each operator is quantised. ``inputs`` (samples, length, width)
    come from the quantised blocks before; ``targets`` are what the original block gives on what the original blocks
    before it give. ``arguments`` maps a number of rows to the block's other arguments for so many; None for an
    operator of its own (whose targets are of no meaning).
    """

    name: str
    module: nn.Module
    precisions: Mapping[str, Precision]
    inputs: torch.Tensor
    targets: torch.Tensor
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

    def all_operators(self) -> list[str]:
        """Return the names of the block's operators, those that are left out among them."""
        return list(linears(self.module))

    def input_groups(self) -> list[InputGroup]:
        """Return which operators have the same inputs, and which norm makes them."""
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        handles = []
        for name, module in self.module.named_modules():
            if is_linear(module):
                handles.append(module.register_forward_pre_hook(_keeper(inputs, name)))
            elif "norm" in type(module).__name__.lower() and name:
                handles.append(module.register_forward_hook(_output_keeper(outputs, name)))
        with torch.no_grad():
            self.call(self.module, self.inputs[: self.rows].float())
        for handle in handles:
            handle.remove()
        # All tensors are held until here, so that equal addresses mean equal tensors.
        norms = {tensor.data_ptr(): name for name, tensor in outputs.items()}
        groups: dict[int, list[str]] = {}
        for name, tensor in inputs.items():
            groups.setdefault(tensor.data_ptr(), []).append(name)
        return [InputGroup(norms.get(address), tuple(names)) for address, names in groups.items()]

    def full_name(self, operator: str) -> str:
        """Return the operator's name in the model."""
        return f"{self.name}.{operator}" if operator else self.name

    def call(self, module: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of ``module`` (the block or one like it) for rows of hidden states, fp32."""
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

    def each_input(self, visit: Callable[[str, torch.Tensor], None], names: Sequence[str] | None = None) -> None:
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


def _keeper(kept: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        kept[name] = args[0]

    return hook


def _output_keeper(kept: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        kept[name] = output

    return hook


def give_back_memory() -> None:
    """Return freed memory to the system: what is kept lies between temporaries, and holds their pages back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others need none
    if trim is not None:
        trim(0)

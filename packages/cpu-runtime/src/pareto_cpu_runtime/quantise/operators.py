"""What there is to quantise in a transformers model: the linear operators of its blocks, and the output embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pareto_core.errors import ModelError


def is_linear(module: nn.Module) -> bool:
    """Whether the module is y = x W^T + b: torch's Linear, or GPT-2's Conv1D, which holds W transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def transposed(module: nn.Module) -> bool:
    """Whether the module holds its weight as (k, n)."""
    return not isinstance(module, nn.Linear)


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return the weight (n, k), a view without gradient."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[union-attr, operator]
    return weight.t() if transposed(module) else weight


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Write ``weight`` (n, k) into the module, in the module's dtype."""
    with torch.no_grad():
        weight_of(module).copy_(weight)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the repeated blocks: the module list with the most linear weights.

    Raises :class:`ModelError` where there is none.
    """
    best, best_size = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1:
            size = sum(weight_of(m).numel() for m in module.modules() if is_linear(m))
            if size > best_size:
                best, best_size = (name, module), size
    if best is None:
        raise ModelError(f"{type(model).__name__} has no list of blocks with linear operators: nothing to quantise")
    return best


def operators(model: Any) -> dict[str, nn.Module]:
    """Return the quantisable operators by module name, in the order of the model, the output embedding last.

    Raises :class:`ModelError` where the model has no blocks.
    """
    prefix, blocks = find_blocks(model)
    found = {f"{prefix}.{name}": m for name, m in blocks.named_modules() if is_linear(m)}
    head = output_embedding(model)
    if head is not None:
        found[head] = model.get_submodule(head)
    return found


def output_embedding(model: Any) -> str | None:
    """Return the name of the linear operator that gives the logits over the vocabulary, None where there is none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not is_linear(head):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear operators of a block (or the block itself, under the empty name) by name."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}

"""A global batch in pieces, over processes and one after another, whose losses add up to the loss of the whole.

A model's loss is the mean over the labels that it was given, -100 left out. Texts differ in length, so pieces differ in
labels, and a plain average over pieces would count the tokens of a short one more: each piece counts by its labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pareto_core import Batch, TrainingError

if TYPE_CHECKING:
    import torch
    from torch import nn

#: the label that losses leave out
IGNORED = -100


def shares(batch: Batch, rank: int, world: int, accumulation: int, shifted: bool) -> Iterator[tuple[Batch, float]]:
    """Yield the pieces of a global batch that belong to ``rank``, each with its part of all that the loss is over."""
    pieces = world * accumulation
    total = terms(batch, shifted)
    for piece in pieces_of(batch, rank, world, accumulation):
        yield piece, terms(piece, shifted) / total if total else 1 / pieces


def pieces_of(batch: Batch, rank: int, world: int, accumulation: int) -> Iterator[Batch]:
    """Yield the pieces of a global batch that belong to ``rank``: rows in order, as equal in number as can be.

    Raises TrainingError where there are fewer rows than pieces.
    """
    rows, pieces = _rows(batch), world * accumulation
    if rows < pieces:
        raise TrainingError(f"a batch of {rows} rows cannot be shared by {world} processes × {accumulation} steps")
    for step in range(accumulation):
        piece = step * world + rank
        start, end = piece * rows // pieces, (piece + 1) * rows // pieces
        yield {key: value[start:end] for key, value in batch.items()}


def terms(batch: Batch, shifted: bool) -> int:
    """Count what the mean loss of ``batch`` is over: labels that are not -100; rows, where labels are not classes.

    ``shifted`` leaves out the first label of each row (:func:`shifts_labels`).
    """
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point():
        return _rows(batch)
    if shifted and labels.dim() > 1:
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


def shifts_labels(model: nn.Module) -> bool:
    """Whether the loss of ``model`` compares each position with the label after it, as causal language models do.

    Told by what transformers calls the loss (``loss_type``), or by the class's name where it calls it nothing.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return any(
        getattr(module, "loss_type", None) == "ForCausalLM" or type(module).__name__.endswith("LMHeadModel")
        for module in model.modules()
    )


def loss_of(output: Any, share: float) -> torch.Tensor:
    """Return what a piece adds to the loss of the whole batch: nothing where its share is 0 (its mean is 0/0)."""
    loss: torch.Tensor = output.loss.float() * share if share else output.logits.float().sum() * 0.0
    return loss


def _rows(batch: Batch) -> int:
    return int(next(iter(batch.values())).shape[0])

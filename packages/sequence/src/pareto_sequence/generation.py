"""What generation keeps between tokens, and how transformers' ``generate`` uses it.

A sequence model's state has one entry per layer: the EMA's averages (D x N per text), a TCN's ring buffers (one per
residual block, (K - 1) times its dilation inputs), the keys and values of the current chunk, or, for the Transformer,
of everything so far. A token thus costs O(1) in the EMA, O(K depth) in a TCN, and at most a chunk in attention,
whatever the length of the text. All rows of a batch are at the same place.

``generate`` is transformers' own: greedy search, sampling, beams, streamers, stop criteria. The prompt is read in one
forward pass that also fills the state; tokens then go one at a time. What cannot be exact is refused: prompts padded on
the left, since chunks count from a row's first column. Assisted decoding needs a state that can be cut back, which this
one cannot; transformers refuses it.

A state belongs to no graph, and what continues from one records none: a loss would have the gradients of its own tokens
alone. Training reads whole sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from pareto_core.errors import ModelError, UnsupportedError


class SequenceState:
    """State of a model after ``length`` positions: ``layers`` holds what each layer's ``step`` takes.

    It is passed to and from the model as ``past_key_values``.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, layers: list[Any] | None = None, length: int = 0) -> None:
        self.layers = [] if layers is None else layers
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions read so far, which is the same for every layer."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i of the batch continue what was row ``beam_idx[i]``, as beam search asks."""
        self.layers = select_rows(self.layers, beam_idx)

    def nbytes(self) -> int:
        """Return the bytes of all tensors held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self.layers))


def select_rows(tree: Any, index: Tensor) -> Any:
    """Return the state ``tree`` of the batch's rows ``index``; a tensor's batch is its first axis.

    Objects that know their own way have ``select(index)``.
    """
    if isinstance(tree, Tensor):
        return tree.index_select(0, index.to(tree.device))
    if hasattr(tree, "select"):
        return tree.select(index)
    if isinstance(tree, (tuple, list)):
        items = [select_rows(item, index) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Yield every tensor that the state ``tree`` holds."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from tensors_of(getattr(tree, field.name))


class SequenceGenerationMixin(GenerationMixin):
    """transformers' ``generate`` over a :class:`SequenceState` that the model itself makes and returns."""

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: the library's caches hold keys and values only."""
        return False


def check_continuation(state: Any, attention_mask: Tensor | None, tokens: Tensor) -> None:
    """Check what a model is to keep or to continue: ``state`` is None or its own kind, and the mask hides nothing.

    The mask is that of ``tokens`` (B, L), or of these and everything before them, as ``generate`` has it. Raises
    :class:`ModelError` for another kind of state or shape, :class:`UnsupportedError` for padding.
    """
    if state is not None and not isinstance(state, SequenceState):
        raise ModelError(
            f"past_key_values is a {type(state).__name__}: must be the SequenceState that this model returned with "
            "use_cache=True, or None; caches of keys and values alone do not hold what these layers keep"
        )
    if attention_mask is None:
        return
    (rows, new), past = tokens.shape, 0 if state is None else state.length
    if tuple(attention_mask.shape) not in ((rows, new), (rows, past + new)):
        also = f", or {(rows, past + new)} with the {past} before them" if past else ""
        raise ModelError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: must be the inputs' {(rows, new)}{also}"
        )
    refuse_left_padding(attention_mask)


def refuse_left_padding(attention_mask: Tensor | None) -> None:
    """Raise :class:`UnsupportedError` where a prompt's mask has zeros: chunks and state count from the first column."""
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        padded = int((attention_mask == 0).any(1).sum())
        raise UnsupportedError(
            f"attention_mask hides positions in {padded} of {len(attention_mask)} prompts (generate hides what equals "
            "pad_token_id where it is given no mask): a padded prompt cannot be continued exactly, since chunks count "
            "from the first position; generate prompts of equal length together"
        )


@torch.no_grad()
def step_through(model: Any, embedded: Tensor, state: SequenceState) -> Tensor:
    """Read further positions (B, L, D) one at a time, updating ``state``; return the last layer's outputs (B, L, D).

    No gradient is recorded.
    """
    outputs = []
    for x in embedded.unbind(1):
        for number, layer in enumerate(model.layers):
            x, state.layers[number] = layer.step(x, state.layers[number])
        outputs.append(x)
    state.length += embedded.shape[1]
    return torch.stack(outputs, 1)

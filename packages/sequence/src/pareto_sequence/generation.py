"""What generation keeps between tokens, and how transformers' ``generate`` uses it.

A sequence model's state has one entry per layer: the EMA's averages (D x N per text), a TCN's ring buffers (one per
residual block, (K - 1) times its dilation inputs), the keys and values of the current chunk, or, for the Transformer,
of everything so far. A token thus costs O(1) in the EMA, O(K depth) in a TCN, and at most a chunk in attention,
whatever the length of the text. All rows of a batch are at the same place.

``generate`` is transformers' own: greedy search, sampling, beams, streamers, stop criteria. The prompt is read in one
forward pass that also fills the state; tokens then go one at a time. What cannot be exact is refused: prompts padded on
the left, since chunks count from a row's first column. Assisted decoding needs a state that can be cut back, which this
one cannot; transformers refuses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from pareto_core.errors import UnsupportedError


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
        self.layers = map_tensors(self.layers, lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def nbytes(self) -> int:
        """Return the bytes of all tensors held."""
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        map_tensors(self.layers, count)
        return sum(sizes)


def map_tensors(tree: Any, function: Any) -> Any:
    """Return ``tree`` (tuples, lists, dictionaries, dataclass-free leaves) with each tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(item, function) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(item, function) for item in tree)
    if isinstance(tree, dict):
        return {key: map_tensors(item, function) for key, item in tree.items()}
    return tree


class SequenceGenerationMixin(GenerationMixin):
    """transformers' ``generate`` over a :class:`SequenceState` that the model itself makes and returns."""

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: the library's caches hold keys and values only."""
        return False


def refuse_left_padding(attention_mask: Tensor | None) -> None:
    """Raise :class:`UnsupportedError` where a prompt's mask has zeros: chunks and state count from the first column."""
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        padded = int((attention_mask == 0).any(1).sum())
        raise UnsupportedError(
            f"attention_mask hides positions in {padded} of {len(attention_mask)} prompts (generate hides what equals "
            "pad_token_id where it is given no mask): a padded prompt cannot be continued exactly, since chunks count "
            "from the first position; generate prompts of equal length together"
        )


def step_through(model: Any, embedded: Tensor, state: SequenceState) -> Tensor:
    """Read further positions (B, L, D) one at a time, updating ``state``; return the last layer's outputs (B, L, D)."""
    outputs = []
    for x in embedded.unbind(1):
        for number, layer in enumerate(model.layers):
            x, state.layers[number] = layer.step(x, state.layers[number])
        outputs.append(x)
    state.length += embedded.shape[1]
    return torch.stack(outputs, 1)

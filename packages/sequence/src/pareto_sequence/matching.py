"""Models of equal parameter count: the comparison of chapter 7's section 7.4.4.

There "the embedding dimension is selected such that the models are parameter-matched": with another mixer, the same
layers, position-wise width and TCN are kept, and the width D alone is chosen anew.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch

from pareto_core.errors import ModelError, UnsupportedError
from pareto_sequence._nearest import nearest
from pareto_sequence.configuration import MIXERS, SequenceConfig


def parameter_count(config: SequenceConfig) -> int:
    """Return the number of parameters of ``config``'s model, made without memory for them.

    It is the language model where ``config`` is causal and reads tokens, the classifier else; tied weights count once.
    """
    from pareto_sequence.modeling import SequenceForCausalLM, SequenceForSequenceClassification

    language = config.causal and config.inputs == "tokens"
    with torch.device("meta"):
        # All layers have one shape: one of them says how many parameters the others have.
        single = _with(config, num_layers=1)
        model = (SequenceForCausalLM if language else SequenceForSequenceClassification)(single)
    total, layer = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0]))
    return total + (config.num_layers - 1) * layer


def parameter_matched(config: SequenceConfig, mixer: str, *, tolerance: float = 0.01) -> SequenceConfig:
    """Return ``config`` with another ``mixer`` and the ``hidden_size`` whose parameter count comes nearest.

    Widths are multiples of 8 and of what heads and rotary positions ask; where none of these is near enough, the 8 is
    given up. Raises :class:`ModelError` for an unknown mixer, :class:`UnsupportedError` where no width comes within
    ``tolerance`` (a share of ``config``'s count).
    """
    if mixer not in MIXERS:
        raise ModelError(f"mixer = {mixer!r}: expected one of {', '.join(MIXERS)}")
    if mixer == config.mixer:
        return copy.deepcopy(config)
    goal = parameter_count(config)
    turned = 2 if config.bias == "rotary" else 1  # a rotation takes a head's width by halves, a table takes any
    heads = {"tcncgsha": turned, "tcncmha": turned * config.num_heads, "transformer": 2 * config.num_heads}
    least = heads.get(mixer, 1)
    for step in (math.lcm(8, least), least):
        found = _nearest(config, mixer, step, goal)
        count = parameter_count(found)
        if abs(count - goal) <= tolerance * goal:
            return found
    raise UnsupportedError(
        f"no width in steps of {least} gives mixer {mixer!r} within {tolerance:.1%} of {goal} parameters; the nearest, "
        f"hidden_size = {found.hidden_size}, has {count}"
    )


def _nearest(config: SequenceConfig, mixer: str, step: int, goal: int) -> SequenceConfig:
    """The width, a multiple of ``step``, that comes nearest: more width is more parameters."""

    def at(multiple: int) -> SequenceConfig:
        return _with(config, mixer=mixer, hidden_size=multiple * step)

    return at(nearest(lambda multiple: parameter_count(at(multiple)), goal))


def _with(config: SequenceConfig, **changes: object) -> SequenceConfig:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return SequenceConfig(**(values | changes))

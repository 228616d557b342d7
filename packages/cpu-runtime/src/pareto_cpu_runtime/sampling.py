"""From a row of logits to the next token: greedy or sampled, in the order of transformers' processors and warpers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pareto_core.config import Config
from pareto_core.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How a token is chosen. Names and meanings are those of transformers' ``GenerationConfig``.

    ``repetition_penalty`` above 1 lowers every token that the text holds already, the prompt included. ``seed`` starts
    the request's own random numbers, so that a request gives the same tokens whatever runs beside it.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def validate(self) -> None:
        """See :class:`Config`."""
        self.require("temperature", self.temperature > 0 or not self.do_sample, "must be above 0; use do_sample=False")
        self.require("top_k", self.top_k >= 0, "must be at least 0 (0 for no limit)")
        self.require("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1")
        self.require("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1")
        self.require("repetition_penalty", self.repetition_penalty > 0, "must be above 0")
        self.require("seed", self.seed >= 0, "must be at least 0")


def processed(
    scores: NDArray[np.float32], seen: Sequence[int], banned: Sequence[int], sampling: Sampling
) -> NDArray[np.float32]:
    """Scores (vocabulary) after the repetition penalty and with the ``banned`` tokens at minus infinity."""
    if sampling.repetition_penalty == 1.0 and not banned:
        return scores
    scores = scores.copy()
    if sampling.repetition_penalty != 1.0:
        tokens = np.unique(np.asarray(seen, dtype=np.int64))
        values, penalty = scores[tokens], np.float32(sampling.repetition_penalty)
        scores[tokens] = np.where(values < 0, values * penalty, values / penalty)
    scores[list(banned)] = -np.inf
    return scores


def warped(scores: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float32]:
    """Scores after temperature, top-k, top-p and min-p: what is cut off is at minus infinity."""
    scores = scores / np.float32(sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        smallest = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < smallest, np.float32(-np.inf), scores)
    if sampling.top_p < 1.0:
        kept = np.flatnonzero(scores > -np.inf)
        order = kept[np.argsort(scores[kept], kind="stable")]
        below = np.cumsum(softmax(scores[order])) <= 1 - sampling.top_p
        below[-1] = False
        scores = scores.copy()
        scores[order[below]] = -np.inf
    if sampling.min_p > 0.0:
        probabilities = softmax(scores)
        scores = np.where(probabilities < sampling.min_p * probabilities.max(), np.float32(-np.inf), scores)
    return scores


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities over the last axis."""
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def require_finite(logits: NDArray[np.float32]) -> None:
    """Raise :class:`ModelError` where the model gave what is not a number: its weights or activations overflowed."""
    if not np.isfinite(logits.max()):
        raise ModelError("the model's logits are not finite: its weights hold NaN, or activations overflow")


class Chooser:
    """Chooses one request's tokens, with random numbers of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.Philox(sampling.seed))

    def choose(self, logits: NDArray[np.float32], seen: Sequence[int], banned: Sequence[int]) -> int:
        """The next token after the tokens ``seen``, none of the ``banned``."""
        require_finite(logits)
        scores = processed(logits, seen, banned, self.sampling)
        if not self.sampling.do_sample:
            return int(scores.argmax())
        sums = np.cumsum(softmax(warped(scores, self.sampling)), dtype=np.float64)
        # The last sum is 1 but for rounding; searching for less than it never ends on a token of probability 0.
        return int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))

"""From a row of logits to the next token: greedy or sampled, in the order of transformers' processors and warpers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pareto_core.config import Config
from pareto_core.errors import ModelError
from pareto_cpu_runtime._library import native

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How a token is chosen. Names and meanings are those of transformers' ``GenerationConfig``.

    ``temperature`` towards 0 becomes greedy search. ``repetition_penalty`` above 1 lowers every token that the text
    holds already, the prompt included. ``seed`` starts the request's own random numbers, so that a request gives the
    same tokens whatever runs beside it.
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
        warm = self.temperature > 0 and math.isfinite(self.temperature)
        self.require("temperature", warm or not self.do_sample, "must be above 0 and finite; use do_sample=False")
        self.require("top_k", self.top_k >= 0, "must be at least 0 (0 for no limit)")
        self.require("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1")
        self.require("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1")
        self.require("repetition_penalty", self.repetition_penalty > 0, "must be above 0")
        self.require("seed", self.seed >= 0, "must be at least 0")


def processed(
    scores: NDArray[np.float32], seen: Sequence[int], banned: Sequence[int], sampling: Sampling
) -> NDArray[np.float32]:
    """Scores (vocabulary) after the repetition penalty and with the ``banned`` tokens at minus infinity.

    Banned tokens outside the vocabulary, such as a stop token of another tokenizer, change nothing.
    """
    banned = [token for token in banned if 0 <= token < len(scores)]
    if sampling.repetition_penalty == 1.0 and not banned:
        return scores
    scores = scores.copy()
    if sampling.repetition_penalty != 1.0:
        tokens = np.unique(np.asarray(seen, dtype=np.int64))
        values, penalty = scores[tokens], np.float32(sampling.repetition_penalty)
        scores[tokens] = np.where(values < 0, values * penalty, values / penalty)
    scores[banned] = -np.inf
    return scores


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
        """The next token after the tokens ``seen``, none of the ``banned``, by logits (vocabulary).

        A draw takes one random number r: the token is the first, in the order of the vocabulary, at which the
        probabilities of the tokens that top-k, top-p and min-p leave, added up, exceed r.

        Raises :class:`ModelError` where the logits are not finite, or where no token is left to draw.
        """
        require_finite(logits)
        how, scores = self.sampling, processed(logits, seen, banned, self.sampling)
        if not how.do_sample:
            return int(scores.argmax())
        try:
            tokens = native().sample(
                scores[None],
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                min_p=how.min_p,
                random=self._random.random(),
            )
        except ValueError as error:
            raise ModelError(f"no token can be drawn: {error}") from error
        return int(tokens[0])

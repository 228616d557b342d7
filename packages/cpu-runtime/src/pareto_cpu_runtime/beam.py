"""Beam search with the results of transformers' ``generate``: the beams of a text in slots of the cache.

Of all continuations of a text's beams, the best (stop tokens + 1) * beams are looked at. Those that stop are kept as
results, scored by log-probability / new tokens ** length_penalty; the best of the others go on. The first continuation
of a beam stays in its slot; further ones take the slots of beams that died, with a copy of the cache.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from pareto_core.errors import DataError
from pareto_cpu_runtime.sampling import Sampling, log_softmax, processed, require_finite

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pareto_cpu_runtime.generate import Plan
    from pareto_cpu_runtime.runtime import Runtime

#: stands for minus infinity where scores are compared, as in transformers
NEVER = np.float32(-1.0e9)


@dataclasses.dataclass(frozen=True)
class Beam:
    """New tokens so far, the sum of their log-probabilities, and the slot that holds all but the last."""

    tokens: tuple[int, ...]
    score: np.float32
    slot: int


@dataclasses.dataclass(frozen=True)
class Found:
    """A text that ended, with its score; an empty place has no tokens."""

    tokens: tuple[int, ...] | None
    score: np.float32


class Search:
    """The beams of one text."""

    def __init__(self, plan: Plan, text: NDArray[np.int32], mask: NDArray[np.bool_], slots: list[int]) -> None:
        self.plan, self.prompt = plan, text[mask]
        self.penalty = float(plan.settings["length_penalty"])
        self.early = plan.settings["early_stopping"]
        self.sampling: Sampling = plan.sampling(0)
        self.slots = slots
        self.beams = [Beam((), np.float32(0.0), slots[0])]
        self.found = [Found(None, NEVER)] * plan.beams
        self.done = False

    def rows(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Tokens, slots, positions to run next, and which of them are wanted: the prompt, then a token of each beam."""
        length = len(self.prompt)
        if not self.beams[0].tokens:
            slots = np.full(length, self.slots[0], dtype=np.int32)
            return self.prompt, slots, np.arange(length, dtype=np.int32), np.array([length - 1], dtype=np.int32)
        tokens = np.array([beam.tokens[-1] for beam in self.beams], dtype=np.int32)
        slots = np.array([beam.slot for beam in self.beams], dtype=np.int32)
        position = length + len(self.beams[0].tokens) - 1
        count = len(self.beams)
        return tokens, slots, np.full(count, position, dtype=np.int32), np.arange(count, dtype=np.int32)

    def advance(self, logits: NDArray[np.float32], runtime: Runtime) -> None:
        """Continue the beams by one token each, given their logits (beams, vocabulary)."""
        require_finite(logits)
        plan, new = self.plan, len(self.beams[0].tokens) + 1
        candidates = self._candidates(log_softmax(logits))
        stops = [tokens[-1] in plan.stop_tokens or new >= plan.max_new for _, tokens, _ in candidates]
        self._keep_found(candidates, stops, new)
        going = [
            (parent, tokens, score + NEVER if stop else score)
            for (parent, tokens, score), stop in zip(candidates, stops, strict=True)
        ]
        going.sort(key=lambda candidate: -candidate[2])
        if all(stops) or not self._can_improve(going[0][2], new):
            self.done = True
            return
        self.beams = self._placed(going[: plan.beams], runtime, len(self.prompt) + new - 1)

    def _candidates(self, scores: NDArray[np.float32]) -> list[tuple[int, tuple[int, ...], np.float32]]:
        """The best continuations, best first: (number of the beam, tokens, sum of log-probabilities)."""
        plan = self.plan
        banned = plan.stop_tokens if len(self.beams[0].tokens) < plan.min_new else ()
        rows = []
        for beam, row in zip(self.beams, scores, strict=True):
            seen = [*self.prompt.tolist(), *beam.tokens]
            rows.append(processed(row, seen, banned, self.sampling) + beam.score)
        sums = np.stack(rows).astype(np.float32)
        keep = min(max(2, 1 + len(plan.stop_tokens)) * plan.beams, sums.size)
        flat = sums.reshape(-1)
        best = np.argpartition(-flat, keep - 1)[:keep]
        best = best[np.lexsort((best, -flat[best]))]
        vocabulary = sums.shape[1]
        return [
            (int(i // vocabulary), (*self.beams[i // vocabulary].tokens, int(i % vocabulary)), flat[i]) for i in best
        ]

    def _keep_found(
        self, candidates: list[tuple[int, tuple[int, ...], np.float32]], stops: list[bool], new: int
    ) -> None:
        """Keep the best results: those before, and the best ``beams`` candidates, where they stop."""
        if self.early is True and all(found.tokens is not None for found in self.found):
            return
        ended = [
            Found(tokens, np.float32(score / new**self.penalty))
            for (_, tokens, score), stop in list(zip(candidates, stops, strict=True))[: self.plan.beams]
            if stop
        ]
        self.found = sorted([*self.found, *ended], key=lambda found: -found.score)[: self.plan.beams]

    def _can_improve(self, best: np.float32, new: int) -> bool:
        """Whether a beam that goes on could still beat the worst result."""
        if any(found.tokens is None for found in self.found):
            return True
        if self.early is True:
            return False
        longest = self.plan.max_new if self.early == "never" and self.penalty > 0 else new
        return bool(best / longest**self.penalty > min(found.score for found in self.found))

    def _placed(self, going: list[tuple[int, tuple[int, ...], np.float32]], runtime: Runtime, held: int) -> list[Beam]:
        """Beams with slots: the first continuation of a beam stays, the others get copies of its ``held`` tokens."""
        parents = [self.beams[parent].slot for parent, _, _ in going]
        free = [slot for slot in self.slots if slot not in parents]
        placed, taken = [], set()
        for (_, tokens, score), parent in zip(going, parents, strict=True):
            slot = parent
            if parent in taken:
                slot = free.pop()
                runtime.copy_slot(parent, slot, held)
            taken.add(slot)
            placed.append(Beam(tokens, score, slot))
        return placed


def beam_search(runtime: Runtime, texts: NDArray[np.int32], masks: NDArray[np.bool_], plan: Plan) -> NDArray[np.int64]:
    """Continue each text by ``plan.beams`` beams; as many texts run together as there are free slots for."""
    for text, mask in zip(texts, masks, strict=True):
        runtime.check_tokens(text[mask])
        if int(mask.sum()) + plan.max_new - 1 > runtime.max_length:
            raise DataError(
                f"{int(mask.sum())} prompt tokens and {plan.max_new} new ones do not fit the cache of "
                f"{runtime.max_length} tokens"
            )
    found: list[Found] = []
    together = max(1, runtime.slots.free // plan.beams)
    for start in range(0, len(texts), together):
        part = slice(start, start + together)
        with runtime.slots.lend(plan.beams * len(texts[part]), f"beam search with {plan.beams} beams") as slots:
            searches = [
                Search(plan, text, mask, slots[i * plan.beams : (i + 1) * plan.beams])
                for i, (text, mask) in enumerate(zip(texts[part], masks[part], strict=True))
            ]
            _run(runtime, searches)
        found += [result for search in searches for result in search.found[: plan.returned]]
    return _filled(texts, found, plan)


def _run(runtime: Runtime, searches: list[Search]) -> None:
    while active := [search for search in searches if not search.done]:
        rows = [search.rows() for search in active]
        starts = np.cumsum([0, *(len(row[0]) for row in rows[:-1])])
        want = np.concatenate([row[3] + start for row, start in zip(rows, starts, strict=True)])
        tokens, slots, positions = (np.concatenate([row[part] for row in rows]) for part in range(3))
        logits = runtime.forward(tokens, slots, positions, want.astype(np.int32))
        first = 0
        for search, row in zip(active, rows, strict=True):
            search.advance(logits[first : first + len(row[3])], runtime)
            first += len(row[3])


def _filled(texts: NDArray[np.int32], found: list[Found], plan: Plan) -> NDArray[np.int64]:
    """Prompts with their results; what is shorter is filled with the padding token, as transformers does."""
    new = [result.tokens or () for result in found]
    width = texts.shape[1]
    # A padding token of 0 counts as none there, and the stop token fills instead.
    fill = -1 if not plan.stop_tokens else plan.settings["pad_token_id"] or plan.stop_tokens[0]
    out = np.full((len(found), width + max(map(len, new))), fill, dtype=np.int64)
    out[:, :width] = np.repeat(texts, plan.returned, axis=0)
    for row, tokens in enumerate(new):
        out[row, width : width + len(tokens)] = tokens
    return out

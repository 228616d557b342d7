"""ListOps: work out a nested list expression of up to 2,000 symbols (table 7.3).

N. Nangia, S. R. Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", 2018,
https://arxiv.org/abs/1804.06028, in the long form of Y. Tay et al., "Long Range Arena: A Benchmark for Efficient
Transformers", 2021, https://arxiv.org/abs/2011.04006. Drawn by the published rules: a node is an operator with
probability 0.25 (never at ``max_depth``), else a digit; an operator has 2 to ``max_args`` arguments and is one of MIN,
MAX, MED (the median, cut to an integer) and SM (the sum modulo 10); an expression counts if its number of symbols is
above ``min_length`` and below ``max_length``, and none occurs twice. Symbols are digits, opening operators and the
closing bracket; the parentheses of the published files, which say nothing, are not among them.

Deviation: each split has its own random stream, where the published program, without a seed, splits a set in whatever
order it has.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from pareto_core.errors import DataError
from pareto_core.task import Split, TaskSpec
from pareto_sequence.tasks.base import Items, SequenceClassification, revision_of

RULE = "listops 1"
OPERATORS = ("MIN", "MAX", "MED", "SM")
OPERATOR_SHARE = 0.25
#: token 0 pads; those of the digits, the operators and the bracket
DIGIT, OPERATOR, CLOSE = 1, 11, 15
#: attempts in a row that give nothing new, after which there is taken to be nothing more
ATTEMPTS = 200_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOps(SequenceClassification):
    """Expressions of the published sizes (96,000 train, 2,000 each are dev and test), drawn by ``seed``."""

    name: ClassVar[str] = "sequence.listops"

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000
    train_items: int = 96_000
    dev_items: int = 2000
    test_items: int = 2000
    seed: int = 0

    def validate(self) -> None:
        """Check ranges, and that an expression can be long enough at all."""
        for field in ("train_items", "dev_items", "test_items"):
            self.require(field, getattr(self, field) > 0, "must be above 0")
        self.require("seed", self.seed >= 0, "must not be negative")
        self.require("max_depth", 1 <= self.max_depth <= 100, "must be from 1 to 100")
        self.require("max_args", self.max_args >= 2, "must be at least 2")
        self.require("max_length", self.max_length >= 2, "must be at least 2")
        self.require("min_length", 0 <= self.min_length < self.max_length - 1, "must be below max_length - 1")
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = min(2 + self.max_args * longest, self.max_length)
        self.require("min_length", self.min_length < longest, f"must be below {longest}, the longest at this depth")

    @property
    def spec(self) -> TaskSpec:
        """Ten digits as classes; 16 tokens, padding among them."""
        return TaskSpec(tuple("0123456789"), CLOSE + 1, self.max_length)

    @functools.cached_property
    def _seen(self) -> set[bytes]:
        return set()

    def read(self, split: Split) -> Items:
        """Draw ``split`` after those that come before it, none of whose expressions it repeats."""
        # Training comes last: how many items it has changes nothing of the other two.
        if split != "test":
            self.items("dev" if split == "train" else "test")
        count = {"train": self.train_items, "dev": self.dev_items, "test": self.test_items}[split]
        found = _expressions(self, f"{self.seed}:{split}", count, self._seen)
        rows = [np.frombuffer(tokens, np.uint8) for tokens, _ in found]
        labels = np.array([value for _, value in found])
        return Items(rows, labels, np.array([len(row) for row in rows]))

    def data_revision(self) -> dict[str, str]:
        """The rule's version, and a hash over the fields and the first test items."""
        small = dataclasses.replace(self, train_items=1, dev_items=1, test_items=min(16, self.test_items))
        return revision_of(RULE, self, small.items("test").digest(16))


def _expressions(task: ListOps, seed: str, count: int, seen: set[bytes]) -> list[tuple[bytes, int]]:
    """``count`` expressions and their values, none of them in ``seen``, which they join."""
    from tqdm import tqdm

    stream = random.Random(seed)
    found: list[tuple[bytes, int]] = []
    attempts = 0
    with tqdm(total=count, desc="ListOps", unit="expr", disable=None, leave=False) as bar:
        while len(found) < count:
            drawn = draw(stream.random, task.max_depth, task.max_args, task.max_length)
            attempts += 1
            if attempts > ATTEMPTS:
                raise DataError(
                    f"task {task.name}: found only {len(found)} of {count} different expressions with more than "
                    f"{task.min_length} and fewer than {task.max_length} symbols; widen these, or ask for fewer"
                )
            if drawn is not None and len(drawn[0]) > task.min_length and drawn[0] not in seen:
                seen.add(drawn[0])
                found.append(drawn)
                attempts = 0
                bar.update()
    return found


class _TooLongError(Exception):
    pass


def draw(uniform: Callable[[], float], max_depth: int, max_args: int, max_length: int) -> tuple[bytes, int] | None:
    """Draw an expression from ``uniform`` numbers below 1: its tokens and its value, None at ``max_length`` or more."""
    tokens = bytearray()

    def node(depth: int) -> int:
        if depth == max_depth or uniform() > OPERATOR_SHARE:
            digit = int(10 * uniform())
            tokens.append(DIGIT + digit)
            return digit
        operator = int(len(OPERATORS) * uniform())
        tokens.append(OPERATOR + operator)
        values = [node(depth + 1) for _ in range(2 + int((max_args - 1) * uniform()))]
        tokens.append(CLOSE)
        if len(tokens) >= max_length:
            raise _TooLongError
        return _apply(operator, values)

    try:
        value = node(1)
    except _TooLongError:
        return None
    return (bytes(tokens), value) if len(tokens) < max_length else None


def _apply(operator: int, values: list[int]) -> int:
    if operator == 0:
        return min(values)
    if operator == 1:
        return max(values)
    if operator == 2:
        ordered, middle = sorted(values), len(values) // 2
        return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return sum(values) % 10


def text_of(tokens: np.ndarray) -> str:
    """Write tokens as the published files do, without parentheses: ``[MAX 2 9 [MIN 4 7 ] 0 ]``."""
    names = ["", *"0123456789", *(f"[{name}" for name in OPERATORS), "]"]
    return " ".join(names[token] for token in tokens)

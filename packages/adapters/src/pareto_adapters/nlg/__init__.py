"""Metrics of generated texts against several references each: BLEU, NIST, METEOR, ROUGE-L, CIDEr and TER.

Their scales are those of the LoDA chapter's tables: BLEU, METEOR and ROUGE-L in percent, NIST and CIDEr as they are,
TER as a fraction. What each follows, and where it differs from the scripts behind those tables, is with its class in
:mod:`pareto_adapters.nlg.metrics`; METEOR differs so much that its figures must not be set beside the chapter's.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pareto_adapters.nlg.metrics import Bleu, Cider, Meteor, Metric, Nist, NoWordNet, References, RougeL, Ter
from pareto_core import DataError

LIBRARIES = ("sacrebleu", "nltk")

__all__ = [
    "Scorer",
    "bleu",
    "cider",
    "find_wordnet",
    "meteor",
    "meteor_without_synonyms",
    "nist",
    "require_libraries",
    "rouge_l",
    "ter",
]


def bleu(hypotheses: Sequence[str], references: References) -> float:
    """BLEU in percent; ``references[i]`` are those of ``hypotheses[i]``, here and in all functions below.

    Raises :class:`DataError`, as they all do, where there is no text, or one without references.
    """
    return _corpus(Bleu(), hypotheses, references)


def nist(hypotheses: Sequence[str], references: References) -> float:
    """NIST with n-grams of up to five tokens; from 0 upwards."""
    return _corpus(Nist(references), hypotheses, references)


def meteor(hypotheses: Sequence[str], references: References) -> float:
    """METEOR of 2007 with WordNet's synonyms, in percent; raises DataError where nltk has no WordNet."""
    wordnet = find_wordnet()
    if wordnet is None:
        raise DataError("METEOR's synonyms are WordNet's, which nltk does not find: python -m nltk.downloader wordnet")
    return _corpus(Meteor(wordnet), hypotheses, references)


def meteor_without_synonyms(hypotheses: Sequence[str], references: References) -> float:
    """METEOR of 2007 that matches words and stems alone, in percent: another figure than :func:`meteor`."""
    return _corpus(Meteor(NoWordNet()), hypotheses, references)


def rouge_l(hypotheses: Sequence[str], references: References) -> float:
    """ROUGE-L in percent."""
    return _corpus(RougeL(), hypotheses, references)


def cider(hypotheses: Sequence[str], references: References) -> float:
    """CIDEr-D, from 0 to 10; 0 for a single item, where no n-gram is rarer than another."""
    return _corpus(Cider(references), hypotheses, references)


def ter(hypotheses: Sequence[str], references: References) -> float:
    """Translation edit rate as a fraction: 0 is perfect, and it may exceed 1."""
    return _corpus(Ter(), hypotheses, references)


class Scorer:
    """All metrics over one set of items; each text's share in them is computed once, so that resamples are cheap.

    ``references`` holds each item's by its id. The weights of n-grams in NIST and CIDEr come from the references of all
    these items, also where a resample holds some of them twice and others not at all.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        corpus, wordnet = list(references.values()), find_wordnet()
        meteor_name = "meteor_without_synonyms" if wordnet is None else "meteor"
        self._references = references
        self._metrics: dict[str, Metric] = {
            "bleu": Bleu(),
            "nist": Nist(corpus),
            meteor_name: Meteor(NoWordNet() if wordnet is None else wordnet),
            "rouge_l": RougeL(),
            "cider": Cider(corpus),
            "ter": Ter(),
        }
        self._shares: dict[tuple[str, str], Any] = {}

    def scores(self, answers: Sequence[tuple[str, str]]) -> dict[str, float]:
        """Metrics by name of the ``answers``, pairs of an item's id and the text generated for it.

        METEOR is called ``meteor`` where it knows synonyms and ``meteor_without_synonyms`` where it does not. Raises
        :class:`DataError` where there are no answers.
        """
        import numpy as np

        if not answers:
            raise DataError("there are no texts to score")
        sums = np.sum([self._share(*answer) for answer in answers], axis=0).tolist()
        found = {}
        for name, metric in self._metrics.items():
            found[name] = metric.value(sums[: metric.size])
            sums = sums[metric.size :]
        return found

    def _share(self, item: str, text: str) -> Any:
        import numpy as np

        if (item, text) not in self._shares:
            parts = [metric.share(text, self._references[item]) for metric in self._metrics.values()]
            self._shares[item, text] = np.array([number for part in parts for number in part])
        return self._shares[item, text]


def require_libraries() -> None:
    """Raise :class:`DataError` where a library that scores is missing; tasks ask before anything is trained."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            raise DataError(f'texts are scored with {name}, which is not installed: pip install "pareto-adapters[nlg]"')


def find_wordnet() -> Any:
    """WordNet as nltk reads it; None where nltk's data has none."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def _corpus(metric: Metric, hypotheses: Sequence[str], references: References) -> float:
    if not hypotheses or len(hypotheses) != len(references) or not all(references):
        raise DataError(f"{len(hypotheses)} texts cannot be scored against {len(references)} sets of references")
    shares = [metric.share(*pair) for pair in zip(hypotheses, references, strict=True)]
    return metric.value([math.fsum(column) for column in zip(*shares, strict=True)])

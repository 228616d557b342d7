"""Metrics of generated texts against several references each: BLEU, NIST, METEOR, ROUGE-L, CIDEr and TER.

Their scales are those of the LoDA chapter's tables: BLEU, METEOR and ROUGE-L in percent, NIST and CIDEr as they are,
TER as a fraction. What each follows, and where it differs from the scripts behind those tables, is with its class in
:mod:`pareto_adapters.nlg.metrics`; METEOR differs so much that its figures must not be set beside the chapter's.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pareto_adapters.nlg.metrics import Bleu, Cider, Meteor, Metric, Nist, NoWordNet, References, RougeL, Ter
from pareto_core import DataError
from pareto_core.errors import shown

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

    Raises :class:`DataError`, as they all do, where there is no text, one without references, or a string where a list
    of texts is due.
    """
    return _corpus(Bleu, hypotheses, references)


def nist(hypotheses: Sequence[str], references: References) -> float:
    """NIST with n-grams of up to five tokens; from 0 upwards."""
    return _corpus(lambda: Nist(references), hypotheses, references)


def meteor(hypotheses: Sequence[str], references: References) -> float:
    """METEOR of 2007 with WordNet's synonyms, in percent; raises DataError where nltk has no WordNet."""
    wordnet = find_wordnet()
    if wordnet is None:
        raise DataError("METEOR's synonyms are WordNet's, which nltk does not find: python -m nltk.downloader wordnet")
    return _corpus(lambda: Meteor(wordnet), hypotheses, references)


def meteor_without_synonyms(hypotheses: Sequence[str], references: References) -> float:
    """METEOR of 2007 that matches words and stems alone, in percent: another figure than :func:`meteor`."""
    return _corpus(lambda: Meteor(NoWordNet()), hypotheses, references)


def rouge_l(hypotheses: Sequence[str], references: References) -> float:
    """ROUGE-L in percent."""
    return _corpus(RougeL, hypotheses, references)


def cider(hypotheses: Sequence[str], references: References) -> float:
    """CIDEr-D, from 0 to 10; 0 for a single item, where no n-gram is rarer than another."""
    return _corpus(lambda: Cider(references), hypotheses, references)


def ter(hypotheses: Sequence[str], references: References) -> float:
    """Translation edit rate as a fraction: 0 is perfect, and it may exceed 1."""
    return _corpus(Ter, hypotheses, references)


class Scorer:
    """All metrics over one set of items; each text's share in them is computed once, so that resamples are cheap.

    ``references`` holds each item's by its id. The weights of n-grams in NIST and CIDEr come from the references of all
    these items, also where a resample holds some of them twice and others not at all. Raises :class:`DataError` for an
    item without references, or whose references are no list of texts.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        for item, texts in references.items():
            _check_references(f"item {item!r}", texts)
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
        :class:`DataError` where there are no answers, or one of an unknown item or without a text.
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
            if item not in self._references:
                raise DataError(f"item {item!r} has no references among the {len(self._references)} items given")
            _check_text(f"the answer to item {item!r}", text)
            parts = [metric.share(text, self._references[item]) for metric in self._metrics.values()]
            self._shares[item, text] = np.array([number for part in parts for number in part])
        return self._shares[item, text]


def require_libraries() -> None:
    """Raise :class:`DataError` where a library that scores is missing; tasks ask before anything is trained."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            remedy = 'pip install "./packages/adapters[nlg]", in a clone of Pareto'
            raise DataError(f"texts are scored with {name}, which is not installed: {remedy}")


def find_wordnet() -> Any:
    """WordNet as nltk reads it; None where nltk's data has none."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def _corpus(make: Callable[[], Metric], hypotheses: Sequence[str], references: References) -> float:
    _check_texts("the texts to score", hypotheses)
    if isinstance(references, str):
        raise DataError(f"references must be a list of lists of texts, found the string {shown(references, 60)}")
    if not hypotheses or len(hypotheses) != len(references):
        raise DataError(f"{len(hypotheses)} texts cannot be scored against {len(references)} sets of references")
    for number, texts in enumerate(references):
        _check_references(f"text {number}", texts)
    metric = make()
    shares = [metric.share(*pair) for pair in zip(hypotheses, references, strict=True)]
    return metric.value([math.fsum(column) for column in zip(*shares, strict=True)])


def _check_references(item: str, texts: object) -> None:
    """Raise :class:`DataError` unless ``texts`` is a collection of one text or more."""
    _check_texts(f"the references of {item}", texts)
    if not texts:
        raise DataError(f"{item} cannot be scored: it has no references")


def _check_texts(what: str, texts: object) -> None:
    """Raise :class:`DataError` unless ``texts`` is a collection of texts; a string would be read letter by letter."""
    if isinstance(texts, str):
        raise DataError(f"{what} must be a list of texts, found the string {shown(texts, 60)}: put it in a list")
    if not isinstance(texts, Collection):
        raise DataError(f"{what} must be a list of texts, found {shown(texts, 60)}")
    for text in texts:
        _check_text(what, text)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise DataError(f"{what}: expected a string, found {shown(text, 60)}")

"""The metrics as functions of sums over items, so that a resampled corpus is scored by adding up what is known.

Texts become lower-case tokens by mteval's rules (``13a`` of sacrebleu) for BLEU and NIST and by TERcom's for TER.
METEOR, ROUGE-L and CIDEr take the words among mteval's tokens, without punctuation; the COCO script, which the E2E
script runs, takes those of a Java tokenizer, which cuts clitics (``do n't``).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from pareto_adapters.nlg.ter import edits

BLEU_ORDER, NIST_ORDER, CIDER_ORDER = 4, 5, 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0

References = Sequence[Sequence[str]]
Ngram = tuple[str, ...]


class Metric(ABC):
    """A metric that is a function of sums over items, of ``size`` numbers."""

    size: ClassVar[int]

    @abstractmethod
    def share(self, hypothesis: str, references: Sequence[str]) -> Sequence[float]:
        """Return what one text adds to the sums."""

    @abstractmethod
    def value(self, sums: Sequence[float]) -> float:
        """Return the metric of a corpus."""


class Mean(Metric):
    """A metric that is ``scale`` times the mean of a score of each item; its sums are of scores and of ones."""

    size = 2
    scale: ClassVar[float] = 100.0

    @abstractmethod
    def score(self, hypothesis: str, references: Sequence[str]) -> float:
        """Return the score of one text."""

    def share(self, hypothesis: str, references: Sequence[str]) -> Sequence[float]:
        """The score, and 1."""
        return self.score(hypothesis, references), 1.0

    def value(self, sums: Sequence[float]) -> float:
        """The mean."""
        return self.scale * sums[0] / sums[1]


class Bleu(Metric):
    """BLEU by sacrebleu, in lower case, as the E2E script counts it.

    K. Papineni, S. Roukos, T. Ward, W.-J. Zhu, "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002,
    https://aclanthology.org/P02-1040. Sums: matching n-grams and all n-grams of each order, the length, and that of the
    reference nearest in length.
    """

    size = 2 * BLEU_ORDER + 2

    def __init__(self) -> None:
        from sacrebleu.metrics.bleu import BLEU

        # The effective order concerns a sentence's own score, which is not used.
        self._bleu = BLEU(lowercase=True, effective_order=True)

    def share(self, hypothesis: str, references: Sequence[str]) -> Sequence[float]:
        """Counts of sacrebleu."""
        found = self._bleu.sentence_score(hypothesis, list(references))
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def value(self, sums: Sequence[float]) -> float:
        """BLEU in percent."""
        counts = [round(number) for number in sums]
        matches, totals, (length, reference_length) = counts[:BLEU_ORDER], counts[BLEU_ORDER:-2], counts[-2:]
        return self._bleu.compute_bleu(matches, totals, length, reference_length, smooth_method="exp").score


class Nist(Metric):
    """NIST as mteval counts it: an n-gram may match as often as the reference has it that has it most often.

    G. Doddington, "Automatic Evaluation of Machine Translation Quality Using N-gram Co-Occurrence Statistics", 2002.
    Lengths are compared with the mean over references. nltk's function instead takes the best single reference of each
    order: the two agree on single references alone. Sums: information of the matching n-grams and number of all, by
    order; the length and the references' mean length.
    """

    size = 2 * NIST_ORDER + 2

    def __init__(self, references: References) -> None:
        texts = [tokens(text) for item in references for text in item]
        counts = Counter(ngram for text in texts for n in range(1, NIST_ORDER + 1) for ngram in ngrams(text, n))
        counts[()] = sum(map(len, texts))
        # Eq. (2) of Doddington (2002)
        self._information = {ngram: math.log2(counts[ngram[:-1]] / counts[ngram]) for ngram in counts if ngram}

    def share(self, hypothesis: str, references: Sequence[str]) -> Sequence[float]:
        """Information and counts by order, and lengths."""
        text, others = tokens(hypothesis), [tokens(reference) for reference in references]
        matched, total = [], []
        for n in range(1, NIST_ORDER + 1):
            allowed: Counter[Ngram] = Counter()
            for other in others:
                allowed |= Counter(ngrams(other, n))
            common = Counter(ngrams(text, n)) & allowed
            matched.append(math.fsum(self._information[ngram] * count for ngram, count in common.items()))
            total.append(max(0, len(text) - n + 1))
        return [*matched, *total, len(text), sum(map(len, others)) / len(others)]

    def value(self, sums: Sequence[float]) -> float:
        """NIST."""
        matched, total, (length, reference_length) = sums[:NIST_ORDER], sums[NIST_ORDER:-2], sums[-2:]
        if not length or not reference_length:
            return 0.0
        # Eq. (3) of Doddington (2002); the penalty is a half at two thirds of the references' length
        brevity = math.log(min(1.0, length / reference_length))
        penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * brevity**2)
        return penalty * math.fsum(m / t for m, t in zip(matched, total, strict=True) if t)


class Meteor(Mean):
    """METEOR by nltk, the best over the references: words match as they are, by stem, or as synonyms of WordNet.

    A. Lavie, A. Agarwal, "METEOR: An Automatic Metric for MT Evaluation with High Levels of Correlation with Human
    Judgments", 2007, https://aclanthology.org/W07-0734. The chapter's figures are of METEOR 1.5, a Java program, which
    also matches paraphrases, gives function words and each kind of match a weight, takes other constants and sums over
    the corpus: the two are not comparable. ``wordnet`` has nltk's ``synsets(word)``.
    """

    def __init__(self, wordnet: Any) -> None:
        from nltk.stem.porter import PorterStemmer

        stem: Callable[[str], str] = PorterStemmer().stem
        self._stemmer, self._wordnet = SimpleNamespace(stem=functools.cache(stem)), wordnet

    def score(self, hypothesis: str, references: Sequence[str]) -> float:
        """METEOR of one text."""
        from nltk.translate.meteor_score import meteor_score

        others = [words(reference) for reference in references]
        return float(meteor_score(others, words(hypothesis), stemmer=self._stemmer, wordnet=self._wordnet))


class NoWordNet:
    """Stands for WordNet where there is none."""

    def synsets(self, word: str) -> tuple[Any, ...]:
        """No word has a synonym."""
        return ()


class RougeL(Mean):
    """ROUGE-L as in the COCO script: F of the best precision and the best recall over the references, beta = 1.2.

    C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, https://aclanthology.org/W04-1013.
    """

    def score(self, hypothesis: str, references: Sequence[str]) -> float:
        """ROUGE-L of one text."""
        text, others = words(hypothesis), [words(reference) for reference in references]
        common = [common_subsequence(text, other) for other in others]
        if not any(common):
            return 0.0
        precision = max(common) / len(text)
        recall = max(length / len(other) for length, other in zip(common, others, strict=True) if other)
        # Eq. (4) of Lin (2004)
        return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


class Cider(Mean):
    """CIDEr-D with plain counts, without stemming and with sigma = 6: what the COCO and E2E scripts call CIDEr.

    R. Vedantam, C. L. Zitnick, D. Parikh, "CIDEr: Consensus-based Image Description Evaluation", 2015,
    https://arxiv.org/abs/1411.5726. Texts are likened by their n-grams, each weighted by how few items have it in their
    references; the mean over references and orders.
    """

    scale = 10.0

    def __init__(self, references: References) -> None:
        orders = range(1, CIDER_ORDER + 1)
        items = [{ngram for text in item for n in orders for ngram in ngrams(words(text), n)} for item in references]
        self._items, self._frequency = len(items), Counter(ngram for item in items for ngram in item)

    def score(self, hypothesis: str, references: Sequence[str]) -> float:
        """A tenth of the CIDEr-D of one text."""
        text, others = words(hypothesis), [words(reference) for reference in references]
        found = 0.0
        for n in range(1, CIDER_ORDER + 1):
            mine = self._weighted(text, n)
            for other in others:
                # Eq. (4) of Vedantam et al. (2015)
                penalty = math.exp(-((len(text) - len(other)) ** 2) / (2 * CIDER_SIGMA**2))
                found += penalty * clipped_cosine(mine, self._weighted(other, n))
        # Eq. (5) of Vedantam et al. (2015), whose factor of 10 is the scale
        return found / len(others) / CIDER_ORDER

    def _weighted(self, text: Sequence[str], n: int) -> dict[Ngram, float]:
        counts = Counter(ngrams(text, n))
        # Eq. (1) of Vedantam et al. (2015), with plain counts
        return {
            ngram: count * math.log(self._items / max(1, self._frequency[ngram])) for ngram, count in counts.items()
        }


class Ter(Metric):
    """TER as sacrebleu counts it, in lower case: edits to the nearest reference, by the references' mean length.

    Over the corpus, where the script behind table 5.2 takes the mean over items of the lowest rate to any reference.
    Sums: edits (:func:`pareto_adapters.nlg.ter.edits`), and lengths of references.
    """

    size = 2

    def __init__(self) -> None:
        from sacrebleu.tokenizers.tokenizer_ter import TercomTokenizer

        self._tokenizer = TercomTokenizer(normalized=True)

    def share(self, hypothesis: str, references: Sequence[str]) -> Sequence[float]:
        """Edits and mean length; references that cannot be the nearest one are passed over."""
        text, *others = (self._tokenizer(line.rstrip()).split() for line in (hypothesis, *references))
        fewest = math.inf
        for bound, other in sorted((least_edits(text, other), other) for other in others):
            if bound >= fewest:
                break
            fewest = min(fewest, edits(text, other))
        return fewest, sum(map(len, others)) / len(others)

    def value(self, sums: Sequence[float]) -> float:
        """Edits by words of the references."""
        return sums[0] / sums[1] if sums[1] else float(sums[0] > 0)


@functools.cache
def _tokenizer() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer: Callable[[str], str] = Tokenizer13a()
    return tokenizer


def tokens(text: str) -> list[str]:
    """Lower-case tokens of ``text`` by mteval's rules."""
    return _tokenizer()(text.lower()).split()


def words(text: str) -> list[str]:
    """The :func:`tokens` that hold a letter or a digit."""
    return [token for token in tokens(text) if any(map(str.isalnum, token))]


def ngrams(text: Sequence[str], n: int) -> list[Ngram]:
    """All runs of ``n`` tokens, in order."""
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest subsequence that two texts have in common."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def least_edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Edits that turn one text into another if moving words is free: what differs in the bags of words."""
    return max(len(a), len(b)) - (Counter(a) & Counter(b)).total()


def clipped_cosine(a: Mapping[Ngram, float], b: Mapping[Ngram, float]) -> float:
    """Cosine of two sparse vectors, ``a`` cut to what ``b`` has of each component; 0 where either vector is zero."""
    norm = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
    return sum(min(x, b[key]) * b[key] for key, x in a.items() if key in b) / norm if norm else 0.0

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from pareto_adapters import nlg
from pareto_adapters.nlg.metrics import (
    Bleu,
    Cider,
    Meteor,
    Nist,
    NoWordNet,
    Ter,
    common_subsequence,
    least_edits,
    tokens,
    words,
)
from pareto_core import DataError

FUNCTIONS = [nlg.bleu, nlg.nist, nlg.meteor_without_synonyms, nlg.rouge_l, nlg.cider, nlg.ter]
VOCABULARY = ["the", "a", "cat", "dog", "Cat", "sat", "ran", "on", "mat", "rug", ",", ".", "house"]


def corpus(items: int = 12, most: int = 4, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Random texts that resemble their random references, one to ``most`` of them."""
    draw = random.Random(seed)

    def text() -> list[str]:
        return draw.choices(VOCABULARY, k=draw.randint(3, 12))

    hypotheses, references = [], []
    for _ in range(items):
        sources = [text() for _ in range(draw.randint(1, most))]
        copied = list(sources[-1])
        copied[draw.randrange(len(copied))] = draw.choice(VOCABULARY)
        cut = draw.randrange(len(copied))
        hypotheses.append(" ".join(copied[cut:] + copied[:cut]))
        references.append([" ".join(source) for source in sources])
    return hypotheses, references


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: the first of each item, the second of each, …"""
    return [list(column) for column in itertools.zip_longest(*references)]


def test_tokens() -> None:
    assert " ".join(tokens("It's £20-25, the Family-friendly pub.")) == "it's £20 - 25 , the family-friendly pub ."
    assert words("It's £20-25, the Family-friendly pub.") == ["it's", "£20", "25", "the", "family-friendly", "pub"]


def test_perfect_texts() -> None:
    references = [["The cat sat on the mat .", "A dog"], ["Dogs like the rug very much .", "It ran"]]
    hypotheses = [item[0] for item in references]
    assert nlg.bleu(hypotheses, references) == pytest.approx(100)
    assert nlg.rouge_l(hypotheses, references) == pytest.approx(100)
    assert nlg.ter(hypotheses, references) == 0
    # one chunk of six words costs half of (1/6)**3
    assert nlg.meteor_without_synonyms(hypotheses, references) == pytest.approx(100 * (1 - 0.5 / 6**3))
    # half of the references are the text itself, those of two words share nothing with it
    assert nlg.cider(hypotheses, [item[:1] for item in references]) == pytest.approx(10)
    assert nlg.cider(hypotheses, references) == pytest.approx(5)


def test_empty_and_short_texts() -> None:
    references = [["the cat sat"], ["a dog"]]
    assert [f(["", ""], references) for f in FUNCTIONS] == [0, 0, 0, 0, 0, 1]
    assert [f(["mat", "?"], references) for f in FUNCTIONS[:-1]] == [0, 0, 0, 0, 0]
    assert all(math.isfinite(f(["cat", ""], references)) for f in FUNCTIONS)
    assert nlg.cider(["the cat sat"], [["the cat sat"]]) == 0  # in one item no word is rare
    assert nlg.nist(["the cat"], [["the cat"]]) == pytest.approx(1.0)  # log2(2/1) twice over two, and then 0


def test_bleu_counts_are_clipped_as_in_the_paper() -> None:
    the = " ".join(["the"] * 7)
    found = Bleu().share(the, ["The cat is on the mat.", "There is a cat on the mat."])
    assert (found[0], found[4]) == (2, 7)


@pytest.mark.parametrize("seed", range(5))
def test_bleu_and_ter_are_sacrebleus(seed: int) -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.ter import TER

    hypotheses, references = corpus(seed=seed)
    expected = BLEU(lowercase=True).corpus_score(hypotheses, streams(references)).score
    assert nlg.bleu(hypotheses, references) == pytest.approx(expected)
    # references that are passed over would not have been the nearest
    expected = TER(normalized=True).corpus_score(hypotheses, streams(references)).score / 100
    assert nlg.ter(hypotheses, references) == pytest.approx(expected)


def test_ter_of_the_papers_example() -> None:
    reference = "Saudi Arabia denied this week information published in the American new york times"
    hypothesis = "this week the Saudis denied information published in the new york times"
    assert Ter().share(hypothesis, [reference]) == (4, 13)
    assert least_edits(hypothesis.lower().split(), reference.lower().split()) == 3


@pytest.mark.parametrize("seed", range(3))
def test_nist_with_single_references_is_nltks(seed: int) -> None:
    from nltk.translate.nist_score import corpus_nist

    hypotheses, references = corpus(items=20, most=1, seed=seed)
    expected = corpus_nist([[tokens(r) for r in item] for item in references], [tokens(h) for h in hypotheses])
    assert nlg.nist(hypotheses, references) == pytest.approx(expected)


def test_nist_by_hand() -> None:
    references = [["a b c d", "a a b"], ["c d"]]
    # nine words: a 3, b 2, c 2, d 2; pairs: ab 2, bc 1, cd 2, aa 1
    information = {"a": math.log2(9 / 3), "b": math.log2(9 / 2), "d": math.log2(9 / 2), "ab": math.log2(3 / 2)}
    # "a a b d": both a count, as the second reference has two; "d" is the first one's; pairs: aa and ab match
    matched = [2 * information["a"] + information["b"] + information["d"], math.log2(3 / 1) + information["ab"]]
    triples = math.log2(1 / 1)  # "a a b" follows "a a" always
    share = Nist(references).share("a a b d", references[0])
    assert share[:3] == pytest.approx([*matched, triples])
    assert share[5:10] == [4, 3, 2, 1, 0]
    assert share[10:] == [4, 3.5]
    # the second text is one word short of two: the penalty of five words for five and a half
    penalty = math.exp(math.log(0.5) * (math.log(5 / 5.5) / math.log(2 / 3)) ** 2)
    precisions = (matched[0] + information["d"]) / 5 + matched[1] / 3
    assert nlg.nist(["a a b d", "d"], references) == pytest.approx(penalty * precisions)


def test_meteor_by_hand() -> None:
    # "the cat runs" and "the dog runs" match in two words that are two chunks; "running" has the stem of "runs"
    f = (2 / 3) ** 2 / (0.9 * 2 / 3 + 0.1 * 2 / 3)
    expected = 100 * f * (1 - 0.5 * (2 / 2) ** 3)
    assert nlg.meteor_without_synonyms(["The cat runs!"], [["the dog, running"]]) == pytest.approx(expected)
    assert nlg.meteor_without_synonyms(["The cat runs"], [["nothing", "the dog running"]]) == pytest.approx(expected)


def test_meteor_with_synonyms() -> None:
    lemma = SimpleNamespace(name=lambda: "lynx")
    wordnet = SimpleNamespace(synsets=lambda word: [SimpleNamespace(lemmas=lambda: [lemma])] if word == "cat" else [])
    assert Meteor(wordnet).score("the cat", ["the lynx"]) == pytest.approx(1 - 0.5 / 2**3)
    assert Meteor(NoWordNet()).score("the cat", ["the lynx"]) == pytest.approx(0.5 * (1 - 0.5))


def test_meteors_are_never_mistaken_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    references, answers = {"1": ("the cat",), "2": ("a dog",)}, [("1", "the cat"), ("2", "the dog")]
    monkeypatch.setattr(nlg, "find_wordnet", lambda: None)
    with pytest.raises(DataError, match=r"python -m nltk\.downloader wordnet"):
        nlg.meteor(["a"], [["a"]])
    assert set(nlg.Scorer(references).scores(answers)) == {
        "bleu",
        "nist",
        "meteor_without_synonyms",
        "rouge_l",
        "cider",
        "ter",
    }
    monkeypatch.setattr(nlg, "find_wordnet", NoWordNet)
    assert "meteor" in nlg.Scorer(references).scores(answers)
    assert "meteor_without_synonyms" not in nlg.Scorer(references).scores(answers)
    assert nlg.meteor(["a"], [["a"]]) == 50


def test_common_subsequences_by_trying_all() -> None:
    draw = random.Random(0)
    for _ in range(30):
        a, b = (draw.choices("xyz", k=draw.randint(0, 7)) for _ in range(2))
        parts = [{c for n in range(len(t) + 1) for c in itertools.combinations(t, n)} for t in (a, b)]
        assert common_subsequence(a, b) == max(map(len, parts[0] & parts[1]))


def test_rouge_of_the_papers_example() -> None:
    reference = [["police killed the gunman"]]
    assert nlg.rouge_l(["police kill the gunman"], reference) == pytest.approx(75)
    assert nlg.rouge_l(["the gunman kill police"], reference) == pytest.approx(50)


def test_rouge_takes_the_best_precision_and_the_best_recall() -> None:
    # precision 2/3 from the first, recall 1/1 from the second
    expected = 100 * (1 + 1.44) * (2 / 3) * 1 / (1 + 1.44 * 2 / 3)
    assert nlg.rouge_l(["the cat ran"], [["the cat sat down", "ran"]]) == pytest.approx(expected)


def cider_by_loops(hypotheses: list[str], references: list[list[str]]) -> float:
    """CIDEr-D on dense vectors over all n-grams there are."""

    def grams(text: str, n: int) -> list[str]:
        found = [token for token in text.lower().split() if token not in ",."]
        return [" ".join(found[i : i + n]) for i in range(len(found) - n + 1)]

    total = 0.0
    for hypothesis, own in zip(hypotheses, references, strict=True):
        for n in (1, 2, 3, 4):
            names = sorted({g for text in [*hypotheses, *itertools.chain(*references)] for g in grams(text, n)})
            seen = [sum(any(g in grams(text, n) for text in item) for item in references) for g in names]
            weights = np.array([math.log(len(references) / max(1, count)) for count in seen])

            def vector(text: str, n: int = n, names: list[str] = names, weights: np.ndarray = weights) -> np.ndarray:
                counts = Counter(grams(text, n))
                return np.array([counts[g] for g in names]) * weights

            for reference in own:
                a, b = vector(hypothesis), vector(reference)
                gap = len(grams(hypothesis, 1)) - len(grams(reference, 1))
                norms = np.linalg.norm(a) * np.linalg.norm(b)
                if norms > 0:
                    likeness = np.minimum(a, b) @ b / norms * math.exp(-(gap**2) / 72)
                    total += 10 / 4 * likeness / len(own) / len(hypotheses)
    return total


@pytest.mark.parametrize("seed", range(3))
def test_cider_by_loops(seed: int) -> None:
    hypotheses, references = corpus(seed=seed)
    assert nlg.cider(hypotheses, references) == pytest.approx(cider_by_loops(hypotheses, references))


def test_cider_by_hand() -> None:
    metric = Cider([["red cat"], ["red dog"], ["blue dog"]])
    # "red" is in two items of three, "cat" in one; "red cat" in one
    red, cat = math.log(3 / 2), math.log(3)
    one = (red * red) / (math.hypot(red, math.log(3)) * math.hypot(red, cat))
    assert metric.score("red fox", ["red cat"]) == pytest.approx(one / 4)
    # twice the word does not count twice, and two words too many cost
    longer = math.exp(-1 / 72) * (red * red + cat * cat) / (math.hypot(2 * red, cat) * math.hypot(red, cat))
    pairs = math.exp(-1 / 72) * cat * cat / (math.hypot(math.log(3), cat) * cat)
    assert metric.score("red red cat", ["red cat"]) == pytest.approx((longer + pairs) / 4)


def test_the_scorer_agrees_with_the_functions() -> None:
    hypotheses, references = corpus(items=20)
    scorer = nlg.Scorer({str(i): item for i, item in enumerate(references)})
    found = scorer.scores([(str(i), text) for i, text in enumerate(hypotheses)])
    for function in (nlg.bleu, nlg.nist, nlg.rouge_l, nlg.cider, nlg.ter):
        assert found[function.__name__] == pytest.approx(function(hypotheses, references))


def test_a_resample_is_scored_from_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    hypotheses, references = corpus(items=20)
    scorer = nlg.Scorer({str(i): item for i, item in enumerate(references)})
    answers = [(str(i), text) for i, text in enumerate(hypotheses)]
    scorer.scores(answers)
    for metric in (Bleu, Nist, Meteor, Ter):
        monkeypatch.setattr(metric, "share", None)
    picks = random.Random(1).choices(range(20), k=20)
    found = scorer.scores([answers[i] for i in picks])
    monkeypatch.undo()
    drawn = [hypotheses[i] for i in picks], [references[i] for i in picks]
    for function in (nlg.bleu, nlg.rouge_l, nlg.ter):
        assert found[function.__name__] == pytest.approx(function(*drawn))
    # the weights of NIST and CIDEr stay those of all items
    nist = Nist(references)
    shares = [nist.share(*pair) for pair in zip(*drawn, strict=True)]
    assert found["nist"] == pytest.approx(nist.value([sum(column) for column in zip(*shares, strict=True)]))
    scores = [Cider(references).score(*pair) for pair in zip(*drawn, strict=True)]
    assert found["cider"] == pytest.approx(10 * np.mean(scores))
    # the same item may get another text
    assert scorer.scores([("0", references[0][0])])["ter"] == 0


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a"], [["b"], ["c"]])])
def test_texts_without_references_are_refused(function, texts, references) -> None:
    with pytest.raises(DataError, match="cannot be scored"):
        function(texts, references)


@pytest.mark.parametrize("function", [*FUNCTIONS, nlg.meteor])
@pytest.mark.parametrize(
    ("texts", "references", "problem"),
    [
        (["the cat"], ["the cat"], "the references of text 0 must be a list of texts, found the string 'the cat'"),
        (["a", "b"], [["a"], "b"], "the references of text 1 must be a list"),
        ("the", [["t"], ["h"], ["e"]], "the texts to score must be a list of texts, found the string 'the'"),
        (["a"], [[None]], "the references of text 0: expected a string, found None"),
        (["a"], [None], "the references of text 0 must be a list of texts, found None"),
        ([7], [["a"]], "the texts to score: expected a string, found 7"),
        (["a"], "a", "references must be a list of lists of texts, found the string 'a'"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(monkeypatch, function, texts, references, problem) -> None:
    monkeypatch.setattr(nlg, "find_wordnet", NoWordNet)
    with pytest.raises(DataError, match=problem):
        function(texts, references)


def test_a_scorer_refuses_references_that_are_none() -> None:
    with pytest.raises(DataError, match="item '2' cannot be scored: it has no references"):
        nlg.Scorer({"1": ("a",), "2": ()})
    with pytest.raises(DataError, match="the references of item '1' must be a list of texts, found the string 'a b'"):
        nlg.Scorer({"1": "a b"})


def test_a_scorer_refuses_answers_that_it_cannot_score() -> None:
    scorer = nlg.Scorer({"1": ("a",)})
    with pytest.raises(DataError, match="no texts to score"):
        scorer.scores([])
    with pytest.raises(DataError, match="item '2' has no references among the 1 items"):
        scorer.scores([("1", "a"), ("2", "a")])
    with pytest.raises(DataError, match="the answer to item '1': expected a string, found None"):
        scorer.scores([("1", None)])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nlg.require_libraries()
    monkeypatch.setattr(nlg.importlib.util, "find_spec", lambda name: None if name == "nltk" else name)
    with pytest.raises(DataError, match=r'scored with nltk.*pip install "\./packages/adapters\[nlg\]"'):
        nlg.require_libraries()

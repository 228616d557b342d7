from __future__ import annotations

import itertools
import random

import pytest

from pareto_adapters.nlg.ter import alignment, bit_places, candidates, edit_distance, edits, moved


def pair(draw: random.Random) -> tuple[list[str], list[str]]:
    """Two texts: unlike each other, or one a shuffled and edited form of the other."""
    words = [str(i) for i in range(draw.randint(1, 30))]
    reference = draw.choices(words, k=draw.randint(0, 22))
    if draw.random() < 0.4 or not reference:
        return draw.choices(words, k=draw.randint(0, 22)), reference
    text = list(reference)
    for _ in range(draw.randint(0, 4)):
        at = draw.randrange(len(text))
        text = draw.choice(
            [text[at:] + text[:at], [*text[:at], "new", *text[at:]], [*text[:at], "new", *text[at + 1 :]]]
        )
    return text, reference


def table_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's distance by its table, as in any textbook."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        changed = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
        table[i, j] = min(changed, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(a), len(b)]


@pytest.mark.parametrize("seed", range(10))
def test_edits_are_those_of_sacrebleu(seed: int) -> None:
    from sacrebleu.metrics.lib_ter import translation_edit_rate

    draw = random.Random(seed)
    for _ in range(60):
        text, reference = pair(draw)
        assert edits(text, reference) == translation_edit_rate(text, reference)[0]
        assert edit_distance(text, bit_places(reference), len(reference)) == table_distance(text, reference)


def test_distances_of_long_texts() -> None:
    draw = random.Random(0)
    text, reference = (draw.choices("abcdef", k=length) for length in (90, 150))
    assert edit_distance(text, bit_places(reference), 150) == table_distance(text, reference)


def test_a_shift_is_one_edit_whatever_its_length() -> None:
    reference = ["the", "cat", "sat", "on", "the", "mat", "today"]
    for text, count in (
        ("today the cat sat on the mat", 1),
        ("on the mat the cat sat today", 1),
        ("on the mat the dog sat today", 2),
        ("the cat sat on the mat today", 0),
    ):
        assert edits(text.split(), reference) == count


def test_empty_texts() -> None:
    assert (edits([], []), edits(["a", "b"], []), edits([], ["a", "b"])) == (0, 2, 2)


def test_the_search_ends_after_a_thousand_shifts() -> None:
    from sacrebleu.metrics.lib_ter import translation_edit_rate

    draw = random.Random(2)
    text, reference = (draw.choices("ab", k=40) for _ in range(2))
    found = list(candidates(text, reference))
    assert len(found) > 1000
    # none of them is made, although some would have paid
    assert min(table_distance(moved(text, *shift), reference) for shift in found[:50]) < table_distance(text, reference)
    assert edits(text, reference) == translation_edit_rate(text, reference)[0] == table_distance(text, reference)


def test_words_are_moved() -> None:
    words = list("abcdef")
    assert moved(words, 2, 3, 1) == list("adebcf")
    assert moved(words, 2, 0, 4) == list("cdabef")
    assert moved(words, 2, 1, 2) == list("adbcef")  # a place within the run: as many words further on
    for length, start, target in itertools.product((1, 2, 3), (0, 1, 2, 3), range(7)):
        assert sorted(moved(words, length, start, target)) == words


def test_alignments_by_hand() -> None:
    assert alignment(list("abc"), list("ac")) == ([0, 2], [False, True, False], [False, False])
    assert alignment(list("ac"), list("abc")) == ([0, 0, 1], [False, False], [False, True, False])
    assert alignment(list("a"), list("xa")) == ([-1, 0], [False], [True, False])
    assert alignment([], ["a"]) == ([-1], [], [True])
    # of three ways that cost 3 the one that pairs the last words: x with c and c with d
    assert alignment(list("abxc"), list("acd")) == ([0, 2, 3], [False, True, True, True], [False, True, True])

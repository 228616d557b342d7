"""The edits of a translation edit rate: insertions, deletions, substitutions, and shifts of runs of words.

M. Snover, B. Dorr, R. Schwartz, L. Micciulla, J. Makhoul, "A Study of Translation Edit Rate with Targeted Human
Annotation", 2006, https://aclanthology.org/2006.amta-papers.25. Shifts are sought greedily, under the conditions and
limits of TERcom as sacrebleu has them, so that the counts are sacrebleu's. It fills a table for each shift that it
tries, which takes minutes where an item has many references; here a distance costs a few operations on long integers
for each word (H. Hyyrö, "A Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit Distances", 2003). Its
tables leave out what lies 25 words off the diagonal: on texts that differ so much its count may be higher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

LONGEST_SHIFT, FARTHEST_SHIFT, MOST_CANDIDATES = 10, 50, 1000

#: how many words a shift moves, where they start, and before which word they go
Shift = tuple[int, int, int]


def edits(text: Sequence[str], reference: Sequence[str]) -> int:
    """Number of edits that turn ``text`` into ``reference``, a shift counting as one whatever its length."""
    places = bit_places(reference)
    words, shifts, tried = list(text), 0, 0
    distance = edit_distance(words, places, len(reference))
    while True:
        best: tuple[int, ...] = (0,)
        shifted = words
        for length, start, target in candidates(words, reference):
            tried += 1
            if tried >= MOST_CANDIDATES:
                return shifts + distance
            other = moved(words, length, start, target)
            rank = (distance - edit_distance(other, places, len(reference)), length, -start, -target)
            if rank > best:
                best, shifted = rank, other
        if best[0] <= 0:
            return shifts + distance
        words, shifts, distance = shifted, shifts + 1, distance - best[0]


def candidates(words: Sequence[str], reference: Sequence[str]) -> Iterator[Shift]:
    """Yield the shifts worth trying: of runs that the reference has and that neither side has right yet."""
    place, wrong, missed = alignment(words, reference)
    for start, there, length in common_runs(words, reference):
        if not any(wrong[start : start + length]) or not any(missed[there : there + length]):
            continue
        if start <= place[there] < start + length:
            continue
        last = -1
        for position in range(there - 1, min(there + length, len(reference))):
            target = 0 if position < 0 else place[position] + 1
            if target != last:
                yield length, start, target
            last = target


def common_runs(words: Sequence[str], reference: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yield start in ``words``, start in ``reference`` and length of each run of words that is in both."""
    for start in range(len(words)):
        for there in range(max(0, start - FARTHEST_SHIFT), min(len(reference), start + FARTHEST_SHIFT + 1)):
            if words[start] != reference[there]:
                continue
            length, longest = 0, min(LONGEST_SHIFT, len(words) - start, len(reference) - there)
            while length < longest and words[start + length] == reference[there + length]:
                length += 1
                yield start, there, length


def moved(words: list[str], length: int, start: int, target: int) -> list[str]:
    """Take ``length`` words from ``start`` out and put them before the word ``target``, or so much further on."""
    run, rest = words[start : start + length], words[:start] + words[start + length :]
    if target > start + length:
        target -= length
    return rest[:target] + run + rest[target:]


def alignment(words: Sequence[str], reference: Sequence[str]) -> tuple[list[int], list[bool], list[bool]]:
    """Align two texts by a cheapest sequence of edits, a pair of words before a lone one of ``words`` before another.

    Returns, for each word of the reference, the word that stands for it or the last one before its gap (-1: none);
    for each word of the text whether it is wrong; and for each word of the reference whether it is missed.
    """
    table = [list(range(len(reference) + 1))]
    for word in words:
        above, row = table[-1], [table[-1][0] + 1]
        for j, other in enumerate(reference):
            row.append(min(above[j] + (word != other), above[j + 1] + 1, row[j] + 1))
        table.append(row)
    place, wrong, missed = [-1] * len(reference), [True] * len(words), [True] * len(reference)
    i, j = len(words), len(reference)
    while i or j:
        same = bool(i and j) and words[i - 1] == reference[j - 1]
        if i and j and table[i][j] == table[i - 1][j - 1] + (not same):
            i, j = i - 1, j - 1
            place[j], wrong[i], missed[j] = i, not same, not same
        elif i and table[i][j] == table[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
            place[j] = i - 1
    return place, wrong, missed


def bit_places(reference: Sequence[str]) -> dict[str, int]:
    """For each word of a text the bits of the positions that hold it."""
    places: dict[str, int] = {}
    for position, word in enumerate(reference):
        places[word] = places.get(word, 0) | 1 << position
    return places


def edit_distance(words: Sequence[str], places: dict[str, int], size: int) -> int:
    """Edit distance of ``words`` to the text of ``size`` words whose :func:`bit_places` are given.

    Bit j of ``up`` and ``down`` says whether the column of the table rises or falls by one from row j to the next.
    """
    if not size:
        return len(words)
    full, last = (1 << size) - 1, 1 << (size - 1)
    up, down, distance = full, 0, size
    for word in words:
        here = places.get(word, 0)
        level = (((here & up) + up) ^ up) | here | down
        right, left = down | ~(level | up), level & up
        distance += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        up, down = (left | ~(level | right)) & full, right & level & full
    return distance

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest

from pareto_core import DataError, library
from pareto_core.library import (
    Function,
    corpus_hash,
    first_sentence,
    library_path,
    read_functions,
    split_functions,
)

SOURCE = '''
def add(a, b=1, *rest, key: int = 2, **more):
    """Add all the numbers. The rest
    is not said in the summary.
    """
    total = a + b  # a comment stays
    def inner(x):
        """Help the outer function out."""
        return x
    return inner(total)


def silent():
    return 1


class Shape:
    """A class is no function."""

    async def area(self):
        """
        Return the area, in squares of
        the unit of length.

        More.
        """

if True:
    def twice(): "Defined on one side only."
else:
    def twice(x): "Defined on the other side too."
'''


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for name, text in {
        "pkg/__init__.py": SOURCE,
        "pkg/test/test_pkg.py": 'def f():\n    """Tests are no part of it."""\n',
        "broken.py": 'def f(:\n    """Not Python, so nothing to read."""\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_extraction(tree: Path) -> None:
    found = {function.place: function for function in read_functions(tree)}
    assert list(found) == ["pkg.Shape.area", "pkg.add", "pkg.add.inner", "pkg.twice", "pkg.twice#2"]
    add = found["pkg.add"]
    assert add.signature == "pkg.add(a, b=1, *rest, key: int=2, **more)"
    assert add.summary == "Add all the numbers."
    assert add.docstring.endswith("is not said in the summary.")
    assert add.body.splitlines()[:2] == [
        "def add(a, b=1, *rest, key: int = 2, **more):",
        "    total = a + b  # a comment stays",
    ]
    assert '"""' not in add.body
    assert "Help" not in add.body
    assert found["pkg.add.inner"].body == "def inner(x):\n    return x"
    assert found["pkg.Shape.area"].summary == "Return the area, in squares of the unit of length."
    assert [found[place].signature for place in ("pkg.twice", "pkg.twice#2")] == ["pkg.twice()", "pkg.twice(x)"]
    assert found["pkg.twice#2"].name == "twice"


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return the x. And more.", "Return the x."),
        ("Two words", ""),
        ("Return e.g. the first one.", "Return e.g. the first one."),
        ("Is it there? Yes.", "Is it there?"),
        ("f(x) -> y\n\nReturn the y of x.", ""),
        ("a.b.f(x) returns what x is.", ""),
        (">>> f(1) is what a doctest says", ""),
        ("Say it\n  over two\tlines.\n\nSecond paragraph.", "Say it over two lines."),
        (" ".join(["word"] * 31), ""),
        ("", ""),
    ],
)
def test_first_sentences(docstring: str, summary: str) -> None:
    assert first_sentence(docstring) == summary


def test_the_cache_is_used_until_a_file_changes(tree: Path, tmp_path: Path) -> None:
    first = read_functions(tree)
    (path,) = (tmp_path / "cache" / "functions").iterdir()
    path.write_text(json.dumps([["kept", "", "", "", ""]]))
    assert read_functions(tree) == [Function("kept", "", "", "", "")]
    path.write_text("[[1]]")
    assert read_functions(tree) == first
    (tree / "more.py").write_text('def more():\n    """One more of them."""\n')
    assert [f.place for f in read_functions(tree)] == ["more.more", *(f.place for f in first)]
    assert corpus_hash(read_functions(tree)) != corpus_hash(first)


def test_no_functions_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no functions with a docstring"):
        read_functions(tmp_path)


def test_near_duplicates_stay_together() -> None:
    texts = ["Return the name of the file.", "Return the name of the files.", "Close every socket at once."]
    drawn = [Function(str(i), "", texts[i % 3], "", "") for i in range(30)]
    found = split_functions(drawn)
    assert sum(map(len, found.values())) == 30
    where = {f.summary: split for split, functions in found.items() for f in functions}
    assert where[texts[0]] == where[texts[1]]
    assert all(len({s for s, fs in found.items() if any(f.summary == t for f in fs)}) == 1 for t in texts)


def test_the_real_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARETO_CACHE")
    functions = read_functions(library_path())
    places = [function.place for function in functions]
    assert len(places) == len(set(places)) > 4000
    assert all(library.FEWEST_WORDS <= len(f.summary.split()) <= library.MOST_WORDS for f in functions)
    splits = split_functions(functions)
    shares = {split: len(found) / len(functions) for split, found in splits.items()}
    assert shares == {
        "train": pytest.approx(0.7, abs=0.05),
        "dev": pytest.approx(0.1, abs=0.03),
        "test": pytest.approx(0.2, abs=0.04),
    }
    # by brute force over a sample: no near-duplicates on two sides
    drawn = random.Random(0)
    sets = {split: [t for t in map(triples, [f.summary for f in found]) if t] for split, found in splits.items()}
    for one, two in itertools.combinations(sets, 2):
        left, right = drawn.sample(sets[one], 300), drawn.sample(sets[two], 300)
        assert max(len(a & b) / len(a | b) for a in left for b in right) < 0.5


def triples(text: str) -> set[tuple[str, str, str]]:
    words = re.findall("[a-z0-9]+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))

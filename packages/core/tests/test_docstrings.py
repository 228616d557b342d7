from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from pareto_core import DataError
from pareto_core.tasks import docstrings
from pareto_core.tasks.docstrings import Docstring, Docstrings, group_duplicates, read_corpus, split_of

LONG = "Return the number of parsed items, counted from the very beginning of the file."
NEAR = "Return the number of parsed items, counted from the very beginning of the stream."
OTHER = "Close every open socket and wait until the remote peer has gone away."


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    sources = {
        "alpha.py": f'"""{LONG}"""\n\nclass A:\n    """{OTHER} A."""\n\n    def f(self):\n        """Too short."""\n',
        "beta/__init__.py": f'if True:\n    async def g():\n        """{NEAR}"""\n',
        "beta/deep.py": f'def h():\n    x = 1\n    def inner():\n        """{OTHER} Inner."""\n',
        "beta/test/test_x.py": f'"""{LONG}"""\n',
        "site-packages/other.py": f'"""{LONG}"""\n',
        "broken.py": 'def f(:\n    """Not Python, so that nothing can be read from here."""\n',
    }
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


EXPECTED = [
    Docstring("alpha", "alpha", LONG),
    Docstring("alpha", "alpha.A", f"{OTHER} A."),
    Docstring("beta", "beta.deep.h.inner", f"{OTHER} Inner."),
    Docstring("beta", "beta.g", NEAR),
]


def test_extraction(tree: Path) -> None:
    assert read_corpus(tree) == EXPECTED


def test_the_cache_is_used_until_a_file_changes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_corpus(tree)
    parsed: list[Path] = []
    real = docstrings._docstrings
    monkeypatch.setattr(docstrings, "_docstrings", lambda path, root: [parsed.append(path), *real(path, root)][1:])
    assert read_corpus(tree) == first
    assert parsed == []
    (tree / "alpha.py").write_text(f'"""{LONG} Changed."""\n')
    changed = read_corpus(tree)
    assert parsed
    assert f"{LONG} Changed." in [d.text for d in changed]


@pytest.mark.parametrize("content", ["", "{", "[[1]]", '"text"', "5", '[["a", "b", "c", "d"]]'])
def test_a_corrupted_cache_is_read_again(tree: Path, tmp_path: Path, content: str) -> None:
    first = read_corpus(tree)
    (path,) = (tmp_path / "cache" / "docstrings").iterdir()
    path.write_text(content)
    assert read_corpus(tree) == first
    assert len(json.loads(path.read_text())) == len(first)


def test_the_hash_follows_the_text(tree: Path) -> None:
    first = Docstrings(data=str(tree)).data_revision()
    assert Docstrings(data=str(tree)).data_revision() == first
    (tree / "alpha.py").write_text(f'"""{LONG} Changed."""\n')
    second = Docstrings(data=str(tree)).data_revision()
    assert second["sha256"] != first["sha256"]
    assert second["backbone"] == "minilm"
    (tree / "beta" / "test" / "test_x.py").write_text('"""What is excluded does not count, however long it is."""\n')
    assert Docstrings(data=str(tree)).data_revision() == second


def test_labels_and_splits_of_a_small_tree(tree: Path) -> None:
    task = Docstrings(data=str(tree))
    assert task.labels == ("alpha", "beta")
    items = {split: task.examples(split) for split in ("train", "dev", "test")}
    assert sum(map(len, items.values())) == 4
    where = {e.texts[0]: split for split, found in items.items() for e in found}
    assert where[LONG] == where[NEAR] == split_of(LONG)
    assert where[f"{OTHER} A."] == where[f"{OTHER} Inner."] == split_of(f"{OTHER} A.")


def test_near_duplicates_by_hand() -> None:
    # word triples: 12 each of LONG and NEAR, 11 shared: 11 / 13
    assert group_duplicates([OTHER, LONG, "something else entirely here", NEAR, LONG]) == [0, 1, 2, 1, 1]
    # a b c d and a b c e share one triple of three: 1/3 is too few; a b c d e and b c d e f share two of four
    assert group_duplicates(["a b c d", "a b c e"]) == [0, 1]
    assert group_duplicates(["a b c d e", "b c d e f"]) == [0, 0]
    # chains: the first and the third have nothing in common but the second
    assert group_duplicates(["a b c d e", "c d e f g", "b c d e f"]) == [0, 0, 0]
    assert group_duplicates(["one two", "two one", "One, two!"]) == [0, 1, 0]
    assert group_duplicates(["x y z"] * 60) == [0] * 60


def test_split_shares() -> None:
    counts = Counter(split_of(str(i)) for i in range(10_000))
    # binomial: 5 standard deviations are 0.023, 0.015 and 0.02
    assert counts["train"] / 10_000 == pytest.approx(0.7, abs=0.023)
    assert counts["dev"] / 10_000 == pytest.approx(0.1, abs=0.015)
    assert counts["test"] / 10_000 == pytest.approx(0.2, abs=0.02)


def test_trees_that_are_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no docstrings of 30 characters or more"):
        read_corpus(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.py").write_text(f'"""{LONG}"""\n')
    with pytest.raises(DataError, match="fewer than two modules"):
        Docstrings(data=str(tmp_path)).labels  # noqa: B018


def triples(text: str) -> set[tuple[str, ...]]:
    words = re.findall("[a-z0-9]+", text.lower())
    return set(itertools.pairwise(itertools.pairwise(words)))  # type: ignore[arg-type]


def test_the_real_library() -> None:
    task = Docstrings()
    assert len(task.labels) == len(set(task.labels)) == 20
    items = {split: task.split(split) for split in ("train", "dev", "test")}
    names = [e.id for found in items.values() for e in found]
    assert len(names) == len(set(names)) > 3000
    assert {e.label for e in items["test"]} == set(task.labels)
    texts = {split: [e.texts[0] for e in found] for split, found in items.items()}
    assert not set(texts["train"]) & set(texts["test"])
    # by brute force over a sample: no near-duplicates on two sides
    drawn = random.Random(0)
    sets = {split: [found for found in map(triples, texts[split]) if found] for split in texts}
    for one, two in itertools.combinations(sets, 2):
        left, right = drawn.sample(sets[one], 300), drawn.sample(sets[two], 300)
        assert max(len(a & b) / len(a | b) for a in left for b in right) < 0.5
    # nothing but modules that exist, each found under its own name
    assert all(e.id.split(".")[0] == str(e.label) for found in items.values() for e in found)

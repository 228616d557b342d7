"""The functions of CPython's library: real code and prose that is on every machine.

Read from the running interpreter's own sources with ``ast`` (nothing is imported): each function that has a docstring,
with its signature, the first sentence of its docstring, and its body without any docstring. Functions whose first
sentences are copies of each other but for a few words stay in one split, by the rules of
:mod:`pareto_core.tasks.docstrings`.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import hashlib
import json
import platform
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from pareto_core.cache import cache_directory, write_json
from pareto_core.errors import DataError
from pareto_core.task import Split
from pareto_core.tasks.docstrings import EXCLUDED, group_duplicates, split_of

#: words that a first sentence has at least and at most: shorter ones say nothing, longer ones are no summaries
FEWEST_WORDS, MOST_WORDS = 3, 30


@dataclasses.dataclass(frozen=True)
class Function:
    """A documented function: where it stands (``json.encoder.JSONEncoder.default``) and what it says."""

    place: str
    arguments: str
    summary: str
    docstring: str
    body: str

    @property
    def signature(self) -> str:
        """The place and the arguments, ``json.encoder.JSONEncoder.default(self, o)``."""
        return f"{self.place.partition('#')[0]}({self.arguments})"

    @property
    def name(self) -> str:
        """The function's own name, without module and class."""
        return self.place.partition("#")[0].rpartition(".")[2]


def library_path() -> Path:
    """Directory of the running interpreter's library."""
    return Path(sysconfig.get_path("stdlib"))


def read_functions(root: Path) -> list[Function]:
    """Read every function with a summary under ``root``, sorted by place; cached until a file changes.

    Functions of one place (defined twice, under different conditions) are told apart by ``#2``, ``#3``, …
    Raises :class:`DataError` where there is none.
    """
    files = [path for path in sorted(root.rglob("*.py")) if not EXCLUDED & set(path.relative_to(root).parts)]
    state = "".join(f"{p.relative_to(root)} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in files)
    key = hashlib.sha256((platform.python_version() + str(root) + state).encode()).hexdigest()[:16]
    path = cache_directory() / "functions" / f"{key}.json"
    if path.is_file():
        try:
            return [Function(*row) for row in json.loads(path.read_text())]
        except (ValueError, TypeError):
            path.unlink()
    found = _numbered(sorted((f for file in files for f in _functions(file, root)), key=dataclasses.astuple))
    if not found:
        raise DataError(f"no functions with a docstring in the Python files under {root}")
    write_json(path, [dataclasses.astuple(function) for function in found])
    return found


def split_functions(functions: list[Function]) -> dict[Split, list[Function]]:
    """Put each function into ``train`` (about 70 %), ``dev`` (10 %) or ``test`` (20 %), the order kept."""
    found: dict[Split, list[Function]] = {"train": [], "dev": [], "test": []}
    groups = group_duplicates([function.summary for function in functions])
    for function, group in zip(functions, groups, strict=True):
        found[split_of(functions[group].summary)].append(function)
    return found


def corpus_hash(functions: list[Function]) -> str:
    """Return the sha256 of all that was read: results over different ones are not compared."""
    return hashlib.sha256(json.dumps([dataclasses.astuple(f) for f in functions]).encode()).hexdigest()


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph on one line; empty where that is no summary.

    Call forms (``f(x) -> y``), doctests and sentences of fewer than 3 or more than 30 words are none.
    """
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"(])", paragraph, maxsplit=1)[0]
    is_call = re.match(r"[\w.]+\(|>>>", sentence) is not None
    return sentence if not is_call and FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS else ""


def _functions(path: Path, root: Path) -> Iterator[Function]:
    source = path.read_bytes()
    try:
        tree, lines = ast.parse(source), source.decode().split("\n")
    except (SyntaxError, ValueError):
        return
    pending: list[tuple[str, ast.AST]] = [(_module(path.relative_to(root)), tree)]
    while pending:
        place, node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node) or ""
            summary = first_sentence(docstring)
            if summary:
                yield Function(place, ast.unparse(node.args), summary, docstring, _body(node, lines))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                name = getattr(child, "name", None)
                pending.append((f"{place}.{name}" if name else place, child))


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function's source without docstrings, its own and those of what it defines."""
    texts = [node for node in ast.walk(function) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    dropped = {line for text in texts for line in range(text.lineno, (text.end_lineno or text.lineno) + 1)}
    kept = range(function.lineno, (function.end_lineno or function.lineno) + 1)
    return textwrap.dedent("\n".join(lines[number - 1] for number in kept if number not in dropped))


def _numbered(functions: list[Function]) -> list[Function]:
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for function in functions:
        seen[function.place] += 1
        times = seen[function.place]
        found.append(function if times == 1 else dataclasses.replace(function, place=f"{function.place}#{times}"))
    return found

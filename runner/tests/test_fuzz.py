"""Files that nobody wrote on purpose: whatever a benchmark file or a journal holds, the answer is data or a message.

Real files are cut, flipped and shuffled byte by byte, and their values replaced, renamed and swapped at any depth;
other files are made up from what the formats allow. In the suite about a thousand of them run, the same each time. The
whole is ten thousand, new ones at each run::

    PARETO_FUZZ=10000 pytest runner/tests/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import math
import os
import runpy
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pareto_core import ParetoError, Result, RunSpec
from pareto_runner import discover
from pareto_runner.benchfile import Choices, cases, read
from pareto_runner.journal import Journal, latest
from pareto_runner.machine import packages_of
from pareto_runner.plan import Past
from pareto_runner.questions import headline, infos
from pareto_runner.report import terminal_table, write_report

TOTAL = int(os.environ.get("PARETO_FUZZ", "1000"))
HERE = Path(__file__).parent
TINY = runpy.run_path(str(HERE / "conftest.py"))["TINY"].encode()
FILES = [TINY, TINY, *(path.read_bytes() for path in sorted((HERE.parents[1] / "benchmarks").glob("*/*.toml")))]
TABLES = [tomllib.loads(content.decode()) for content in FILES]
SAMPLES = runpy.run_path(str(HERE / "samples.py"))
RESULTS = [
    SAMPLES["ok"]("KronA (24, 16)").to_json(),
    SAMPLES["ok"]("Full fine-tuning", 2).to_json(),
    SAMPLES["failed"]("LoRA r=1", "was killed by SIGKILL").to_json(),
]
for result in RESULTS:
    result["context"] |= {"seconds": 41.5, "lock": "0a1b", "code": "2c3d"}
    result["curve"] = result["curve"][:6]


def share(part: float) -> settings:
    """Settings for a part of the examples. Each needs milliseconds; ten seconds are a hang, on a busy machine too."""
    return settings(
        max_examples=max(1, round(TOTAL * part)),
        deadline=datetime.timedelta(seconds=10),
        derandomize="PARETO_FUZZ" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what methods and tasks need, which takes seconds, once."""
    for name in discover.available(discover.METHODS):
        discover.method_class(name)
    for name in discover.available(discover.TASKS):
        discover.task_class(name)


def json_file(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def nested(depth: int, table: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"k": value} if table else [value]
    return value


TEXTS = [
    "",
    " ",
    "a\nb\tc",
    "\x1b[31m\x00",
    "[/red][bold]",
    "<script>alert(1)</script>",
    "{{ 7*7 }}",
    "|`*_\\",
    "\u202e\U0001f600é",
    "x" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "nan",
    "full",
    "krona",
    "core.tiny",
    "core.glue",
    "backbone",
    "smoke",
    "accuracy",
    "latency_ms.batch1",
]
WHOLE = [0, 1, -1, 3, 2**31, 2**63 - 1, -(2**63), 2**63, 10**300]
FRACTIONS = [0.0, -0.0, 0.1, -2.5, 1e-320, 1e308, -1e308]
NOT_FINITE = [math.nan, math.inf, -math.inf]
TREES = [[], {}, [[]], [1, "a", []], {"": 1}, list(range(1000)), nested(30, True), nested(60, False), nested(200, True)]
SURROGATES = ["\ud800", "a\udcff"]
ALIKE = {bool: [True, False], int: WHOLE, float: FRACTIONS, str: TEXTS}

odd = st.sampled_from([*TEXTS, *WHOLE, *FRACTIONS, *NOT_FINITE, *TREES, True, False]) | st.text(max_size=20)
dates = st.sampled_from([datetime.date(2024, 2, 29), datetime.time(12, 30), datetime.datetime(2024, 2, 29, 12, 30)])
for_toml = odd | dates
for_json = odd | st.none() | st.sampled_from(SURROGATES)


@st.composite
def damaged_bytes(draw: st.DrawFn, kind: str) -> bytes:
    """A benchmark file or a result with a few faults that know nothing of its format."""
    sources = {"toml": FILES, "json": [json_file(tree) for tree in RESULTS]}
    content = draw(st.sampled_from(sources[kind]))
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.integers(0, len(content))) for _ in range(2))
        lines = content.split(b"\n")
        line = draw(st.integers(0, len(lines) - 1))
        fault = draw(st.sampled_from(["flip", "cut", "remove", "insert", "drop line", "double line"]))
        if fault == "flip":
            bit = 1 << draw(st.integers(0, 7))
            content = content[:start] + bytes(byte ^ bit for byte in content[start : start + 1]) + content[start + 1 :]
        elif fault == "cut":
            content = content[:end]
        elif fault == "remove":
            content = content[:start] + content[end:]
        elif fault == "insert":
            pieces = [content[start:end], b"\xff", b"\0", b"[", b'"', b"9" * 5000, b"\n", b"a." * 99]
            content = content[:start] + draw(st.sampled_from(pieces)) + content[start:]
        else:
            again = lines[line : line + 1] if fault == "double line" else []
            content = b"\n".join([*lines[:line], *again, *again, *lines[line + 1 :]])
    return content


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all that a tree holds; of long lists only the beginning."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree[:5]) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def damaged_tree(draw: st.DrawFn, kind: str) -> Any:
    """What such a file holds, with a few values replaced, removed, renamed, doubled or put in the place of others."""
    sources, values = {"toml": (TABLES, for_toml), "json": (RESULTS, for_json)}[kind]
    tree = copy.deepcopy(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(1, 4))):
        known = list(places(tree))
        if not known:
            break
        *above, key = draw(st.sampled_from(known))
        holder = at(tree, tuple(above))
        value = holder[key]
        fault = draw(st.sampled_from(["replace", "alike", "alike", "swap", "remove", "rename", "double"]))
        if fault == "replace":
            holder[key] = copy.deepcopy(draw(values))
        elif fault == "alike":
            holder[key] = draw(st.sampled_from(ALIKE.get(type(value), [value])))
        elif fault == "swap":
            holder[key] = copy.deepcopy(at(tree, draw(st.sampled_from(known))))
        elif fault == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(value))
        else:
            holder[draw(st.sampled_from(TEXTS) | st.text(max_size=8))] = copy.deepcopy(value)
            if fault == "rename":
                del holder[key]
    return tree


def toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(key))} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value) + '"'
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else str(value).lower()


def toml_file(tree: dict[str, Any]) -> bytes:
    return "\n".join(f"{toml(str(key))} = {toml(value)}" for key, value in tree.items()).encode()


def mostly(likely: Any) -> st.SearchStrategy[Any]:
    """What belongs in a place, and at times anything."""
    usual = likely if isinstance(likely, st.SearchStrategy) else st.sampled_from(likely)
    return st.integers(0, 39).flatmap(lambda dice: usual if dice != 7 else for_toml)


def tables(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    def odds(of: dict[str, Any]) -> dict[str, st.SearchStrategy[Any]]:
        return {key: mostly(likely) for key, likely in of.items()}

    return st.fixed_dictionaries(odds(required), optional=odds(optional))


trainings = tables({}, {"batch_size": [8, 16], "max_steps": [1, 5], "epochs": [0.5, 2], "learning_rate": [0.1]})
methods = tables({"method": ["full", "krona", "bitfit"]}, {"a_shape": [[8, 6], [0, 1]], "target_modules": [["q"]]})
stage = tables({"methods": st.lists(methods, min_size=1, max_size=2)}, {"teacher": ["backbone"], "training": trainings})
variants = tables(
    {"name": ["A", "B", "C"], "stages": st.lists(st.lists(methods, min_size=1, max_size=2) | stage, min_size=1)},
    {"training": trainings, "compare_with": [["A"], ["B"]], "engine": [{"name": "torch"}, {"zero_stage": 3}]},
)
tasks = tables({"name": ["core.tiny", "core.docstrings"]}, {"length": [12], "data": ["/dev/zero"]})
settings_of_runs = {
    "task": tasks,
    "training": trainings,
    "seeds": st.sets(st.integers(0, 9), min_size=1).map(list),
    "measure_seconds": [1],
}
questions = tables(
    {
        "title": ["T"],
        "task": tasks,
        "variants": st.lists(variants, min_size=1, max_size=3),
        "profiles": st.dictionaries(
            st.sampled_from(["smoke", "full", *TEXTS[-3:]]), tables({}, settings_of_runs), min_size=1, max_size=2
        ),
    },
    {"baseline": ["A"], "training": trainings, "engine": [{"precision": "bf16"}], "flagship": [True]},
)


def check_benchmark(content: bytes) -> None:
    """Read a file as ``pareto list`` and ``pareto bench`` do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "q.toml"
        path.write_bytes(content)
        title, names = headline(path)
        assert all(isinstance(text, str) for text in (title, *names))
        problem = None
        try:
            question = read(path)
        except ParetoError as error:
            problem = str(error)
        if problem is not None:
            assert problem.startswith(f"{path}: ")
            assert problem.isprintable()
            assert len(problem) < 1200
            return
        assert infos(question)
        for profile in question.content.profiles:
            for _, specs in cases(question, Choices(profile=profile, seeds=(0, 1))):
                for spec in specs:
                    assert RunSpec.from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False))) == spec
                    assert packages_of(spec)


@share(0.2)
@given(damaged_bytes("toml"))
def test_benchmark_files_with_faulty_bytes(content: bytes) -> None:
    check_benchmark(content)


@share(0.2)
@given(damaged_tree("toml"))
def test_benchmark_files_with_faulty_values(tree: dict[str, Any]) -> None:
    check_benchmark(toml_file(tree))


@share(0.1)
@given(questions)
def test_benchmark_files_that_are_made_up(tree: Any) -> None:
    check_benchmark(toml_file(tree) if isinstance(tree, dict) else toml(tree).encode())


def check_journal(*contents: bytes) -> list[Result]:
    """Read a journal, write its results to another, and return them."""
    with tempfile.TemporaryDirectory() as folder:
        journal, other = Journal(Path(folder) / "a"), Journal(Path(folder) / "b")
        journal.directory.mkdir()
        for number, content in enumerate(contents, 1):
            (journal.directory / f"{number:06d}-x.json").write_bytes(content)
        entries, damaged = journal.entries(), journal.damaged()
        assert len(entries) + len(damaged) == len(contents)
        assert all(item.reason for item in damaged)
        results = [entry.result for entry in entries]
        for result in results:
            assert other.write(result).parent == other.directory
        assert other.read() == results
        assert Past(entries)
        return latest(results)


@share(0.2)
@given(st.lists(damaged_bytes("json") | st.binary(max_size=50), min_size=1, max_size=3))
def test_journals_with_faulty_bytes(contents: list[bytes]) -> None:
    check_journal(*contents)


@share(0.28)
@given(damaged_tree("json"))
def test_journals_with_faulty_values(tree: Any) -> None:
    check_journal(json_file(tree))
    with contextlib.suppress(ParetoError):
        result = Result.from_json(tree)
        assert Result.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))) == result


@share(0.02)
@given(st.lists(damaged_tree("json") | st.sampled_from(RESULTS), min_size=1, max_size=6))
def test_reports_over_odd_results(trees: list[Any]) -> None:
    results = check_journal(*map(json_file, [*trees, RESULTS[2]]))
    with tempfile.TemporaryDirectory() as folder:
        assert write_report(results, {}, Path(folder)).is_file()
    assert terminal_table(results).columns


def test_depth_and_length_are_no_way_to_a_traceback() -> None:
    long = [b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5, json_file({"machine": nested(300, True)}), b""]
    assert check_journal(*long) == []
    for content in (*long, b"a" + b".a" * 3000 + b"=1", b"a=" + b"[" * 10**5, b"[[a]]\n" * 10**4, b'"' * 10**5):
        check_benchmark(content)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pareto_adapters.tasks.dart import Dart, linearise, read_json, read_xml
from pareto_core import DataError

TRIPLES = [["Alan Bean", "OCCUPATION", "Test pilot"], ["Alan Bean", "BIRTH_PLACE", "Wheeler, Texas"]]
WRITTEN = "Alan Bean : occupation : Test pilot | Alan Bean : birth_place : Wheeler, Texas"
HEAD = "<?xml version='1.0' encoding='utf-8'?>\n"


def entry(triples: Any = TRIPLES, texts: tuple[str, ...] = ("Alan Bean was a pilot.",)) -> dict[str, Any]:
    return {
        "tripleset": triples,
        "subtree_was_extended": False,
        "annotations": [{"source": "WikiSQL_decl_sents", "text": text} for text in texts],
    }


def xml(*entries: tuple[list[str], list[str]], head: str = HEAD) -> str:
    inside = "".join(
        f'<entry category="MISC" eid="Id{i}" size="{len(triples)}"><modifiedtripleset>'
        + "".join(f"<mtriple>{t}</mtriple>" for t in triples)
        + "</modifiedtripleset>"
        + "".join(f'<lex comment="good" lid="Id1">{t}</lex>' for t in texts)
        + "</entry>\r\n"
        for i, (triples, texts) in enumerate(entries, 1)
    )
    return f"{head}<benchmark><entries>{inside}</entries></benchmark>"


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The three files; the test set in XML alone."""
    folder = tmp_path / "dart"
    folder.mkdir()
    other = [["Rome", "COUNTRY", "Italy"]]
    write(folder / "dart-v1.1.1-full-train.json", [entry(texts=("One.", "Two.")), entry(other)])
    write(folder / "dart-v1.1.1-full-dev.json", [entry(), entry(other), entry(texts=("Bean, a pilot.",))])
    triples = ["Rome | COUNTRY | Italy", "[TABLECONTEXT] | [TITLE] | Cities &amp; towns"]
    write(
        folder / "dart-v1.1.1-full-test.xml",
        xml((triples, ["Rome lies in Italy.", " "]), (triples[:1], ["Rome is Italian."])),
    )
    return tmp_path


def test_splits(data: Path) -> None:
    task = Dart(data=str(data))
    train, dev, test = (task.split(split) for split in ("train", "dev", "test"))
    assert [(item.prompt, item.references) for item in train[:2]] == [
        (f"{WRITTEN}\nDescription:", ("One.",)),
        (f"{WRITTEN}\nDescription:", ("Two.",)),
    ]
    assert len(train) == 3
    # equal triples are one item, although they stand in two entries
    assert [item.references for item in dev] == [
        ("Alan Bean was a pilot.", "Bean, a pilot."),
        ("Alan Bean was a pilot.",),
    ]
    assert test[0].prompt.startswith("Rome : country : Italy | [TABLECONTEXT] : [title] : Cities & towns\n")
    assert [item.references for item in test] == [("Rome lies in Italy.",), ("Rome is Italian.",)]


def test_the_test_file_in_json_is_read_first(data: Path) -> None:
    write(data / "dart" / "dart-v1.1.1-full-test.json", [entry()])
    assert [item.prompt for item in Dart(data=str(data)).split("test")] == [f"{WRITTEN}\nDescription:"]


def test_json_and_xml_say_the_same(tmp_path: Path) -> None:
    lines = [" | ".join(triple) for triple in TRIPLES]
    a = read_json(write(tmp_path / "a.json", [entry()]))
    b = read_xml(write(tmp_path / "b.xml", xml((lines, ["Alan Bean was a pilot."]))))
    assert list(a) == list(b) == [([tuple(t) for t in TRIPLES], ["Alan Bean was a pilot."])]
    assert linearise([("A", "IS_A", "B")]) == "A : is_a : B"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "expected a list of entries"),
        ({"tripleset": []}, "expected a list of entries"),
        ([entry(), entry([["a", "b"]])], r"entry 1: not a tripleset with annotations.*\['a', 'b'\] is not a triple"),
        ([entry([["a", "b", 3]])], "entry 0: .*3 is not a text"),
        ([entry(["abc"])], "entry 0: .*'abc' is not a triple"),
        ([entry([])], "entry 0: has no triple"),
        ([entry(texts=())], "entry 0: has no text"),
        ([{"tripleset": TRIPLES}], "entry 0: .*annotations"),
        ([{"tripleset": TRIPLES, "annotations": [{"text": None}]}], "entry 0: .*None is not a text"),
        (["entry"], "entry 0: not a tripleset"),
    ],
)
def test_malformed_json_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "dev.json", content)
    with pytest.raises(DataError, match=rf"dev\.json.*{message}"):
        list(read_json(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<benchmark>", "not XML"),
        ("", "not XML"),
        (HEAD + "<benchmark/>", "expected entries/entry"),
        (xml((["a | b"], ["A b."])), r"entry Id1: \['a', 'b'\] is not a triple"),
        (xml((["a | b | c"], ["A."]), (["a | b | c"], [])), "entry Id2: has no text"),
        (xml(([], ["A."])), "entry Id1: has no triple"),
    ],
)
def test_malformed_xml_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "test.xml", content)
    with pytest.raises(DataError, match=rf"test\.xml.*{message}"):
        list(read_xml(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_are_refused_whatever_the_encoding(tmp_path: Path, encoding: str) -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
    path = tmp_path / "test.xml"
    path.write_bytes(xml((["a | b | c"], ["&b;"]), head=bomb).encode(encoding))
    with pytest.raises(DataError, match=r"test\.xml: declares a document type"):
        list(read_xml(path))


def test_the_example_is_written_like_a_prompt(data: Path) -> None:
    prompt = Dart(data=str(data)).one_shot_prompt
    assert prompt.count("\nDescription: ") == 1
    assert prompt.endswith("\n\n")
    assert " : occupation : " in prompt


def test_where_to_get_the_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DART: no dart-v1\.1\.1-full-test\.json or dart-v1\.1\.1-full-test\.xml in"):
        Dart(data=str(tmp_path)).split("test")

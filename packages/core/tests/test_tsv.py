from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pareto_core import DataError
from pareto_core.tasks.tsv import is_quoted, read_tsv, split_quoted


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("a\tb\nx\ty\n", False),
        ('a\tb\nHe said "no" .\ty\n', False),
        ('a\tb\n"Never" , he said .\ty\n', False),
        ('a\tb\n"He said ""no"" ."\ty\n', True),
        ('a\tb\n"He said ""no"" ."\ty\nIt is 5" long\tz\n', False),
        ('a\tb\n"Never."\ty\n', False),  # fits both: without evidence the quotes belong to the text
        ('"a"\t"b"\n"Never."\t"y"\n', True),
        ('a\tb\n"with a\ttab"\ty\n', True),
        ('a\tb\n"two\nlines"\ty\n', True),
        ('a\tb\n"opens\tx\ncloses"\ty\n', False),  # rows of two columns as they stand
        ('a\tb\n"opens and never closes\ty\n', False),
    ],
)
def test_quoting_is_told_from_the_text(text: str, quoted: bool) -> None:
    assert is_quoted(text) is quoted


cells = st.text(st.sampled_from('ab "\t\n,'), min_size=1, max_size=6).filter(str.strip)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5))
def test_what_csv_writes_with_all_quotes_comes_back(rows: list[tuple[str, str]]) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    assert is_quoted(out.getvalue())
    assert split_quoted(out.getvalue())[0] == [["a", "b"], *map(list, rows)]


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes('\ufeffa\tb\r\n"q ""x"""\ty\r\n\r\n"two\nlines"\tz\r\nlast\tw'.encode())
    table = read_tsv(path)
    assert table.columns == ("a", "b")
    assert table.rows == [['q "x"', "y"], ["two\nlines", "z"], ["last", "w"]]
    assert table.lines == [2, 5, 6]
    path.write_text('a\tb\nx "y\tz\n\n"q"\tw\n')
    table = read_tsv(path)
    assert table.rows == [['x "y', "z"], ['"q"', "w"]]
    assert table.lines == [2, 4]


def test_headerless(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("s\t1\t\tGreen ideas sleep .\n")
    assert read_tsv(path, headerless=("source", "label", "mark", "sentence")).rows[0][3] == "Green ideas sleep ."
    path.write_text("sentence\tlabel\nGreen ideas sleep .\t1\n")
    assert read_tsv(path, headerless=("source", "label", "mark", "sentence")).columns == ("sentence", "label")


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    for content in (b"", b"\n\n"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.tsv: the file is empty"):
            read_tsv(path)
    path.write_bytes(b"a\tb\nx\xff\ty\n")
    with pytest.raises(DataError, match=r"x\.tsv: not UTF-8 text at byte 5"):
        read_tsv(path)

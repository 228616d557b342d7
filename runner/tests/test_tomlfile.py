"""TOML from anybody: a table, or a line that names the file and what is wrong; never a wait or a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pareto_runner.tomlfile import BYTES, BenchmarkFileError, load


def test_a_file_is_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "q.toml"
    path.write_bytes(b"[a.'b c'.\"d.e\"]\r\nx = [1, 9223372036854775807]\r\ntext = 'a.b. c . d'\r\n")
    assert load(path) == {"a": {"b c": {"d.e": {"x": [1, 2**63 - 1], "text": "a.b. c . d"}}}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"[" * 5000, "is not TOML"),
        (b"a = " + b"9" * 5000, "is not TOML.*4300 digits"),
        (b"a = [1, 0x" + b"f" * 5000 + b"]", r"a\[1\]: an integer goes from -2\^63"),
        (b"a = [1, -9223372036854775809]", r"a\[1\]: an integer goes from -2\^63"),
        (b"a = " + b"[" * 40 + b"]" * 40, "nested more than 32 levels"),
        (b"a" + b".a" * 100_000 + b" = 1", "nested more than 32 levels"),
        (b"['a']\n" + b'"a b" . ' * 30_000 + b"a = 1", "nested more than 32 levels"),
        (b"[" + b'\'\\\'."a\\"".' * 15_000 + b"a]", "nested more than 32 levels"),
        (b"#" * (BYTES + 1), "longer than 262144 bytes"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_cannot_be_read_is_said(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "q.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchmarkFileError, match=words):
        load(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path, tmp_path / "pipe.toml", Path("/dev/zero")):
        with pytest.raises(BenchmarkFileError, match="is not a file"):
            load(path)


def test_messages_are_short_lines_without_control_characters() -> None:
    message = str(BenchmarkFileError(Path("q.toml"), "a\x1b[31m\nb", "no such key\u2028" * 300))
    assert message.startswith(r"q.toml: a\x1b[31m\nb: no such key\u2028no such")
    assert message.isprintable()
    assert len(message) < 1020

"""Tab-separated tables as people distribute them: with CSV's quoting, or with no quoting at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path

from pareto_core.errors import DataError


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text as they stand in a source; ``lines[i]`` is where ``rows[i]`` ends."""

    source: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def column(self, names: Sequence[str], why: str = "") -> int:
        """Return the position of the first of ``names`` that there is, whatever its case."""
        lower = [column.strip().lower() for column in self.columns]
        for name in names:
            if name.lower() in lower:
                return lower.index(name.lower())
        wanted = " or ".join(map(repr, names))
        raise DataError(f"{self.source}: no column {wanted} among {', '.join(map(repr, self.columns))}{why}")


def read_tsv(path: Path, headerless: tuple[str, ...] | None = None) -> Table:
    """Read a TSV file, quoted or not; ``headerless`` names the columns of a file whose first line has none of them."""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}") from error
    rows, lines = split_quoted(text) if is_quoted(text) else split_plain(text)
    if not rows:
        raise DataError(f"{path}: the file is empty; expected tab-separated columns")
    first = {field.strip().lower() for field in rows[0]}
    if headerless is not None and len(rows[0]) == len(headerless) and not first & set(headerless):
        return Table(str(path), headerless, rows, lines)
    return Table(str(path), tuple(rows[0]), rows[1:], lines[1:])


def split_plain(text: str) -> tuple[list[list[str]], list[int]]:
    """Cut an unquoted text into rows of fields; return them and the line that each stands in."""
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [line.split("\t") for _, line in numbered], [number for number, _ in numbered]


def split_quoted(text: str) -> tuple[list[list[str]], list[int]]:
    """Cut a text in CSV's quoting into rows of fields; return them and the line that each ends in."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    numbered = [(reader.line_num, row) for row in reader if row]
    return [row for _, row in numbered], [number for number, _ in numbered]


_QUOTED_FIELD = re.compile(r'"((?:[^"]|"")*)"(?=[\t\n]|\Z)')


def is_quoted(text: str) -> bool:
    """Whether a tab-separated text follows CSV's quoting: no ``"`` but around a field or, doubled, inside one.

    A text that fits both readings counts as quoted only on evidence: a doubled quote, a quoted header, or a tab or line
    break in quotes without which the rows would differ in length.
    """
    header = text.split("\n", 1)[0]
    evidence = header.startswith('"') and header.endswith('"')
    broken, position = False, 0
    while (position := text.find('"', position)) >= 0:
        if position > 0 and text[position - 1] not in "\t\n":
            return False
        field = _QUOTED_FIELD.match(text, position)
        if field is None:
            return False
        evidence = evidence or '""' in field[1]
        broken = broken or "\t" in field[1] or "\n" in field[1]
        position = field.end()
    if broken:
        quoted = {len(row) for row in split_quoted(text)[0]}
        return len(quoted) == 1 and (evidence or len({len(row) for row in split_plain(text)[0]}) > 1)
    return evidence

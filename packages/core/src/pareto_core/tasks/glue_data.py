"""Read GLUE's data sets: a directory of TSV files, the Hugging Face cache, or the hub, in this order.

A. Wang, A. Singh, J. Michael, F. Hill, O. Levy, S. R. Bowman, "GLUE: A Multi-Task Benchmark and Analysis Platform for
Natural Language Understanding", 2018, https://arxiv.org/abs/1804.07461.

Wherever it comes from, an item is called ``train:7`` or ``dev:7`` after the official part that it stands in and its
row there, so that the same data give the same splits. Official files quote nothing (a ``"`` is a character of the
text); copies written by other tools quote by the rules of CSV; both are read (:mod:`pareto_core.tasks.tsv`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pareto_core.backbones import hub_reachable
from pareto_core.errors import DataError
from pareto_core.tasks.classification import Example
from pareto_core.tasks.tsv import Table, read_tsv, split_plain

Part = Literal["train", "dev"]

DIRECTORY_VARIABLE = "PARETO_GLUE_DIR"
HUB_NAME = "nyu-mll/glue"
HUB_PARTS: dict[Part, tuple[str, ...]] = {"train": ("train",), "dev": ("validation_matched", "validation")}
FILES: dict[Part, tuple[str, ...]] = {
    "train": ("train.tsv",),
    "dev": ("dev.tsv", "validation.tsv", "dev_matched.tsv", "validation_matched.tsv"),
}
MRPC_FILE, MRPC_DEV_IDS = "msr_paraphrase_train.txt", "dev_ids.tsv"
COLA_COLUMNS = ("source", "label", "mark", "sentence")
#: the official QQP file has a few rows that end early; the hub's copy leaves them out too
TRUNCATED_SHARE = 1e-3


@dataclasses.dataclass(frozen=True)
class Subset:
    """One GLUE task: its column names (the official one first) and its classes in the order of their numbers.

    ``labels`` are the words that T5 was trained to answer with; none where the task rates from 0 to 5. ``no_label``
    marks items that the annotators did not agree on.
    """

    name: str
    title: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    no_label: str | None = None


_PREMISE, _HYPOTHESIS = ("sentence1", "premise"), ("sentence2", "hypothesis")
_SENTENCES = (("sentence1",), ("sentence2",))
_STRINGS = (("#1 String", "sentence1"), ("#2 String", "sentence2"))
SUBSETS = {
    subset.name: subset
    for subset in (
        Subset("cola", "CoLA", (("sentence",),), ("label", "is_acceptable"), ("unacceptable", "acceptable")),
        Subset("rte", "RTE", (_PREMISE, _HYPOTHESIS), ("label",), ("entailment", "not_entailment")),
        Subset("mrpc", "MRPC", _STRINGS, ("Quality", "label"), ("not_equivalent", "equivalent")),
        Subset("sst2", "SST-2", (("sentence", "content", "text"),), ("label",), ("negative", "positive")),
        Subset("stsb", "STS-B", _SENTENCES, ("score", "label"), ()),
        Subset(
            "mnli",
            "MNLI",
            (_PREMISE, _HYPOTHESIS),
            ("gold_label", "label"),
            ("entailment", "neutral", "contradiction"),
            no_label="-",
        ),
        Subset("qnli", "QNLI", (("question",), ("sentence",)), ("label",), ("entailment", "not_entailment")),
        Subset(
            "qqp",
            "QQP",
            (("question1",), ("question2",)),
            ("is_duplicate", "label"),
            ("not_duplicate", "duplicate"),
        ),
    )
}


def plain_name(name: str) -> str:
    """Reduce a spelling to letters and digits: ``SST-2`` and ``sst_2`` are ``sst2``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def load_part(subset: Subset, part: Part, data: str | None) -> list[Example]:
    """Return the labelled items of the official ``part`` of ``subset``.

    ``data``, else the environment variable ``PARETO_GLUE_DIR``, names a directory of TSV files, and then nothing else
    is looked at. Raises :class:`DataError` naming file, line or column, and what was expected.
    """
    directory = data or os.environ.get(DIRECTORY_VARIABLE)
    table = _local_table(subset, part, Path(directory)) if directory else _hub_table(subset, part)
    return list(_examples(subset, part, table))


def _examples(subset: Subset, part: Part, table: Table) -> Iterator[Example]:
    texts = [table.column(names) for names in subset.texts]
    label = table.column(subset.label, "; a test file without labels cannot be used")
    if not table.rows:
        raise DataError(f"{table.source}: no rows under the header")
    width, truncated = len(table.columns), 0
    for number, (line, row) in enumerate(zip(table.lines, table.rows, strict=True)):
        if len(row) < width and subset.name == "qqp" and truncated < max(1, TRUNCATED_SHARE * len(table.rows)):
            truncated += 1
            continue
        if len(row) != width:
            raise DataError(f"{table.source}, line {line}: {len(row)} columns, expected {width} as in the header")
        if subset.no_label is not None and row[label].strip() == subset.no_label:
            continue
        where = f"{table.source}, line {line}, column {table.columns[label]!r}"
        found = tuple(row[i].strip() for i in texts)
        if not any(found):
            raise DataError(f"{table.source}, line {line}: no text in column {table.columns[texts[0]]!r}")
        yield Example(f"{part}:{number}", found, _label(subset, row[label].strip(), where))


def _label(subset: Subset, text: str, where: str) -> str | float:
    if not subset.labels:
        return _rating(text, where)
    if text in subset.labels:
        return text
    if text.isdecimal() and int(text) < len(subset.labels):
        return subset.labels[int(text)]
    if text == "-1":
        raise DataError(f"{where}: label -1 marks an unlabelled test item; a file with labels is needed")
    known = ", ".join(f"{name} ({number})" for number, name in enumerate(subset.labels))
    raise DataError(f"{where}: label {text!r}, expected one of {known}")


def _rating(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 5.0:
        hint = " (an unlabelled test item)" if value == -1 else ""
        raise DataError(f"{where}: score {text!r}{hint}, expected a number from 0 to 5")
    return value


def _local_table(subset: Subset, part: Part, root: Path) -> Table:
    directory = _subset_directory(subset, root)
    for name in FILES[part]:
        if (directory / name).is_file():
            return read_tsv(directory / name, headerless=COLA_COLUMNS if subset.name == "cola" else None)
    if subset.name == "mrpc" and (directory / MRPC_FILE).is_file():
        return _original_mrpc(directory, part)
    wanted = " or ".join(FILES[part] + ((MRPC_FILE,) if subset.name == "mrpc" else ()))
    raise DataError(f"{directory}: no {wanted}; found: {_listing(directory)}")


def _subset_directory(subset: Subset, root: Path) -> Path:
    """The folder of ``subset`` in ``root`` (any spelling), or ``root`` itself where it holds the files."""
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; expected one with a folder {subset.title} of GLUE's TSV files")
    for path in sorted(root.iterdir()):
        if path.is_dir() and plain_name(path.name) == subset.name:
            return path
    other = plain_name(root.name) in SUBSETS and plain_name(root.name) != subset.name
    if not other and any((root / name).is_file() for name in (*FILES["train"], MRPC_FILE)):
        return root
    raise DataError(
        f"{root}: no folder {subset.title} with train.tsv and dev.tsv in it; found: {_listing(root)}. "
        "GLUE's files are at https://gluebenchmark.com/tasks"
    )


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") or "nothing"


def _original_mrpc(directory: Path, part: Part) -> Table:
    """The corpus as Microsoft distributes it, cut into train and dev by GLUE's list of sentence ids."""
    if not (directory / MRPC_DEV_IDS).is_file():
        raise DataError(
            f"{directory}: {MRPC_FILE} needs GLUE's list {MRPC_DEV_IDS} beside it to tell the dev items; it is at "
            "https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv"
        )
    table = read_tsv(directory / MRPC_FILE)
    first, second = table.column(("#1 ID",)), table.column(("#2 ID",))
    rows, _ = split_plain((directory / MRPC_DEV_IDS).read_text(encoding="utf-8-sig"))
    dev = {tuple(field.strip() for field in row) for row in rows}
    kept = [
        (line, row)
        for line, row in zip(table.lines, table.rows, strict=True)
        if len(row) != len(table.columns) or ((row[first], row[second]) in dev) == (part == "dev")
    ]
    return dataclasses.replace(table, rows=[row for _, row in kept], lines=[line for line, _ in kept])


def _hub_table(subset: Subset, part: Part) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"GLUE {subset.title}: no directory was given (data or ${DIRECTORY_VARIABLE}), and reading the Hugging "
            'Face cache or hub needs: pip install "pareto-core[glue]"'
        ) from error
    found = _cached(subset)
    if found is None:
        if not hub_reachable():
            raise DataError(_not_found(subset, str(datasets.config.HF_DATASETS_CACHE)))
        try:
            found = datasets.load_dataset(HUB_NAME, subset.name)
        except (OSError, ValueError) as error:
            raise DataError(f"GLUE {subset.title}: the hub's {HUB_NAME} cannot be loaded: {error}") from error
    name = next((name for name in HUB_PARTS[part] if name in found), None)
    if name is None:
        raise DataError(f"GLUE {subset.title}: {HUB_NAME} has no split {' or '.join(HUB_PARTS[part])}")
    columns = tuple(found[name].column_names)
    rows = [list(map(str, row)) for row in zip(*(found[name][column] for column in columns), strict=True)]
    return Table(f"{HUB_NAME} {subset.name} {name}", columns, rows, list(range(1, len(rows) + 1)))


def _cached(subset: Subset) -> Any:
    """The data set as an earlier download left it, without asking the network; None where there is none."""
    from datasets.packaged_modules.cache.cache import Cache

    for name in (HUB_NAME, "glue"):
        try:
            return Cache(
                repo_id=name, dataset_name="glue", config_name=subset.name, version="auto", hash="auto"
            ).as_dataset()
        except (ValueError, OSError):
            continue
    return None


def _not_found(subset: Subset, cache: str) -> str:
    return (
        f"GLUE {subset.title} was not found: no directory was given (data or ${DIRECTORY_VARIABLE}), it is not in the "
        f"Hugging Face cache {cache}, and the hub cannot be reached. Give a directory with {subset.title}/train.tsv "
        "and dev.tsv (--data DIR; files at https://gluebenchmark.com/tasks), or fill the cache where there is internet "
        f"and set HF_HOME: python -c \"from datasets import load_dataset; load_dataset('{HUB_NAME}', '{subset.name}')\""
    )

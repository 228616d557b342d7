"""What tasks share whose texts are compared with references by six metrics, and those that turn data into text.

Data stand in one line, as in X. L. Li, P. Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021,
https://arxiv.org/abs/2101.00190, and E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022,
https://arxiv.org/abs/2106.09685. Between data and text these put an end-of-text mark, which tells a model that was not
tuned to forget the data; here it is a line that begins with ``Description:``, so that one-shot prompting, with an
example written in the same way, is asked what the others are asked.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pareto_adapters.nlg import Scorer, require_libraries
from pareto_core import DataError, Metric, Record, Split
from pareto_core.tasks.causal import CausalGeneration, Item

CUE = "\nDescription:"
#: share of the development file's inputs that selects checkpoints where the rest of it trains
HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencedText(CausalGeneration):
    """Base of the tasks whose texts are scored by BLEU, NIST, METEOR, ROUGE-L, CIDEr and TER."""

    metric: ClassVar[Metric] = Metric("bleu")
    units: ClassVar[Mapping[str, str]] = {"nist": "", "cider": "", "ter": ""}

    @property
    def one_shot_prompt(self) -> str:
        """A description of the task and one worked example, to stand before any prompt of it."""
        raise TypeError(f"{type(self).__name__} must define one_shot_prompt")

    @functools.cached_property
    def _scorers(self) -> dict[Split, Scorer]:
        return {}

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """All metrics by name (:meth:`pareto_adapters.nlg.Scorer.scores`), ``bleu`` in percent among them."""
        if not records:
            raise DataError(f"task {self.name}: no records to score")
        return self._scorer(records[0].id).scores([(record.id, record.text or "") for record in records])

    def _scorer(self, item_id: str) -> Scorer:
        splits: tuple[Split, ...] = ("test", "dev", "train")
        for split in splits:
            references = {item.id: item.references for item in self.split(split)}
            if item_id in references:
                if split not in self._scorers:
                    self._scorers[split] = Scorer(references)
                return self._scorers[split]
        raise DataError(f"task {self.name}: it has no item {item_id}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataToText(ReferencedText):
    """Base of the tasks that read pairs of data and text from files for training, development and test.

    A training item is one pair; in dev and test all texts of the same data are the references of one item. Where the
    training file is not at hand, ``training_file = "dev"`` trains on the development file instead: a tenth of its
    data, drawn by hash, is kept out as the dev split. Results then say so, and are not compared with others.
    """

    max_new_tokens: int = 128
    training_file: Literal["train", "dev"] = "train"

    def pairs(self, part: Split) -> list[tuple[str, str]]:
        """Return data (in one line) and text of each pair in the file of ``part``, in its order."""
        raise TypeError(f"{type(self).__name__} must define pairs(part)")

    def items(self, split: Split) -> list[Item]:
        """Items called ``train:0``, ``dev:0``, …; raises DataError where files cannot be read, or no library scores."""
        require_libraries()
        if self.training_file == "train" or split == "test":
            found = self.pairs(split)
        else:
            found = [pair for pair in self.pairs("dev") if is_held_out(pair[0]) == (split == "dev")]
        grouped = [(data, (text,)) for data, text in found] if split == "train" else group(found)
        return [Item(f"{split}:{i}", data + CUE, texts) for i, (data, texts) in enumerate(grouped)]

    def data_revision(self) -> dict[str, str]:
        """Hash over the items of every split, the file that trains, and the model's name."""
        return {**super().data_revision(), "training_file": self.training_file}


def group(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Collect the texts of equal data, in the order in which the data first occur."""
    found: dict[str, list[str]] = {}
    for data, text in pairs:
        found.setdefault(data, []).append(text)
    return [(data, tuple(texts)) for data, texts in found.items()]


def is_held_out(data: str) -> bool:
    """Whether ``data`` of the development file are kept from training, by their hash."""
    return int.from_bytes(hashlib.sha256(data.encode()).digest()[:4], "big") < HELD_OUT * 2**32


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Where a published data set is looked for: in a directory that a user gives, or in its folder ``folder``."""

    title: str
    variable: str
    folder: str
    source: str

    def file(self, data: str | None, names: Sequence[str]) -> Path:
        """Return the first of the files ``names`` in the directory ``data``, else in that of the variable.

        Raises :class:`DataError` saying where it was looked for and how to get it.
        """
        given = data or os.environ.get(self.variable)
        get = f"its files are at {self.source}"
        if not given:
            raise DataError(f"{self.title}: no directory was given (--data DIR, or ${self.variable}); {get}")
        root = Path(given)
        if not root.is_dir():
            raise DataError(f"{self.title}: {root} is no directory; {get}")
        for directory in (root, root / self.folder):
            for name in names:
                if (directory / name).is_file():
                    return directory / name
        wanted = " or ".join(names)
        raise DataError(f"{self.title}: no {wanted} in {root} or {root / self.folder}; {get}")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; raises :class:`DataError` where it is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}") from error

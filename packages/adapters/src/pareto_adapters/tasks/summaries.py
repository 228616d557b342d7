"""Write the summary of a library function from its signature: real generation that needs no download.

The items are the documented functions of CPython's library (:mod:`pareto_core.library`): the prompt is where a function
stands and what it takes, ``json.encoder.JSONEncoder.default(self, o)``, the reference is the first sentence of its
docstring. The backbone, :mod:`pareto_core.tiny_gpt2`, has read such sentences and such code, but never one after the
other, and nothing of the items that are scored: what a signature asks for is left to fine-tuning.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pareto_adapters.nlg import require_libraries
from pareto_adapters.tasks.data_to_text import ReferencedText
from pareto_core import Metric, Record, Split
from pareto_core.backbones import TINY_GPT2
from pareto_core.library import Function, library_path, read_functions, split_functions
from pareto_core.tasks.causal import Item

CUE = "\nSummary:"
_EXAMPLE = ("shapes.Polygon.add_corner(self, x, y, index=None)", "Add a corner to the polygon, by default as the last.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summaries(ReferencedText):
    """Summaries of library functions; ``data`` may name another directory of Python sources.

    An item's id is the function's place. ``copied_name_rouge_l`` is the score of who answers with the words of the
    function's name: what is above it says more than the name does. ROUGE-L is what models are judged by here: one that
    was trained for minutes gets few runs of four words right, so BLEU is near zero for all.
    """

    name: ClassVar[str] = "adapters.summaries"
    metric: ClassVar[Metric] = Metric("rouge_l")

    model: str = TINY_GPT2
    max_length: int = 160
    max_new_tokens: int = 40

    @functools.cached_property
    def _functions(self) -> dict[Split, list[Function]]:
        return split_functions(read_functions(Path(self.data) if self.data else library_path()))

    def items(self, split: Split) -> list[Item]:
        """Functions of ``split``, in the order of their places; raises DataError where no library scores."""
        require_libraries()
        return [Item(f.place, f.signature + CUE, (f.summary,)) for f in self._functions[split]]

    @property
    def one_shot_prompt(self) -> str:
        """What is asked, with an example that is not in the library."""
        signature, summary = _EXAMPLE
        return f"Say in a sentence what a Python function does, from its signature.\n\n{signature}{CUE} {summary}\n\n"

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """The metrics of the texts, and the ROUGE-L of the functions' names."""
        found = super().score(records)
        names = self._scorer(records[0].id).scores([(record.id, words(record.id)) for record in records])
        return {**found, "copied_name_rouge_l": names["rouge_l"]}

    def data_revision(self) -> dict[str, str]:
        """Hash over the items of every split, the Python version that they belong to, and the model."""
        return {**super().data_revision(), "python": platform.python_version()}


def words(place: str) -> str:
    """The words of a function's name as a sentence: ``http.client.HTTPResponse.getHeader`` becomes "Get header."."""
    name = place.partition("#")[0].rpartition(".")[2]
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return f"{' '.join(found).capitalize()}." if found else name

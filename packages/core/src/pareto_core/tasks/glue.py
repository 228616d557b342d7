"""GLUE as the KronA chapter uses it: eight tasks, test sets cut from the parts whose labels are public.

M. Edalati, M. Tahaei, I. Kobyzev, V. Partovi Nia, J. J. Clark, M. Rezagholizadeh, "KronA: Parameter-Efficient Tuning
with Kronecker Adapter", 2022, https://arxiv.org/abs/2212.10650; sections 4.4.1 to 4.4.3 of its chapter version.

Splits (§4.4.2): CoLA, RTE, MRPC and STS-B give half of the official dev set to ``dev``, which picks the checkpoint, and
half to ``test``; MNLI (matched), QNLI, QQP and SST-2 keep it as ``dev`` and lend 1,000 training items to ``test``. The
chapter gives no seed: items are drawn in the order of the sha256 of ``pareto:<task>:<item>``, the same on every machine
and for every run. WNLI is refused.

Text to text, a prompt is the task's name and then each column's name and text, as T5 was trained (Raffel et al.,
2020, appendix D), STS-B's ratings are rounded to multiples of 0.2, and a text that is no label is a wrong answer; for
STS-B it counts as the lowest rating.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
from collections.abc import Sequence
from typing import ClassVar

from pareto_core.errors import ConfigError, DataError, suggest
from pareto_core.task import Metric, Record, Split
from pareto_core.tasks.classification import Example
from pareto_core.tasks.glue_data import SUBSETS, load_part, plain_name
from pareto_core.tasks.text_to_text import TextToText

TEST_ITEMS = 1000
HALVED = ("cola", "rte", "mrpc", "stsb")
METRICS = {"cola": "matthews", "mrpc": "f1", "stsb": "pearson_spearman"}
#: the class whose F1 is taken
POSITIVE = {"mrpc": "equivalent", "qqp": "duplicate"}
#: names of the texts in T5's prompts, in T5's order, with the text's number
PROMPTS: dict[str, tuple[tuple[str, int], ...]] = {
    "cola": (("sentence", 0),),
    "sst2": (("sentence", 0),),
    "mnli": (("hypothesis", 1), ("premise", 0)),
    "qnli": (("question", 0), ("sentence", 1)),
    "qqp": (("question1", 0), ("question2", 1)),
}
SENTENCE_PAIR = (("sentence1", 0), ("sentence2", 1))
WNLI_REFUSAL = (
    "WNLI is left out, as in the chapter: its 71 dev items are adversarial to the training set (shared sentences with "
    "the opposite label), so that learning scores below always answering one class"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glue(TextToText):
    """One GLUE task, ``subset``, in any of its spellings (``sst2``, ``SST-2``).

    ``data`` is a directory of GLUE's TSV files; without it ``$PARETO_GLUE_DIR``, the Hugging Face cache and the hub are
    looked at. ``model`` is an encoder, which gets a classification head, or an encoder-decoder model such as T5.
    """

    name: ClassVar[str] = "core.glue"
    metric: ClassVar[Metric] = Metric("accuracy")

    subset: str

    def validate(self) -> None:
        """Check ranges; bring ``subset`` to its short spelling."""
        super().validate()
        short = plain_name(self.subset)
        self.require("subset", short != "wnli", WNLI_REFUSAL)
        if short not in SUBSETS:
            raise ConfigError(type(self).__name__, "subset", self.subset, suggest(self.subset, SUBSETS))
        object.__setattr__(self, "subset", short)

    @property
    def primary_metric(self) -> Metric:
        """Matthews correlation, F1, the mean of Pearson's and Spearman's correlations, or accuracy; in percent."""
        return Metric(METRICS.get(self.subset, "accuracy"))

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, those that T5 answers with; empty for STS-B."""
        return SUBSETS[self.subset].labels

    def examples(self, split: Split) -> list[Example]:
        """Items of ``split``, in the order of the official files; raises DataError where they cannot be read."""
        return self._by_split[split]

    @functools.cached_property
    def _by_split(self) -> dict[Split, list[Example]]:
        _require_scorers()
        subset = SUBSETS[self.subset]
        train, dev = load_part(subset, "train", self.data), load_part(subset, "dev", self.data)
        source, wanted = (dev, math.ceil(len(dev) / 2)) if self.subset in HALVED else (train, TEST_ITEMS)
        if wanted >= len(source):
            raise DataError(f"GLUE {subset.title}: {len(source)} items are too few to take {wanted} for the test split")
        drawn = {e.id for e in sorted(source, key=lambda e: _draw(self.subset, e.id))[:wanted]}
        return {
            "train": [e for e in train if e.id not in drawn],
            "dev": [e for e in dev if e.id not in drawn],
            "test": [e for e in source if e.id in drawn],
        }

    def prompt(self, example: Example) -> str:
        """Return ``rte sentence1: … sentence2: …``."""
        named = PROMPTS.get(self.subset, SENTENCE_PAIR)
        return " ".join([self.subset, *(f"{name}: {example.texts[number]}" for name, number in named)])

    def target(self, label: str | float) -> str:
        """Return the class name, or the rating rounded to a multiple of 0.2."""
        return str(label) if self.labels else f"{round(float(label) * 5) / 5:.1f}"

    @property
    def targets(self) -> tuple[str, ...]:
        """The class names, or 0.0, 0.2, … 5.0."""
        return self.labels or tuple(f"{fifth / 5:.1f}" for fifth in range(26))

    def parse(self, text: str) -> str | float | None:
        """Return the class name or the rating that ``text`` is, None where it is neither."""
        if self.labels:
            return super().parse(text)
        try:
            value = float(text)
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Return :attr:`primary_metric` and its relatives, in percent; constant answers give correlations of 0."""
        if not self.labels:
            if not records:
                raise DataError(f"task {self.name}: no records to score")
            return correlations([float(r.prediction or 0.0) for r in records], [float(r.label or 0.0) for r in records])
        scores = super().score(records)
        if self.subset in POSITIVE:
            scores["f1"] = f1(records, POSITIVE[self.subset])
        if self.subset == "cola":
            scores["matthews"] = matthews(records, self.labels)
        return scores


def _draw(subset: str, item: str) -> bytes:
    return hashlib.sha256(f"pareto:{subset}:{item}".encode()).digest()


def _require_scorers() -> None:
    """Say before training, not after it, that what scores is missing."""
    for name in ("sklearn", "scipy"):
        if importlib.util.find_spec(name) is None:
            raise DataError(f'core.glue scores with {name}, which is not installed: pip install "pareto-core[glue]"')


def f1(records: Sequence[Record], positive: str) -> float:
    """F1 of the class ``positive`` in percent; 0 where it is never right."""
    from sklearn.metrics import f1_score

    truth = [r.label == positive for r in records]
    return 100.0 * float(f1_score(truth, [r.prediction == positive for r in records], zero_division=0.0))


def matthews(records: Sequence[Record], labels: Sequence[str]) -> float:
    """Matthews correlation in percent; 0 for constant answers. An answer that is no label is a class of its own."""
    from sklearn.metrics import matthews_corrcoef

    numbers = {label: number for number, label in enumerate(labels)}
    truth = [numbers[str(r.label)] for r in records]
    return 100.0 * float(matthews_corrcoef(truth, [numbers.get(str(r.prediction), len(labels)) for r in records]))


def correlations(predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation and their mean, in percent; 0 where either side is constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(set(predictions)) < 2 or len(set(labels)) < 2:
        return {"pearson_spearman": 0.0, "pearson": 0.0, "spearman": 0.0}
    pearson, spearman = (
        100.0 * value if math.isfinite(value) else 0.0
        for value in (float(rank(predictions, labels).statistic) for rank in (pearsonr, spearmanr))
    )
    return {"pearson_spearman": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pareto_core import ConfigError, DataError, Metric, Record
from pareto_core.tasks import glue
from pareto_core.tasks.classification import Example
from pareto_core.tasks.glue import Glue, correlations, f1, matthews


def write(root: Path, folder: str, header: str, train: Sequence[str], dev: Sequence[str], name: str = "dev.tsv") -> str:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for file, rows in (("train.tsv", train), (name, dev)):
        (root / folder / file).write_text("\n".join([header, *rows]) + "\n")
    return str(root)


def sst2(root: Path, train: int = 1100, dev: int = 7) -> str:
    rows = [f"film {i}\t{i % 2}" for i in range(max(train, dev))]
    return write(root, "SST-2", "sentence\tlabel", rows[:train], rows[:dev])


def rte(root: Path, dev: int = 9) -> str:
    rows = [f"{i}\tcat {i}\tdog {i}\t{('entailment', 'not_entailment')[i % 2]}" for i in range(20)]
    return write(root, "RTE", "index\tsentence1\tsentence2\tlabel", rows, rows[:dev])


def ids(task: Glue) -> dict[str, list[str]]:
    return {split: [e.id for e in task.split(split)] for split in ("train", "dev", "test")}


@pytest.mark.parametrize(
    ("given", "short"), [("SST-2", "sst2"), ("sst_2", "sst2"), ("CoLA", "cola"), ("STS-B", "stsb"), ("mnli", "mnli")]
)
def test_spellings(given: str, short: str) -> None:
    assert Glue(subset=given).subset == short
    assert Glue(subset=given) == Glue.from_json({"subset": short})


def test_wnli_is_refused_with_its_reason() -> None:
    for spelling in ("wnli", "WNLI"):
        with pytest.raises(ConfigError, match=r"subset = .*71 dev items are adversarial"):
            Glue(subset=spelling)


def test_unknown_subset() -> None:
    with pytest.raises(ConfigError, match=r"Glue\.subset = 'sst3': did you mean 'sst2'\?.*mnli, mrpc, qnli") as caught:
        Glue(subset="sst3")
    assert caught.value.field == "subset"
    with pytest.raises(ConfigError, match=r"Glue\.subset = None: this field is required"):
        Glue.from_json({})
    with pytest.raises(ConfigError, match=r"max_length = 3"):
        Glue(subset="rte", max_length=3)


def test_small_tasks_halve_the_dev_set(tmp_path: Path) -> None:
    task = Glue(subset="rte", data=rte(tmp_path))
    found = ids(task)
    assert found["train"] == [f"train:{i}" for i in range(20)]
    assert (len(found["dev"]), len(found["test"])) == (4, 5)
    assert sorted(found["dev"] + found["test"]) == [f"dev:{i}" for i in range(9)]
    assert found["dev"] != [f"dev:{i}" for i in range(4)]
    assert task.split("test")[0].texts == (f"cat {found['test'][0][4:]}", f"dog {found['test'][0][4:]}")


def test_large_tasks_lend_1000_training_items(tmp_path: Path) -> None:
    found = ids(Glue(subset="sst2", data=sst2(tmp_path)))
    assert found["dev"] == [f"dev:{i}" for i in range(7)]
    assert (len(found["train"]), len(found["test"])) == (100, 1000)
    assert set(found["train"]) | set(found["test"]) == {f"train:{i}" for i in range(1100)}
    assert not set(found["train"]) & set(found["test"])
    # a draw, not a prefix: the kept hundred lie all over the file
    places = sorted(int(name[6:]) for name in found["train"])
    assert places[0] < 100
    assert places[-1] > 1000


def test_the_draw_is_fixed(tmp_path: Path) -> None:
    assert ids(Glue(subset="rte", data=rte(tmp_path / "a"))) == ids(Glue(subset="RTE", data=rte(tmp_path / "b")))
    # what this version draws, every version and machine draws
    assert ids(Glue(subset="rte", data=rte(tmp_path / "c")))["dev"] == ["dev:2", "dev:3", "dev:4", "dev:6"]


def test_train_items_leave_the_test_split_alone(tmp_path: Path) -> None:
    data = sst2(tmp_path)
    few = ids(Glue(subset="sst2", data=data, train_items=10))
    assert len(few["train"]) == 10
    assert few["test"] == ids(Glue(subset="sst2", data=data))["test"]


def test_mnli_uses_the_matched_dev_set(tmp_path: Path) -> None:
    header, rows = "premise\thypothesis\tlabel", [f"a {i}\tb {i}\t{i % 3}" for i in range(1010)]
    data = write(tmp_path, "MNLI", header, rows, rows[:5], "dev_matched.tsv")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").write_text("nothing of use\n")
    task = Glue(subset="mnli", data=data)
    assert [task.size(split) for split in ("train", "dev", "test")] == [10, 5, 1000]


def test_too_few_items(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="GLUE SST-2: 1000 items are too few to take 1000 for the test split"):
        Glue(subset="sst2", data=sst2(tmp_path, train=1000)).split("train")
    with pytest.raises(DataError, match="GLUE RTE: 1 items are too few"):
        Glue(subset="rte", data=rte(tmp_path, dev=1)).split("test")


def test_the_revision_covers_every_split(tmp_path: Path) -> None:
    task = Glue(subset="rte", data=rte(tmp_path))
    first = task.data_revision()["sha256"]
    assert Glue(subset="rte", data=str(tmp_path)).data_revision()["sha256"] == first
    for name, old, new in (("dev.tsv", "dog 3", "cow 3"), ("train.tsv", "19\tcat", "19\tcow")):
        path = tmp_path / "RTE" / name
        path.write_text(path.read_text().replace(old, new))
        second = Glue(subset="rte", data=str(tmp_path)).data_revision()["sha256"]
        assert second != first
        first = second


def test_scorers_are_asked_for_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rte(tmp_path)
    monkeypatch.setattr(glue.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'scores with sklearn.*pip install "pareto-core\[glue\]"'):
        Glue(subset="rte", data=data).split("train")


def records(pairs: Sequence[tuple[Any, Any]]) -> list[Record]:
    return [Record(str(i), prediction, label) for i, (prediction, label) in enumerate(pairs)]


def test_primary_metrics_are_the_chapters() -> None:
    names = {"cola": "matthews", "mrpc": "f1", "stsb": "pearson_spearman"}
    for subset in glue.SUBSETS:
        assert Glue(subset=subset).primary_metric == Metric(names.get(subset, "accuracy"), "%", True)


def test_f1_by_hand() -> None:
    # "equivalent": 3 right, 1 claimed wrongly, 2 missed (one by an answer that is no label)
    pairs = [("equivalent", "equivalent")] * 3 + [("equivalent", "not_equivalent"), ("not_equivalent", "equivalent")]
    found = Glue(subset="mrpc").score(records([*pairs, (None, "equivalent"), ("not_equivalent", "not_equivalent")]))
    assert found == {
        "f1": pytest.approx(100 * 6 / 9),
        "accuracy": pytest.approx(100 * 4 / 7),
        "majority_accuracy": pytest.approx(100 * 5 / 7),
    }
    assert f1(records([("b", "a"), ("b", "b")]), "a") == 0.0
    assert set(Glue(subset="qqp").score(records([("duplicate", "duplicate")]))) == {
        "accuracy",
        "f1",
        "majority_accuracy",
    }


def test_matthews_by_hand() -> None:
    good, bad = "acceptable", "unacceptable"
    # TP 4, TN 2, FP 1, FN 1
    pairs = [(good, good)] * 4 + [(bad, bad)] * 2 + [(good, bad), (bad, good)]
    expected = (4 * 2 - 1 * 1) / math.sqrt(5 * 5 * 3 * 3)
    found = Glue(subset="cola").score(records(pairs))
    assert found["matthews"] == pytest.approx(100 * expected)
    assert found["accuracy"] == 75.0
    assert found["majority_accuracy"] == pytest.approx(100 * 5 / 8)
    worse = matthews(records([*pairs, (None, good)]), (bad, good))
    assert worse < matthews(records([*pairs, (good, good)]), (bad, good))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("answer", ["acceptable", "unacceptable", None])
def test_constant_answers_have_no_correlation(answer: str | None) -> None:
    pairs = [(answer, "acceptable"), (answer, "unacceptable"), (answer, "acceptable")]
    assert Glue(subset="cola").score(records(pairs))["matthews"] == 0.0
    ratings = [(3.0, 1.0), (3.0, 2.0), (3.0, 5.0)]
    expected = {"pearson_spearman": 0.0, "pearson": 0.0, "spearman": 0.0}
    assert Glue(subset="stsb").score(records(ratings)) == expected
    assert Glue(subset="stsb").score(records([(a, 2.0) for a, _ in ratings])) == expected
    assert math.isfinite(Glue(subset="mrpc").score(records([(None, "not_equivalent")] * 2))["f1"])


def test_correlations_by_hand() -> None:
    # deviations (-1.5, -0.5, 0.5, 1.5) and (-2, -1, -1, 4): 3 + .5 - .5 + 6 = 9, squares 5 and 22
    found = correlations([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 2.0, 7.0])
    pearson = 100 * 9 / math.sqrt(5 * 22)
    # ranks 1 2 3 4 and 1 2.5 2.5 4: 2.25 + 0 + 0 + 2.25 = 4.5, squares 5 and 4.5
    spearman = 100 * 4.5 / math.sqrt(5 * 4.5)
    assert found["pearson"] == pytest.approx(pearson)
    assert found["spearman"] == pytest.approx(spearman)
    assert found["pearson_spearman"] == pytest.approx((pearson + spearman) / 2)


def test_an_unreadable_rating_counts_as_the_lowest() -> None:
    task = Glue(subset="stsb")
    answers = [(5.0, 5.0), (None, 4.0), (1.0, 1.0)]
    assert task.score(records(answers)) == task.score(records([(5.0, 5.0), (0.0, 4.0), (1.0, 1.0)]))
    for subset in ("stsb", "rte"):
        with pytest.raises(DataError, match="no records to score"):
            Glue(subset=subset).score([])


@pytest.mark.parametrize(
    ("subset", "texts", "expected"),
    [
        ("sst2", ("a good film",), "sst2 sentence: a good film"),
        ("cola", ("cat ran",), "cola sentence: cat ran"),
        ("rte", ("A", "B"), "rte sentence1: A sentence2: B"),
        ("mrpc", ("A", "B"), "mrpc sentence1: A sentence2: B"),
        ("stsb", ("A", "B"), "stsb sentence1: A sentence2: B"),
        ("mnli", ("P", "H"), "mnli hypothesis: H premise: P"),
        ("qnli", ("Q", "S"), "qnli question: Q sentence: S"),
        ("qqp", ("A", "B"), "qqp question1: A question2: B"),
    ],
)
def test_prompts_are_t5s(subset: str, texts: tuple[str, ...], expected: str) -> None:
    assert Glue(subset=subset).prompt(Example("x", texts, "y")) == expected


def test_ratings_as_text() -> None:
    task = Glue(subset="stsb")
    assert [task.target(x) for x in (0.0, 2.5667, 3.75, 4.91, 5)] == ["0.0", "2.6", "3.8", "5.0", "5.0"]
    assert len(task.targets) == 26
    assert task.targets[13] == "2.6"
    assert [task.parse(t) for t in ("3.8", "5", "", "high", "nan", "inf")] == [3.8, 5.0, None, None, None, None]
    assert Glue(subset="rte").parse("not_entailment") == "not_entailment"
    assert Glue(subset="rte").parse("Entailment!") is None


def test_an_encoder_rates_and_classifies_pairs(tiny_bert: str, tmp_path: Path) -> None:
    header, rows = "sentence1\tsentence2\tscore", [f"cat ran\tthe dog {'very ' * i}\t{i / 2}" for i in range(6)]
    task = Glue(subset="stsb", data=write(tmp_path, "STS-B", header, rows, rows), model=tiny_bert)
    model: Any = task.backbone()
    assert model.config.num_labels == 1
    batch = task.collate("train", [0, 1])
    assert batch["labels"].tolist() == [0.0, 0.5]
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    found = task.score(task.records(model.eval(), "test"))
    assert set(found) == {"pearson_spearman", "pearson", "spearman"}
    pair = Glue(subset="rte", data=rte(tmp_path), model=tiny_bert)
    assert pair.backbone()(**pair.collate("dev", [0, 1])).logits.shape == (2, 2)
    assert pair.spec.head == ("classifier",)
    assert json.loads(json.dumps(pair.to_json()))["subset"] == "rte"

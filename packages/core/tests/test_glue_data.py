"""Every format that GLUE's files come in, in sentences of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pareto_core import DataError, backbones
from pareto_core.tasks import glue_data
from pareto_core.tasks.classification import Example
from pareto_core.tasks.glue_data import SUBSETS, load_part

QUOTE = 'The cat "ran" .'
FORMATS = [
    # subset, folder, file, content, texts and label of each row
    (
        "sst2",
        "SST-2",
        "train.tsv",
        "sentence\tlabel\na good film \t1\nbad plot \t0\n",
        [("a good film",), ("bad plot",)],
    ),
    ("sst2", "sst2", "train.tsv", "label\tsentence\n1\ta good film\n0\tbad plot\n", [("a good film",), ("bad plot",)]),
    ("sst2", "sst_2", "dev.tsv", "label\tcontent\n1\ta good film\n0\tbad plot\n", [("a good film",), ("bad plot",)]),
    (
        "sst2",
        "SST-2",
        "validation.tsv",
        "text\tlabel\na film\tpositive\na plot\tnegative\n",
        [("a film",), ("a plot",)],
    ),
    ("cola", "CoLA", "train.tsv", "gj04\t1\t\tGreen ideas sleep .\nks08\t0\t*\tSleep badly ran .\n", None),
    ("cola", "cola", "dev.tsv", "sentence\tlabel\nGreen ideas sleep .\t1\nSleep badly ran .\t0\n", None),
    ("rte", "RTE", "train.tsv", f"index\tsentence1\tsentence2\tlabel\n0\t{QUOTE}\tA cat ran .\tentailment\n", "rte"),
    (
        "rte",
        "rte",
        "dev.tsv",
        'sentence1\tsentence2\tlabel\tidx\n"The cat ""ran"" ."\tA cat ran .\t0\t0\n',
        "rte",
    ),
    ("rte", "RTE", "dev.tsv", f"premise\thypothesis\tlabel\n{QUOTE}\tA cat ran .\t0\n", "rte"),
    (
        "mrpc",
        "MRPC",
        "train.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tThe cat ran .\tA cat ran .\n"
        '0\t9\t10\t"Never , he said .\tAlways .\n',
        "mrpc",
    ),
    (
        "mrpc",
        "mrpc",
        "dev.tsv",
        "sentence1\tsentence2\tlabel\nThe cat ran .\tA cat ran .\tequivalent\n"
        '"Never , he said .\tAlways .\tnot_equivalent\n',
        "mrpc",
    ),
    (
        "stsb",
        "STS-B",
        "dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\t2012\t1\tnone\tnone\tThe cat ran .\tA cat ran .\t4.750\n",
        "stsb",
    ),
    ("stsb", "stsb", "train.tsv", "sentence1\tsentence2\tlabel\nThe cat ran .\tA cat ran .\t4.75\n", "stsb"),
    (
        "mnli",
        "MNLI",
        "dev_matched.tsv",
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n0\tg\tA .\tB .\tneutral\tcontradiction\n"
        "1\tg\tC .\tD .\tneutral\t-\n2\tg\tE .\tF .\tneutral\tneutral\n",
        "mnli",
    ),
    (
        "mnli",
        "mnli",
        "train.tsv",
        "premise\thypothesis\tlabel\tidx\nA .\tB .\t2\t0\nC .\tD .\t-\t1\nE .\tF .\t1\t2\n",
        "mnli",
    ),
    ("qnli", "QNLI", "dev.tsv", "index\tquestion\tsentence\tlabel\n0\tWho ran ?\tA cat .\tnot_entailment\n", "qnli"),
    ("qnli", "qnli", "dev.tsv", "question\tsentence\tlabel\nWho ran ?\tA cat .\t1\n", "qnli"),
    (
        "qqp",
        "QQP",
        "train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\tWho ran ?\tWho did run ?\t1\n",
        "qqp",
    ),
    ("qqp", "qqp", "dev.tsv", "question1\tquestion2\tlabel\nWho ran ?\tWho did run ?\t1\n", "qqp"),
]
MEANING: dict[str, list[tuple[int, tuple[str, ...], str | float]]] = {
    "cola": [(0, ("Green ideas sleep .",), "acceptable"), (1, ("Sleep badly ran .",), "unacceptable")],
    "rte": [(0, (QUOTE, "A cat ran ."), "entailment")],
    "mrpc": [
        (0, ("The cat ran .", "A cat ran ."), "equivalent"),
        (1, ('"Never , he said .', "Always ."), "not_equivalent"),
    ],
    "stsb": [(0, ("The cat ran .", "A cat ran ."), 4.75)],
    "mnli": [(0, ("A .", "B ."), "contradiction"), (2, ("E .", "F ."), "neutral")],
    "qnli": [(0, ("Who ran ?", "A cat ."), "not_entailment")],
    "qqp": [(0, ("Who ran ?", "Who did run ?"), "duplicate")],
}


def put(root: Path, folder: str, name: str, content: str) -> None:
    (root / folder).mkdir(exist_ok=True)
    (root / folder / name).write_bytes(content.encode())


@pytest.mark.parametrize(("subset", "folder", "name", "content", "texts"), FORMATS)
def test_formats(subset: str, folder: str, name: str, content: str, texts: Any, tmp_path: Path) -> None:
    put(tmp_path, folder, name, content)
    part: glue_data.Part = "train" if name == "train.tsv" else "dev"
    if subset == "sst2":
        expected = [Example(f"{part}:{i}", t, ("positive", "negative")[i]) for i, t in enumerate(texts)]
    else:
        expected = [Example(f"{part}:{i}", t, label) for i, t, label in MEANING[subset]]
    assert load_part(SUBSETS[subset], part, str(tmp_path)) == expected
    put(tmp_path, folder, name, content.replace("\n", "\r\n"))
    assert load_part(SUBSETS[subset], part, str(tmp_path)) == expected


def test_mrpc_as_microsoft_distributes_it(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = "".join(f"{i % 2}\t{i}\t{i + 100}\tcat {i}\tdog {i}\n" for i in range(5))
    put(tmp_path, "MRPC", "msr_paraphrase_train.txt", header + rows)
    with pytest.raises(DataError, match=r"needs GLUE's list dev_ids\.tsv beside it"):
        load_part(SUBSETS["mrpc"], "dev", str(tmp_path))
    put(tmp_path, "MRPC", "dev_ids.tsv", "1\t101\n3\t103\n4\t999\n")
    assert [e.texts[0] for e in load_part(SUBSETS["mrpc"], "dev", str(tmp_path))] == ["cat 1", "cat 3"]
    assert [e.texts[0] for e in load_part(SUBSETS["mrpc"], "train", str(tmp_path))] == ["cat 0", "cat 2", "cat 4"]


def test_the_directory_may_be_the_folder_itself_or_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "sentence\tlabel\na good film\t1\n"
    for folder in ("SST-2", "mine", "RTE"):
        put(tmp_path, folder, "train.tsv", content)
    expected = [Example("train:0", ("a good film",), "positive")]
    assert load_part(SUBSETS["sst2"], "train", str(tmp_path / "SST-2")) == expected
    assert load_part(SUBSETS["sst2"], "train", str(tmp_path / "mine")) == expected
    with pytest.raises(DataError, match=r"RTE: no folder SST-2"):
        load_part(SUBSETS["sst2"], "train", str(tmp_path / "RTE"))
    monkeypatch.setenv("PARETO_GLUE_DIR", str(tmp_path))
    assert load_part(SUBSETS["sst2"], "train", None) == expected
    with pytest.raises(DataError, match=r"elsewhere: no such directory"):
        load_part(SUBSETS["sst2"], "train", str(tmp_path / "elsewhere"))


BAD = [
    ("rte", "train.tsv", "", r"RTE/train\.tsv: the file is empty"),
    ("rte", "train.tsv", "sentence1\tsentence2\tlabel\n", r"RTE/train\.tsv: no rows under the header"),
    (
        "rte",
        "train.tsv",
        "sentence1\tlabel\nx\t0\n",
        r"no column 'sentence2' or 'hypothesis' among 'sentence1', 'label'",
    ),
    (
        "rte",
        "train.tsv",
        "index\tsentence1\tsentence2\n0\tx\ty\n",
        r"no column 'label' among .*; a test file without labels",
    ),
    (
        "rte",
        "train.tsv",
        "sentence1\tsentence2\tlabel\nx\ty\t0\nx\ty\t-1\n",
        r"line 3, column 'label': label -1 marks an",
    ),
    (
        "rte",
        "train.tsv",
        "sentence1\tsentence2\tlabel\nx\ty\tmaybe\n",
        r"line 2, column 'label': label 'maybe', expected one of entailment \(0\), not_entailment \(1\)",
    ),
    ("rte", "train.tsv", "sentence1\tsentence2\tlabel\nx\ty\t2\n", r"label '2', expected one of"),
    ("rte", "train.tsv", "sentence1\tsentence2\tlabel\nx\ty\n", r"line 2: 2 columns, expected 3 as in the header"),
    ("rte", "train.tsv", "sentence1\tsentence2\tlabel\nx\ty\tz\t0\n", r"line 2: 4 columns, expected 3"),
    ("rte", "train.tsv", "sentence1\tsentence2\tlabel\n \t\t0\n", r"line 2: no text in column 'sentence1'"),
    ("rte", "train.csv", "sentence1,sentence2,label\nx,y,0\n", r"RTE: no train\.tsv; found: train\.csv"),
    ("stsb", "train.tsv", "sentence1\tsentence2\tscore\nx\ty\thigh\n", r"score 'high', expected a number from 0 to 5"),
    ("stsb", "train.tsv", "sentence1\tsentence2\tscore\nx\ty\t5.5\n", r"line 2, column 'score': score '5\.5'"),
    ("stsb", "train.tsv", "sentence1\tsentence2\tscore\nx\ty\tnan\n", r"score 'nan'"),
    ("stsb", "train.tsv", "sentence1\tsentence2\tscore\nx\ty\t-1\n", r"score '-1' \(an unlabelled test item\)"),
]


@pytest.mark.parametrize(("subset", "name", "content", "message"), BAD)
def test_bad_input(subset: str, name: str, content: str, message: str, tmp_path: Path) -> None:
    put(tmp_path, SUBSETS[subset].title, name, content)
    with pytest.raises(DataError, match=message):
        load_part(SUBSETS[subset], "train", str(tmp_path))


def test_only_qqp_may_have_a_few_truncated_rows(tmp_path: Path) -> None:
    header, row = "id\tquestion1\tquestion2\tis_duplicate\n", "1\tWho ?\tWhere ?\t0\n"
    put(tmp_path, "QQP", "train.tsv", header + row * 3 + "2\tWho\n" + row)
    found = load_part(SUBSETS["qqp"], "train", str(tmp_path))
    assert [e.id for e in found] == ["train:0", "train:1", "train:2", "train:4"]
    put(tmp_path, "QQP", "train.tsv", header + row + "2\tWho\n" * 2 + row)
    with pytest.raises(DataError, match=r"line 4: 2 columns, expected 4"):
        load_part(SUBSETS["qqp"], "train", str(tmp_path))


@pytest.fixture
def _nothing_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.delenv("PARETO_GLUE_DIR", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.mark.usefixtures("_nothing_given")
def test_neither_cache_nor_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(glue_data, "hub_reachable", lambda: False)
    with pytest.raises(DataError) as caught:
        load_part(SUBSETS["qnli"], "train", None)
    for part in ("GLUE QNLI", "$PARETO_GLUE_DIR", str(tmp_path / "hub"), "--data DIR", "HF_HOME", "nyu-mll/glue"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("_nothing_given")
def test_offline_mode_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    backbones.hub_reachable.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(DataError, match="the hub cannot be reached"):
        load_part(SUBSETS["qnli"], "train", None)
    backbones.hub_reachable.cache_clear()


@pytest.mark.usefixtures("_nothing_given")
def test_the_hub_is_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []

    def load(name: str, subset: str) -> Any:
        asked.append((name, subset))
        if subset == "rte":
            raise ConnectionError("reset")
        columns = {"premise": ["A ."], "hypothesis": ["B ."], "label": [2], "idx": [0]}
        return {"train": datasets.Dataset.from_dict(columns), "validation_matched": datasets.Dataset.from_dict(columns)}

    monkeypatch.setattr(glue_data, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_part(SUBSETS["mnli"], "dev", None) == [Example("dev:0", ("A .", "B ."), "contradiction")]
    with pytest.raises(DataError, match="GLUE RTE: the hub's nyu-mll/glue cannot be loaded: reset"):
        load_part(SUBSETS["rte"], "dev", None)
    assert asked == [("nyu-mll/glue", "mnli"), ("nyu-mll/glue", "rte")]


@pytest.mark.usefixtures("_nothing_given")
@pytest.mark.parametrize("folder", ["nyu-mll___glue", "glue"])
def test_the_cache_is_read_without_the_hub(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
            "idx": datasets.Value("int32"),
        }
    )
    directory = tmp_path / "hub" / folder / "rte" / "0.0.0" / "0123"
    directory.mkdir(parents=True)
    splits = {}
    for part in ("train", "validation"):
        with ArrowWriter(features=features, path=str(directory / f"glue-{part}.arrow")) as writer:
            for i in range(2):
                writer.write({"sentence1": f"{part} {i} .", "sentence2": "B .", "label": i, "idx": i})
            writer.finalize()
        splits[part] = {"name": part, "num_examples": 2, "num_bytes": 1, "dataset_name": "glue"}
    info = {"config_name": "rte", "dataset_name": "glue", "features": features.to_dict(), "splits": splits}
    (directory / "dataset_info.json").write_text(json.dumps({**info, "version": {"version_str": "0.0.0"}}))
    monkeypatch.setattr(glue_data, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    assert load_part(SUBSETS["rte"], "dev", None) == [
        Example("dev:0", ("validation 0 .", "B ."), "entailment"),
        Example("dev:1", ("validation 1 .", "B ."), "not_entailment"),
    ]
    assert [e.texts[0] for e in load_part(SUBSETS["rte"], "train", None)] == ["train 0 .", "train 1 ."]

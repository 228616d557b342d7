from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from pareto_adapters import KronA
from pareto_adapters.tasks.summaries import CUE, Summaries, words
from pareto_core import DataError
from pareto_core.backbones import resolve
from pareto_core.library import library_path, read_functions
from pareto_core.testing import check_method
from pareto_core.tiny_gpt2 import Recipe, train

RECIPE = Recipe(
    width=32,
    layers=2,
    heads=2,
    positions=96,
    vocabulary=300,
    window=32,
    batch=4,
    steps=20,
    learning_rate=1e-2,
    warmup=5,
)
VERBS = ("Return", "Close", "Count", "Sort", "Remove", "Print", "Store", "Parse")
NOUNS = ("every file", "the open sockets", "all numbers", "its own name", "the last line", "both lists", "an error")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2 of two layers that was trained for a second."""
    path = tmp_path_factory.mktemp("model") / "model"
    train(RECIPE, [f"{verb} {noun}." for verb in VERBS for noun in NOUNS], path)
    return str(path)


@pytest.fixture
def task(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Summaries:
    """56 functions of a library of one file."""
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lib").mkdir()
    source = "".join(
        f'def {verb.lower()}_{noun.split()[-1]}{i}(self, x={i}):\n    """{verb} {noun}."""\n\n'
        for i, verb in enumerate(VERBS)
        for noun in NOUNS
    )
    (tmp_path / "lib" / "tools.py").write_text(source)
    return Summaries(model=model, data=str(tmp_path / "lib"), max_length=64, max_new_tokens=16)


def test_items_are_signatures_and_first_sentences(task):
    items = {item.id: item for split in ("train", "dev", "test") for item in task.split(split)}
    assert len(items) == len(VERBS) * len(NOUNS)
    assert items["tools.count_numbers2"].prompt == "tools.count_numbers2(self, x=2)" + CUE
    assert items["tools.count_numbers2"].references == ("Count all numbers.",)


def test_a_model_trains_and_generates_and_is_scored(task):
    model = task.backbone()
    assert isinstance(model, GPT2LMHeadModel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for seed in range(4):
        for batch in task.batches("train", 8, seed):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    records = task.records(model.eval(), "test")
    assert [record.id for record in records] == [item.id for item in task.split("test")]
    scores = task.score(records)
    assert scores["rouge_l"] > task.score(task.records(task.backbone().eval(), "test"))["rouge_l"]
    assert {"nist", "bleu", "cider", "ter"} <= set(scores)


def test_the_copied_name_is_the_score_of_who_copies_it(task):
    items = task.split("test")
    records = task.records(task.backbone(), "test")
    copied = [dataclasses.replace(record, text=words(record.id)) for record in records]
    right = [dataclasses.replace(r, text=item.references[0]) for r, item in zip(records, items, strict=True)]
    assert task.score(copied)["rouge_l"] == task.score(right)["copied_name_rouge_l"] < 70
    assert task.score(right)["bleu"] == pytest.approx(100)
    with pytest.raises(DataError, match="no records"):
        task.score([])


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("os.path.get_file_name", "Get file name."),
        ("http.client.HTTPResponse.getHeader", "Get header."),
        ("x.parseHTML5Page", "Parse html 5 page."),
        ("a.B.__contains__#2", "Contains."),
        ("gettext._", "_"),
    ],
)
def test_words_of_names(place, sentence):
    assert words(place) == sentence


def test_a_method_conforms_on_it(task):
    check_method(KronA(a_shape=(4, 8)), task)


def test_requests_and_revision(task):
    requests = task.requests()
    assert requests["generate"].new_tokens > 2
    assert task.spec.generates
    revision = task.data_revision()
    assert set(revision) >= {"sha256", "python", "backbone"}
    assert dataclasses.replace(task, train_items=5).data_revision()["sha256"] != revision["sha256"]


def test_the_worked_example_is_not_in_the_library():
    prompt = Summaries().one_shot_prompt
    assert prompt.count(CUE) == 1
    example = prompt.split("\n\n")[1].partition(CUE)
    functions = read_functions(library_path())
    assert example[0] not in {function.signature for function in functions}
    assert example[2].strip() not in {function.summary for function in functions}


def test_the_real_library_gives_enough_to_train_and_to_score():
    task = Summaries()
    sizes = {split: task.size(split) for split in ("train", "dev", "test")}
    assert sizes["train"] > 2500
    assert sizes["test"] > 700
    ids = [item.id for split in sizes for item in task.split(split)]
    assert len(ids) == len(set(ids))


def test_the_default_model_is_the_one_that_is_trained_here(tmp_path, monkeypatch):
    path = tmp_path / "tiny-gpt2" / "key"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    monkeypatch.setenv("PARETO_CACHE", str(tmp_path))
    monkeypatch.setattr("pareto_core.tiny_gpt2.revision", lambda: "key")
    assert resolve(Summaries().model) == str(path)

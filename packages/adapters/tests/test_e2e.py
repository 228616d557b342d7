from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from pareto_adapters import LoRA
from pareto_adapters.tasks.data_to_text import CUE
from pareto_adapters.tasks.e2e import E2E, linearise, read_pairs
from pareto_core import DataError
from pareto_core.testing import check_method

MEANING = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"
PLACES = ["Cotto", "Aromi", "Zizzi", "Strada", "Browns", "Bibimbap"]


def write_csv(path: Path, rows: Iterable[tuple[str, str]], quoting: Any = csv.QUOTE_MINIMAL) -> Path:
    """Write an official file: the test file quotes every field, the others only those that need it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=quoting)
        writer.writerow(["mr", "ref"])
        writer.writerows(rows)
    return path


def rows(places: Iterable[str], verb: str) -> list[tuple[str, str]]:
    return [
        (f"name[{p}], area[{a}]", f"{p} {word} in the {a}, {p} {verb}.")
        for p in places
        for a in ("riverside", "city centre")
        for word in ("is", "lies")
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_csv(tmp_path / "trainset.csv", rows(PLACES, "serves"))
    write_csv(tmp_path / "devset.csv", rows(PLACES[:3], "sells"))
    write_csv(tmp_path / "testset_w_refs.csv", rows(PLACES[3:], "offers"), csv.QUOTE_ALL)
    return tmp_path


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    """Directory of a random GPT-2 of 2 layers, 32 wide, that knows the words of the test set."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    directory = tmp_path / "model"
    texts = [f"{linearise(*pair)}{CUE} {pair[1]}" for pair in rows(PLACES, "serves sells offers")]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(directory)
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return str(directory)


def test_a_table_is_written_as_in_the_chapters_footnote() -> None:
    assert linearise(MEANING, "here") == (
        "name : The Vaults | Type : pub | price : more than £30 | customer rating : 5 out of 5 | near : Café Adriatic"
    )
    assert linearise("name[A, B], familyFriendly[no]", "here") == "name : A, B | family friendly : no"
    assert linearise(" name[A] , area[]", "here") == "name : A | area : "


@pytest.mark.parametrize("meaning", ["", "name", "name[A", "name[A] area[B]", "name[A], ", "name[A], area", "[A]"])
def test_what_is_no_table_is_refused(meaning: str) -> None:
    with pytest.raises(DataError, match=r"file\.csv, line 3: .* is not of the form name\[\.\.\.\]"):
        linearise(meaning, "file.csv, line 3")


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_files_in_either_quoting(tmp_path: Path, quoting: Any) -> None:
    texts = ['A "good" pub,  cheap. ', "It is\nnear."]
    path = write_csv(tmp_path / "a.csv", [("name[A], area[B]", text) for text in texts], quoting)
    assert list(read_pairs(path)) == [("name : A | area : B", text.strip()) for text in texts]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows under a header"),
        ("mr,ref\n", "no rows under a header"),
        ("mr\nname[A]\n", "no column 'ref' among 'mr'"),
        ('mr,ref\n"name[A], area[B]",Good.\nname[A], area[B],Good.\n', "line 3: 3 columns, expected 2"),
        ("mr,ref\nname[A],\n", "line 2: no text in column 'ref'"),
        ("mr,ref\nA,Good.\n", "line 2: 'A' is not of the form"),
        ('mr,ref\nname[A],"Good\n', "line 2: unexpected end of data"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "devset.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"devset\.csv.*{message}"):
        list(read_pairs(path))


def test_splits(data: Path) -> None:
    task = E2E(data=str(data))
    assert [task.size(split) for split in ("train", "dev", "test")] == [24, 6, 6]
    item = task.split("test")[1]
    assert item.id == "test:1"
    assert item.prompt == "name : Strada | area : city centre\nDescription:"
    assert item.references == (
        "Strada is in the city centre, Strada offers.",
        "Strada lies in the city centre, Strada offers.",
    )
    assert {len(item.references) for item in task.split("train")} == {1}


def test_a_missing_training_file_is_not_replaced_silently(data: Path) -> None:
    (data / "trainset.csv").unlink()
    with pytest.raises(DataError, match=r"E2E NLG: no trainset\.csv in .*github\.com/tuetschek/e2e-dataset"):
        E2E(data=str(data)).data_revision()
    task = E2E(data=str(data), training_file="dev")
    assert task.size("train") + 2 * task.size("dev") == 12


def test_the_example_is_written_like_a_prompt(data: Path) -> None:
    task = E2E(data=str(data))
    prompt = task.one_shot_prompt
    assert prompt.count("\nDescription: ") == 1
    assert "\nname : " in prompt
    assert (prompt + task.split("test")[0].prompt).endswith("\n\nname : Strada | area : riverside\nDescription:")


def test_an_adapter_passes_the_conformance_suite_on_it(data: Path, gpt2: str) -> None:
    check_method(LoRA(r=2, target_modules=("c_attn",)), E2E(data=str(data), model=gpt2, max_new_tokens=20))


def test_a_model_learns_to_describe(data: Path, gpt2: str) -> None:
    task = E2E(data=str(data), model=gpt2, max_new_tokens=20)
    model: Any = task.backbone()
    before = task.score(task.records(model.eval(), "test"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for epoch in range(40):
        for batch in task.batches("train", 8, epoch):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    records = task.records(model.eval(), "test")
    after = task.score(records)
    assert [record.id for record in records] == [f"test:{i}" for i in range(6)]
    # the places are those of the training set, the last word of the test set is not
    assert before["bleu"] < 5 < 40 < after["bleu"]
    assert after["ter"] < 0.3 < before["ter"]

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from pareto_core import ConfigError, DataError, Method, Metric, ModelError, Paper, Record, Split, Task
from pareto_core.tasks.causal import CausalGeneration, Item, chunks, one_line, target_nats
from pareto_core.testing import check_method
from pareto_core.weights import unfreeze

ANIMALS = ["cat", "dog", "ox", "hen", "goat", "ant", "bee", "yak"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sounds(CausalGeneration):
    """Says of an animal what it does; prompts differ in length."""

    name: ClassVar[str] = "core.sounds"
    metric: ClassVar[Metric] = Metric("exact")

    max_length: int = 48
    max_new_tokens: int = 16

    def items(self, split: Split) -> list[Item]:
        return [
            Item(f"{split}:{i}", f"{'very ' * (i % 3)}{animal}:", (f"{animal}\n runs", "it sits"))
            for i, animal in enumerate(ANIMALS)
        ]

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        return {"exact": 100.0 * sum(r.text == r.label for r in records) / len(records)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms(Method):
    """Trains the layer norms of a GPT-2."""

    paper: ClassVar[Paper | None] = Paper("A title", "A. Author", 2020, "https://example.org/paper")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        start = self.starting_model(task, model)
        unfreeze(start, tuple(name for name, _ in start.named_modules() if ".ln_" in name))
        return start


def save_tokenizer(directory: Path, end: str | None = "<end>") -> int:
    """Write a tokenizer of single bytes; return its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({byte: i for i, byte in enumerate(["<end>", *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, bos_token=end).save_pretrained(directory)
    return len(alphabet) + 1


def save_gpt2(directory: Path, positions: int = 64) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=save_tokenizer(directory),
        n_positions=positions,
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


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random GPT-2 of 2 layers, 32 wide, with a tokenizer of bytes."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))


class Says:
    """Answers with given texts in turn, the prompt in front; notes how it was asked."""

    def __init__(self, task: CausalGeneration, answers: list[str]) -> None:
        self.task, self.answers = task, answers
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **batch: torch.Tensor) -> Any:
        class Output:
            logits = torch.zeros(*batch["input_ids"].shape, 257)

        return Output()

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.asked.append(options)
        texts = [self.answers[(i + 3) % len(self.answers)] for i in range(len(input_ids))]
        tokens = self.task.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, tokens], 1)


def test_log_probabilities_by_hand() -> None:
    probabilities = torch.tensor(
        [[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05]], [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]]]
    )
    # what stands at a place is predicted by the place before it
    found = target_nats(probabilities.log(), torch.tensor([[-100, 0, 2], [-100, -100, 1]]))
    assert found == pytest.approx([math.log(0.5 * 0.7), math.log(0.2)])
    assert target_nats(probabilities.log(), torch.full((2, 3), -100)) == [0.0, 0.0]


def test_the_loss_counts_the_text_and_the_end_mark(gpt2: str) -> None:
    task = Sounds(model=gpt2)
    batch = task.collate("train", [0, 1, 2])
    rows = task.tokenizer.batch_decode(batch["input_ids"])
    assert [row.removesuffix("<end>" * row.count("<end>")) for row in rows] == [
        "cat: cat runs",
        "very dog: dog runs",
        "very very ox: ox runs",
    ]
    assert batch["input_ids"].shape == (3, 24)
    assert batch["attention_mask"].sum(1).tolist() == [14, 19, 22]
    for text, labels in zip(("cat", "dog", "ox"), batch["labels"], strict=True):
        assert task.tokenizer.decode(labels[labels != -100]) == f" {text} runs<end>"
    with torch.no_grad():
        loss = float(task.backbone()(**batch).loss)
    assert loss == pytest.approx(math.log(257), rel=0.05)


def test_padding_stays_within_the_models_positions(tmp_path: Path) -> None:
    task = Sounds(model=save_gpt2(tmp_path, positions=22), max_new_tokens=14)
    batch = task.collate("train", [2])
    # eight positions are left for the prompt's end; 17 tokens would be padded to 24
    assert task.tokenizer.decode(batch["input_ids"][0]) == "very ox: ox runs" + 6 * "<end>"
    assert task.spec.max_length == 22
    assert task.backbone()(**batch).logits.shape == (1, 22, 257)


def test_long_texts_are_cut(gpt2: str) -> None:
    task = Sounds(model=gpt2, max_length=10, max_new_tokens=4)
    encoded = task.encoded("train")[2]
    assert task.tokenizer.decode(encoded.prompt) == "ry ox:"
    assert task.tokenizer.decode(encoded.target) == " ox "


def test_records_are_those_of_each_prompt_alone(gpt2: str) -> None:
    task = Sounds(model=gpt2)
    model: Any = task.backbone().eval()
    records = task.records(model, "test")
    assert [r.id for r in records] == [item.id for item in task.split("test")]
    for i, (record, item) in enumerate(zip(records, task.split("test"), strict=True)):
        # independent reference: greedy search without padding, batch and cache
        tokens = list(item.prompt.encode())
        ids = task.tokenizer(item.prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(task.max_new_tokens):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            batch = task.collate("test", [i])
            loss = float(model(**batch).loss)
        new = ids[0, len(tokens) :].tolist()
        new = new[: new.index(0)] if 0 in new else new
        assert record.text == task.tokenizer.decode(new).strip().partition("\n")[0].strip()
        assert record.log_probability == pytest.approx(-loss * int((batch["labels"] != -100).sum()), rel=1e-4)
        assert record.label == f"{ANIMALS[i]} runs"


def test_the_first_line_counts(gpt2: str) -> None:
    task = Sounds(model=gpt2)
    model = Says(task, [" it sits \nand more", "\n\n it  ran\n", ""])
    texts = [r.text for r in task.records(model, "test")]
    assert set(texts) == {"it sits", "it  ran", ""}
    assert one_line(" a\n b\t c ") == "a b c"


def test_options_of_generation(gpt2: str) -> None:
    greedy = Sounds(model=gpt2)
    model = Says(greedy, ["x"])
    greedy.records(model, "test")
    expected = {"max_new_tokens": 16, "do_sample": False, "num_beams": 1, "eos_token_id": 0, "pad_token_id": 0}
    assert model.asked == [expected]
    beams = Sounds(model=gpt2, num_beams=10, length_penalty=0.9)
    model = Says(beams, ["x"])
    beams.records(model, "test")
    # eight prompts with ten beams each are two batches of at most 64 sequences
    assert model.asked == [{**expected, "num_beams": 10, "length_penalty": 0.9}] * 2


def test_beam_search_finds_at_least_as_probable_a_text(gpt2: str) -> None:
    def nats(task: CausalGeneration, model: Any, prompts: Any) -> float:
        tokens = model.generate(
            **prompts, max_new_tokens=4, min_new_tokens=4, num_beams=task.num_beams, do_sample=False, pad_token_id=0
        )
        width = prompts["input_ids"].shape[1]
        labels = tokens.clone()
        labels[:, :width] = -100
        with torch.no_grad():
            return target_nats(model(input_ids=tokens).logits, labels)[0]

    greedy, beams = Sounds(model=gpt2), Sounds(model=gpt2, num_beams=8)
    model: Any = greedy.backbone().eval()
    prompts = greedy.prompts("test", [0])
    assert nats(beams, model, prompts) >= nats(greedy, model, prompts)


def test_a_model_learns_to_answer_and_to_end(gpt2: str) -> None:
    task = Sounds(model=gpt2)
    model: Any = task.backbone()
    assert task.score(task.records(model.eval(), "test")) == {"exact": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for epoch in range(60):
        for batch in task.batches("train", 4, epoch):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert task.score(task.records(model.eval(), "test")) == {"exact": 100.0}


def test_requests(gpt2: str) -> None:
    task = Sounds(model=gpt2)
    model: Any = task.backbone()
    requests = task.requests()
    assert set(requests) == {"batch1", "generate"}
    assert task.tokenizer.decode(requests["batch1"].inputs["input_ids"][0]) == "very dog:"
    assert model(**requests["batch1"].inputs).logits.shape[-1] == 257
    generate = requests["generate"]
    assert (generate.kind, generate.batch_size) == ("generate", 1)
    assert generate.new_tokens == 10  # " cat runs" and the end mark
    tokens = model.generate(**generate.inputs, min_new_tokens=10, max_new_tokens=10)
    assert tokens.shape[1] == generate.inputs["input_ids"].shape[1] + 10


def test_training_batches(gpt2: str) -> None:
    task = Sounds(model=gpt2)
    seen = [batch["labels"] for batch in task.batches("train", 3, seed=0)]
    assert [len(labels) for labels in seen] == [3, 3]
    assert [len(batch["labels"]) for batch in task.batches("dev", 3, seed=0)] == [3, 3, 2]
    with pytest.raises(DataError, match="8 training items do not fill one batch of 9"):
        next(iter(task.batches("train", 9, seed=0)))


def test_a_share_of_the_items(gpt2: str) -> None:
    few = Sounds(model=gpt2, train_items=3, test_items=2)
    assert [few.size(split) for split in ("train", "dev", "test")] == [3, 2, 2]
    assert [item.id for item in few.split("test")] == [
        item.id for item in Sounds(model=gpt2, test_items=3).split("test")[:2]
    ]
    whole = Sounds(model=gpt2)
    assert {item.id for item in few.split("train")} < {item.id for item in whole.split("train")}
    assert whole.data_revision()["sha256"] != few.data_revision()["sha256"]
    assert whole.data_revision() == Sounds(model=gpt2).data_revision()
    assert whole.data_revision()["backbone"] == gpt2


def test_spec(gpt2: str) -> None:
    spec = Sounds(model=gpt2).spec
    assert (spec.head, spec.generates, spec.vocabulary_size, spec.max_length) == ((), True, 257, 48)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_length", 16),
        ("train_items", 0),
        ("test_items", -1),
        ("num_beams", 0),
        ("num_beams", 65),
        ("length_penalty", -0.5),
    ],
)
def test_bad_fields_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Sounds\.{field}"):
        Sounds(**{"model": "x", field: value})


def test_what_a_model_must_have(tmp_path: Path, gpt2: str) -> None:
    with pytest.raises(ModelError, match="has 64 positions, max_new_tokens is 64"):
        _ = Sounds(model=gpt2, max_length=100, max_new_tokens=64).spec
    save_tokenizer(tmp_path, end=None)
    with pytest.raises(ModelError, match="has no end mark"):
        _ = Sounds(model=str(tmp_path)).tokenizer


def test_an_empty_split_is_refused(gpt2: str) -> None:
    class Empty(Sounds):
        def items(self, split: Split) -> list[Item]:
            return []

    with pytest.raises(DataError, match=r"core\.sounds: the dev split is empty"):
        Empty(model=gpt2).split("dev")
    with pytest.raises(TypeError, match="CausalGeneration must define items"):
        CausalGeneration(model=gpt2).items("train")


def test_chunks() -> None:
    assert [list(part) for part in chunks(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_conformance_suite_runs_on_it(gpt2: str) -> None:
    check_method(Norms(), Sounds(model=gpt2))

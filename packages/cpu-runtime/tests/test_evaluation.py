from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pareto_core.byte_llama import END, Recipe, tokenizer, untrained
from pareto_core.errors import ConfigError, DataError, ModelError, UnsupportedError
from pareto_cpu_runtime import evaluation
from pareto_cpu_runtime.evaluation import evaluate, harness_model, perplexity, score_continuations

TEXT = "def f(x):\n    return x + 1  # größer\n"
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    return untrained(Recipe(width=16, layers=2, heads=2, kv_heads=1, inner=32, positions=128)).eval()


def nats_of(model: Any, tokens: list[int], place: int, first: int = 0) -> float:
    """Log-likelihood of the token at ``place`` after those from ``first`` on, alone and in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[first:place]])).logits[0, -1].double()
    return float(logits.log_softmax(-1)[tokens[place]])


def test_perplexity_predicts_every_token_once(model: Any) -> None:
    tokens = [END, *TEXT.encode()]
    whole = perplexity(model, tokenizer(), TEXT)
    expected = -sum(nats_of(model, tokens, place) for place in range(1, len(tokens)))
    assert whole.nats == pytest.approx(expected, rel=1e-5)
    assert (whole.tokens, whole.size) == (len(TEXT.encode()), len(TEXT.encode()))
    assert whole.bits_per_byte == pytest.approx(math.log2(whole.per_token))
    windows = perplexity(model, tokenizer(), TEXT, max_length=7, rows=3)
    expected = -sum(nats_of(model, tokens, place, (place - 1) // 7 * 7) for place in range(1, len(tokens)))
    assert windows.nats == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary() -> None:
    def uniform(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    assert perplexity(uniform, tokenizer(), "+++").per_token == pytest.approx(50.0)


def test_continuations_do_not_depend_on_what_runs_beside_them(model: Any) -> None:
    pairs = [([5, 6], [7]), ([1, 2, 3, 4], [9, 9, 9]), ([8], [3, 2])]
    alone = [score_continuations(model, [pair], 1, 16)[0] for pair in pairs]
    together = score_continuations(model, pairs, 3, 16)
    assert [item.nats for item in together] == pytest.approx([item.nats for item in alone], rel=1e-5)
    expected = [
        sum(nats_of(model, [*context, *rest], len(context) + i) for i in range(len(rest))) for context, rest in pairs
    ]
    assert [item.nats for item in together] == pytest.approx(expected, rel=1e-5)


def test_greedy_is_said_of_what_generate_gives(model: Any) -> None:
    prompt = list(b"return ")
    made = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0].tolist()
    greedy, other = made[len(prompt) :], [b % 256 + 1 for b in made[len(prompt) :]]
    found = score_continuations(model, [(prompt, greedy), (prompt, other)], 2, 64)
    assert [item.greedy for item in found] == [True, False]


def test_a_long_context_is_cut_from_the_left(model: Any) -> None:
    context, rest = list(range(1, 40)), [50, 51]
    cut = score_continuations(model, [(context, rest)], 1, 8)[0]
    assert cut.nats == score_continuations(model, [(context[-7:], rest)], 1, 64)[0].nats


def test_what_cannot_be_scored_is_refused(model: Any) -> None:
    with pytest.raises(DataError, match="at least one token each"):
        score_continuations(model, [([], [1])], 1, 8)
    with pytest.raises(DataError, match="a continuation of 9 tokens is longer than max_length 8"):
        score_continuations(model, [([1], [2] * 9)], 1, 8)
    with pytest.raises(ConfigError, match="rows = 0"):
        score_continuations(model, [([1], [2])], 0, 8)
    with pytest.raises(ConfigError, match="max_length = 0"):
        perplexity(model, tokenizer(), TEXT, max_length=0)
    with pytest.raises(DataError, match="without tokens"):
        perplexity(model, tokenizer(), "")
    with pytest.raises(ModelError, match="hold NaN"):
        perplexity(lambda **_: SimpleNamespace(logits=torch.full((1, 2, 300), torch.nan)), tokenizer(), "ab")


def test_without_the_harness_the_remedy_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r'pip install "pareto-cpu-runtime\[eval\]"'):
        evaluate(model, tokenizer(), ["piqa"])


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@needs_harness
def test_the_harness_is_told_what_we_compute(model: Any) -> None:
    lm = harness_model(model, tokenizer(), max_length=16, rows=2, max_new_tokens=8)
    ((nats, greedy),) = lm.loglikelihood([request("ab", " cd")])
    (expected,) = score_continuations(model, [(list(b"ab"), list(b" cd"))], 1, 16)
    assert (nats, greedy) == (pytest.approx(expected.nats), expected.greedy)
    ((nats, _),) = lm.loglikelihood([request("", "xyz")])
    assert nats == pytest.approx(-perplexity(model, tokenizer(), "xyz").nats)
    text = TEXT[:32]  # two windows: the harness gives a shorter last one more context
    (rolling,) = lm.loglikelihood_rolling([request(text)])
    assert rolling == pytest.approx(-perplexity(model, tokenizer(), text, max_length=16).nats, rel=1e-5)


@needs_harness
def test_generation_ends_at_the_stop_text(model: Any) -> None:
    lm = harness_model(model, tokenizer(), max_length=64, max_new_tokens=12)
    ids = torch.tensor([list(b"def f")])
    made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 5:].tolist()
    text = tokenizer().decode(made, skip_special_tokens=True)
    (free,) = lm.generate_until([request("def f", {"until": []})])
    assert free == text
    stop = text[4:6]
    (stopped,) = lm.generate_until([request("def f", {"until": [stop], "max_gen_toks": 12, "do_sample": False})])
    assert stopped == text.partition(stop)[0]
    with pytest.raises(UnsupportedError, match="generation is greedy"):
        lm.generate_until([request("a", {"do_sample": True})])
    with pytest.raises(UnsupportedError, match="generation option num_beams = 3 is not one of"):
        lm.generate_until([request("a", {"num_beams": 3})])
    with pytest.raises(DataError, match="max_gen_toks = 64: must be from 1 to 63"):
        lm.generate_until([request("a", {"max_gen_toks": 64})])


@pytest.fixture
def local_task(tmp_path: Path) -> str:
    """A folder with a multiple-choice task and a rolling one, whose data lie beside them."""
    items = [
        {"question": f"{a} plus {b} is", "choices": [str(a + b), "none"], "gold": a % 2}
        for a in range(3)
        for b in (1, 2)
    ]
    texts = [{"text": "one two three"}, {"text": "four"}]
    for name, rows in (("items", items), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = "dataset_path: json\ntest_split: test\nmetadata:\n  version: 1\n"
    shared += "dataset_kwargs:\n  data_files:\n    test: {file}\n"
    (tmp_path / "sums.yaml").write_text(
        "task: pareto_sums\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n" + shared.format(file=tmp_path / "items.jsonl")
    )
    (tmp_path / "words.yaml").write_text(
        "task: pareto_words\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n" + shared.format(file=tmp_path / "texts.jsonl")
    )
    return str(tmp_path)


@needs_harness
def test_local_tasks_run_offline(
    model: Any, local_task: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from pareto_cpu_runtime.tasks.harness import Harness

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    root = tmp_path_factory.mktemp("model")
    model.save_pretrained(root)
    tokenizer().save_pretrained(root)
    task = Harness(
        model=str(root),
        tasks=("pareto_sums", "pareto_words"),
        data=local_task,
        max_length=64,
        rows=3,
        prompt=4,
        long_prompt=8,
        length=16,
        new_tokens=2,
    )
    records = task.records(model, "test")
    right = []
    for a in range(3):
        for b in (1, 2):
            pairs = [(list(f"{a} plus {b} is".encode()), list(f" {c}".encode())) for c in (a + b, "none")]
            nats = [item.nats for item in score_continuations(model, pairs, 1, 64)]
            right.append(float(nats.index(max(nats)) == a % 2))
    assert [record.prediction for record in records[:6]] == right
    scores = task.score(records)
    assert scores["accuracy"] == scores["pareto_sums_accuracy"] == pytest.approx(100 * sum(right) / 6)
    nats = sum(perplexity(model, tokenizer(), text).nats for text in ("one two three", "four"))
    assert scores["pareto_words_word_perplexity"] == pytest.approx(math.exp(nats / 4), rel=1e-4)
    assert next(task.batches("train", 2, 0))["input_ids"].shape == (2, 16)
    assert {name: r.inputs["input_ids"].shape[1] for name, r in task.requests().items()} == {
        "forward": 4,
        "generate": 4,
        "forward_long": 8,
        "generate_long": 8,
    }
    with pytest.raises(DataError, match="has no task 'no_such_task'"):
        evaluation.evaluate(model, tokenizer(), ["no_such_task"])
    with pytest.raises(DataError, match="no records with an accuracy"):
        task.score(records[6:])

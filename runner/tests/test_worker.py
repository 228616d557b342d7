"""What runs in a child: timed forward passes and generations, optimizer steps, and how errors are told."""

from __future__ import annotations

import dataclasses
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pareto_core import Engine, MethodSpec, ModelError, RunSpec, Stage, TaskRef, UnsupportedError
from pareto_core.spec import Budget, Training
from pareto_runner import worker
from pareto_runner.run import Artifact, prepare

MIB = 2**20
WORDS = ["good", "bad", "film", "plot", "a", "the", "sst2", "sentence", ":", "positive", "negative"]


def tiny_t5(folder: Path) -> dict[str, Any]:
    """SST-2 of made-up sentences in GLUE's format, and a random T5 that knows their words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    data = folder / "glue" / "SST-2"
    data.mkdir(parents=True)
    rows = [f"a {kind} film the plot {kind}\t{label}" for kind, label in (("good", 1), ("bad", 0)) for _ in range(520)]
    (data / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (data / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[515:525]]) + "\n")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model = folder / "t5"
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(model)
    config = T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_heads=4, num_layers=1, dropout_rate=0.0)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 0, 1
    T5ForConditionalGeneration(config).save_pretrained(model)
    return {"subset": "sst2", "data": str(folder / "glue"), "model": str(model), "max_length": 32}


@pytest.fixture(scope="module")
def generating(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("t5")
    training = Training(learning_rate=1e-2, batch_size=8, budget=Budget(max_steps=3))
    spec = RunSpec(
        question="q",
        variant="v",
        stages=(Stage(methods=(MethodSpec(name="bitfit"),), training=training),),
        task=TaskRef(name="core.glue", fields=tiny_t5(folder)),
        target="xeon",
        engine=Engine(name="torch", precision="fp32"),
    )
    return prepare(spec, folder / "artifact")


def test_a_generation_has_first_and_next_token_times(generating: Artifact) -> None:
    turns = worker.InferenceTurns(generating)
    assert turns.requests()["chapter4"] == {"batch_size": 1, "repeats": 3}
    chosen = turns.choose("generate")
    assert chosen["difference"] == 0.0
    found = turns.turn(0.01)
    for total, first, after in zip(found["times"], found["first"], found["next"], strict=True):
        assert 0 < first < total
        assert 0 < after < total


def test_biases_that_a_method_added_survive_saving_and_the_answer_is_checked(generating: Artifact) -> None:
    turns = worker.InferenceTurns(generating)
    assert turns.choose("batch1")["difference"] < 1e-5
    path = generating.directory / "reference.safetensors"
    good = load_file(path)
    save_file({**good, "batch1": good["batch1"] + 1}, path)
    try:
        assert turns.choose("batch1")["difference"] > 0.1
    finally:
        save_file(good, path)


def test_the_protocol_takes_its_runs_and_forwards_have_no_token_times(generating: Artifact) -> None:
    turns = worker.InferenceTurns(generating)
    turns.choose("chapter4")
    found = turns.protocol()
    assert set(found) == {"times"}
    assert len(found["times"]) == 200


def test_the_token_clock_leaves_the_prompt_out() -> None:
    clock = worker.TokenClock(lambda: None)
    for value in (torch.tensor([[1, 2, 3]]), torch.tensor([4]), torch.tensor([5])):
        clock.put(value)
    clock.end()
    assert len(clock.times) == 2
    assert clock.times == sorted(clock.times)


@pytest.mark.parametrize(
    ("batch_size", "puts"),
    [
        (1, [torch.tensor([1])] * 5),
        (1, [torch.tensor([1]), torch.tensor([1, 2, 3, 4])]),
        (1, [torch.tensor([[1]]), torch.tensor([[1, 2]]), torch.tensor([[1, 2]])]),
        (3, [torch.tensor([1, 2, 3])] * 5),
        (2, [torch.tensor([[1], [2]]), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])]),
    ],
)
def test_the_token_clock_counts_tokens_not_arrivals(batch_size: int, puts: list[torch.Tensor]) -> None:
    clock = worker.TokenClock(lambda: None, batch_size)
    clock.put(torch.zeros(batch_size, 7))
    for value in puts:
        clock.put(value)
    clock.times = [10.0, *[11.0] * (len(puts) - 2), 12.0]
    assert clock.next_token_seconds() == 0.5  # four tokens after the first, in two seconds


def test_each_token_is_awaited_before_its_time_is_taken() -> None:
    waited: list[int] = []
    clock = worker.TokenClock(lambda: waited.append(len(clock.times)))
    for _ in range(3):
        clock.put(torch.tensor([1]))
    assert waited == [0, 1]


def test_a_model_that_tells_of_no_tokens_cannot_be_timed_by_them(
    generating: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = worker.InferenceTurns(generating)
    turns.choose("generate")
    monkeypatch.setattr(turns, "_call", lambda streamer: None)
    with pytest.raises(UnsupportedError, match="without telling its streamer"):
        turns.turn(0.01)


def test_the_peak_of_a_request_is_that_of_all_its_calls(generating: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = worker.InferenceTurns(generating)
    before = turns.choose("batch1")["peak_mib"]

    def call() -> None:
        with mmap.mmap(-1, 64 * MIB) as block:
            block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)

    monkeypatch.setattr(turns, "_call", call)
    turns.turn(0.01)
    assert 60 < turns.peak()["peak_mib"] - before < 68
    assert turns.choose("batch1")["peak_mib"] < before + 16  # forgotten with the request that it belonged to


def test_the_weight_of_libraries_is_not_the_models(
    generating: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = generating.libraries()
    assert {"transformers.models.t5.modeling_t5", "torch.nn.modules.linear"} <= set(made)
    (tmp_path / "heavy_library.py").write_text(f"weight = b'x' * {64 * MIB}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Artifact, "libraries", lambda self: [*made, "heavy_library", "made.at.run.time"])
    turns = worker.InferenceTurns(generating)
    assert "heavy_library" in sys.modules
    assert turns.load_peak_mib < 32
    assert turns.choose("batch1")["peak_mib"] < 32


def test_training_turns_take_the_asked_number_of_steps(generating: Artifact) -> None:
    turns = worker.TrainingTurns(generating)
    assert len(turns.steps(3)["times"]) == 3


def test_a_stage_that_trains_nothing_has_no_training_turns(
    generating: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = dataclasses.replace(generating)
    monkeypatch.setattr(worker.StageWork, "build", lambda self, model: model)
    assert not worker.TrainingTurns(frozen).trains


def test_errors_are_told_with_their_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.failure(UnsupportedError("not here")) == {"error": "not here", "kind": "unsupported"}
    assert worker.failure(ModelError("bad")) == {"error": "bad", "kind": "failed"}
    assert worker.failure(RuntimeError("surprise")) == {"error": "RuntimeError: surprise", "kind": "failed"}
    assert "surprise" in capsys.readouterr().err

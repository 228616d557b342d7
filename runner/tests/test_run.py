"""``prepare`` in this process: composition, teachers, borrowed labels, checks on what methods return."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from pareto_core import Engine, MethodSpec, ModelError, Paper, RunSpec, Stage, TaskRef, UnknownNameError
from pareto_core.method import Method
from pareto_core.spec import Budget, Training
from pareto_runner import discover, run
from pareto_runner.run import Artifact, load_deployed, measure, prepare


def spec(*stages: Stage, **changes: Any) -> RunSpec:
    values: dict[str, Any] = {
        "question": "q",
        "variant": "v",
        "stages": stages,
        "task": TaskRef(name="core.tiny"),
        "target": "xeon",
        "engine": Engine(name="torch", precision="fp32"),
    }
    return RunSpec(**{**values, **changes})


def stage(name: str, steps: int = 4, more: dict[str, Any] | None = None, **fields: Any) -> Stage:
    training = Training(learning_rate=1e-2, batch_size=16, budget=Budget(max_steps=steps))
    return Stage(methods=(MethodSpec(name=name, fields=fields),), training=training, **(more or {}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spy(Method):
    """Freezes nothing and trains nothing; remembers what it was given."""

    paper = Paper("t", "a", 2000, "https://example.org")
    seen: ClassVar[dict[str, Any]] = {}

    def build(self, task: Any, model: Any = None, teacher: Any = None) -> Any:
        self.seen.update(model=model, teacher=teacher, frozen=not any(p.requires_grad for p in model.parameters()))
        return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spoiler(Spy):
    """Claims to finish exactly, and does not."""

    def finish(self, model: Any, task: Any) -> Any:
        with torch.no_grad():
            model.classifier.bias += 1
        return model


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    real = discover.method_class
    extra: dict[str, type[Method]] = {"spy": Spy, "spoiler": Spoiler}
    monkeypatch.setattr(discover, "method_class", lambda name: extra.get(name) or real(name))
    monkeypatch.setattr(run, "packages_of", lambda spec: set())


def test_prepare_scores_saves_and_measures_every_phase(tmp_path: Path) -> None:
    losses: list[float] = []
    artifact = prepare(
        spec(stage("krona", steps=30, a_shape=[8, 6])), tmp_path, on_step=lambda s, n, loss: losses.append(loss)
    )
    result = Artifact.read(tmp_path).result
    assert result == artifact.result
    assert [loss for _, loss in result.curve] == losses
    assert len(losses) == 30
    # 4 layers' q and v: 8·6 + (48/8)·(48/6) each; and the head: 48·2 + 2.
    assert result.value("trainable_parameters") == 4 * (48 + 48) + 98
    assert result.value("finish_difference") < 1e-5  # type: ignore[operator]
    assert result.value("train_peak_mib") < 500  # type: ignore[operator]
    for phase in ("prepare", "build", "train", "finish", "evaluate"):
        assert result.value(f"time_s.{phase}") > 0  # type: ignore[operator]
    task = discover.make_task(artifact.spec.task)
    records = json.loads((tmp_path / "records.json").read_text())
    loaded = load_deployed(artifact)
    assert [r["prediction"] for r in records] == [r.prediction for r in task.records(loaded, "test")]
    assert result.value("accuracy") == task.score(task.records(loaded, "test"))["accuracy"]


def test_stages_run_in_order_on_frozen_models_with_the_named_teacher(tmp_path: Path, known: None) -> None:
    first = stage("full", more={"name": "dense"})
    last = Stage(methods=(MethodSpec(name="spy"),), teacher="dense")
    artifact = prepare(spec(first, last), tmp_path)
    assert Spy.seen["frozen"]
    teacher, model = Spy.seen["teacher"], Spy.seen["model"]
    assert teacher is not model
    assert torch.equal(teacher.classifier.weight, model.classifier.weight)
    untrained = discover.make_task(TaskRef(name="core.tiny")).backbone()
    assert not torch.equal(teacher.classifier.weight, untrained.classifier.weight)  # type: ignore[union-attr]
    assert len(artifact.result.curve) == 4


def test_two_methods_of_one_stage_are_trained_together(tmp_path: Path, known: None) -> None:
    both = Stage(
        methods=(MethodSpec(name="bitfit"), MethodSpec(name="krona", fields={"a_shape": [8, 6]})),
        training=Training(batch_size=16, budget=Budget(max_steps=2)),
    )
    result = prepare(spec(both), tmp_path).result
    alone = prepare(spec(stage("krona", steps=2, a_shape=[8, 6])), tmp_path / "alone").result
    assert result.value("trainable_parameters") > alone.value("trainable_parameters")  # type: ignore[operator]


def test_labels_can_come_from_another_variant(tmp_path: Path) -> None:
    giver = prepare(spec(stage("full"), task=TaskRef(name="core.docstrings", fields=small(tmp_path))), tmp_path / "a")
    taker_stage = stage("full", more={"labels_from": "giver"})
    taker = prepare(spec(taker_stage, variant="taker", task=giver.spec.task), tmp_path / "b", labels=tmp_path / "a")
    assert taker.result.status == "ok"
    assert taker.result.curve != giver.result.curve


def small(folder: Path) -> dict[str, Any]:
    """A docstring corpus of two modules, and a random BERT with a word-level tokenizer, both on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    for module, word in (("alpha", "red"), ("beta", "blue")):
        functions = [
            f'def f{i}():\n    """Return the {word} number {i} of {module} kind w{i * 7}."""\n' for i in range(60)
        ]
        (source / f"{module}.py").write_text("\n".join(functions))
    words = ["[PAD]", "[UNK]", "red", "blue", *(f"w{i * 7}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    model = folder / "model"
    fast.save_pretrained(model)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(model)
    return {"data": str(source), "model": str(model), "max_length": 16}


def test_a_finish_that_breaks_its_promise_is_refused(tmp_path: Path, known: None) -> None:
    with pytest.raises(ModelError, match="Spoiler changed the outputs"):
        prepare(spec(Stage(methods=(MethodSpec(name="spoiler"),))), tmp_path)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path) -> None:
    runs = [prepare(spec(stage("full"), seed=seed), tmp_path / str(i)).result for i, seed in enumerate((5, 5, 6))]
    assert runs[0].curve == runs[1].curve != runs[2].curve


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"task": TaskRef(name="core.tinny")}, "'core.tiny'"),
        ({"target": "gpus"}, "'gpu'"),
        ({"requests": ("batch2",)}, "'batch1'"),
        ({"stages": (Stage(methods=(MethodSpec(name="krone"),)),)}, "'krona'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=name):
        prepare(dataclasses.replace(spec(stage("full")), **changes), tmp_path)


def test_measuring_nothing_gives_nothing() -> None:
    assert measure([]) == []


def test_a_worker_imports_large_libraries_only_when_its_task_does() -> None:
    code = """
import sys
from pareto_runner import worker
from pareto_runner.randomness import seed_everything
heavy = {"transformers", "deepspeed", "mlflow", "peft", "matplotlib"}
before = {"torch", *heavy} & set(sys.modules)
worker.set_threads()
seed_everything(0)
print(sorted(before), sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"

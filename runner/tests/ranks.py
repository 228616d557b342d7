"""Trainings that one process and two must agree on, and one that is killed; DeepSpeed's launcher runs this file.

Arguments: a directory for checkpoints, and ``all``, after which the second process waits at step 7 of the last training
to be killed, or ``rest``, which goes on from there.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from pareto_core import Batch, Budget, Engine, Metric, Split, Task, Training
from pareto_runner.checkpoint import Checkpoints
from pareto_runner.engines import distributed, make_loop
from pareto_runner.isolate import say
from pareto_runner.phases import Phases
from pareto_runner.targets.xeon import XeonTarget
from pareto_runner.train import TrainingRun, train

STEPS = 20
WORDS = 16


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Speaker(nn.Module):
    """Predicts a word from its place's token alone; ``kind`` says which labels its mean loss is over.

    ``rows``: one label a row. ``tokens``: one a token, -100 where there is none. ``next``: the token after, as causal
    language models do.
    """

    def __init__(self, kind: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        self.loss_type = {"rows": None, "tokens": "ForTokenClassification", "next": "ForCausalLM"}[kind]
        generator = torch.Generator().manual_seed(7)
        self.embedding = nn.Embedding(WORDS, 12)
        self.hidden, self.head = nn.Linear(12, 12), nn.Linear(12, WORDS)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Output:
        hidden = self.dropout(torch.tanh(self.hidden(self.embedding(input_ids))))
        logits = self.head(hidden.mean(1) if self.kind == "rows" else hidden)
        seen, wanted = (logits[:, :-1], labels[:, 1:]) if self.kind == "next" else (logits, labels)
        loss = nn.functional.cross_entropy(seen.reshape(-1, WORDS), wanted.reshape(-1))
        return Output(loss, logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths(Task):
    """Rows whose numbers of labelled tokens differ widely; in every batch some have none."""

    name: ClassVar[str] = "lengths"
    metric: ClassVar[Metric] = Metric("accuracy")

    kind: str = "tokens"

    def size(self, split: Split) -> int:
        return 64

    def batches(self, split: Split, batch_size: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.size(split) // batch_size):
            ids = torch.randint(0, WORDS, (batch_size, 10), generator=generator)
            if self.kind == "rows":
                yield {"input_ids": ids, "labels": ids[:, 0]}
                continue
            # Later rows have fewer labels, the last three none: the second process gets less than the first.
            lengths = torch.linspace(10, -2, batch_size).clamp(min=0).long().unsqueeze(1)
            yield {"input_ids": ids, "labels": ((ids + 3) % WORDS).where(torch.arange(10) < lengths, -100)}


def settings(accumulation: int = 1) -> Training:
    return Training(
        learning_rate=0.05, batch_size=12, gradient_accumulation=accumulation, budget=Budget(max_steps=STEPS)
    )


def curve(kind: str, zero_stage: Any, accumulation: int, processes: int) -> list[float]:
    """Losses of a training in global batches of 12 rows, without dropout."""
    model, training = Speaker(kind), settings(accumulation)
    engine = Engine(zero_stage=zero_stage, processes=processes)
    loop = make_loop(model, training, engine, "fp32", "cpu", "cpu", lambda: Speaker(kind))
    run = train(loop, model, Lengths(kind=kind), (), training, 3, lambda *_: None)
    loop.finish()
    return [loss for _, loss in run.curve]


def with_checkpoints(directory: Path, on_step: Any) -> TrainingRun:
    """A training with dropout in two processes, and a checkpoint after every step."""
    model, training = Speaker("tokens", dropout=0.3), settings()
    loop = make_loop(model, training, Engine(zero_stage=2, processes=2), "fp32", "cpu", "cpu", lambda: model)
    checkpoints = Checkpoints(directory, "identity", Phases(XeonTarget()), seconds=0)
    return train(loop, model, Lengths(), (), training, 3, on_step, checkpoints)


#: kind, ZeRO stage, gradient accumulation
CASES = (("rows", 0, 1), ("rows", 2, 1), ("tokens", 0, 1), ("tokens", 2, 3), ("tokens", 3, 1), ("next", 1, 2))


def tell(**message: Any) -> None:
    if distributed()[0] == 0:
        say(message)


def main(directory: Path, what: str) -> None:
    torch.set_num_threads(1)
    if what == "all":
        for case in CASES:
            tell(case=case, curve=curve(*case, processes=2))
        tell(whole=with_checkpoints(directory / "whole", lambda *_: None).curve)

    def on_step(step: int, steps: int, loss: float) -> None:
        tell(step=step)
        if (what, step, distributed()[0]) == ("all", 7, 1):
            signal.pause()

    run = with_checkpoints(directory / "cut", on_step)
    tell(rest=run.curve, resumed=run.resumed_steps)


if __name__ == "__main__":
    main(Path(sys.argv[-2]), sys.argv[-1])

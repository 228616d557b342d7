"""Perplexity of a text, and the tasks of lm-evaluation-harness, for anything that is called as a decoder.

A model is a :class:`~pareto_cpu_runtime.runtime.Runtime`, a transformers model, or what a method deployed: called with
``input_ids`` and ``attention_mask`` it returns an object with ``logits`` (rows, length, vocabulary).

The harness is an optional part: ``pip install "pareto-cpu-runtime[eval]"``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pareto_core.errors import ConfigError, DataError, ModelError, UnsupportedError

#: the tasks whose accuracies the chapter averages (table 3.2)
CHAPTER_TASKS = ("lambada_openai", "hellaswag", "winogrande", "piqa")


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text: ``nats`` is the negative log-likelihood of its ``tokens``, ``size`` its bytes."""

    nats: float
    tokens: int
    size: int

    @property
    def per_token(self) -> float:
        """Perplexity of a token: comparable between models of one tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.size


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have given it."""

    nats: float
    greedy: bool


def perplexity(model: Any, tokenizer: Any, text: str, max_length: int = 512, rows: int = 1) -> Perplexity:
    """Score ``text`` in windows of ``max_length`` tokens, each token once; ``rows`` windows run together.

    The first token of a window is predicted from the last of the window before it, that of the first from the
    tokenizer's mark of a beginning or an end. Raises :class:`DataError` where the text has no tokens.
    """
    if max_length < 1:
        raise ConfigError("perplexity", "max_length", max_length, "must be at least 1")
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise DataError("a text without tokens has no perplexity")
    before = [prefix_token(tokenizer), *tokens[:-1]]
    pairs = [
        (before[start : start + 1], tokens[start : start + max_length]) for start in range(0, len(tokens), max_length)
    ]
    found = score_continuations(model, pairs, rows, max_length)
    return Perplexity(-sum(item.nats for item in found), len(tokens), len(text.encode()))


def prefix_token(tokenizer: Any) -> int:
    """The mark that stands before a text's first token; raises :class:`ModelError` where the tokenizer has none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer has neither a mark of beginning nor of end: nothing precedes a text's first token")


def score_continuations(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int, max_length: int
) -> list[Scored]:
    """Score each continuation after its context, in the order of ``pairs``; both are tokens, neither is empty.

    Contexts are cut from the left so that ``max_length`` tokens go in; ``rows`` pairs of similar length run together,
    padded on the right. Raises :class:`DataError` for a continuation that is longer than that.
    """
    if rows < 1:
        raise ConfigError("score_continuations", "rows", rows, "must be at least 1")
    for context, continuation in pairs:
        if not context or not continuation:
            raise DataError("a context and its continuation need at least one token each")
        if len(continuation) > max_length:
            raise DataError(f"a continuation of {len(continuation)} tokens is longer than max_length {max_length}")
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    found: list[Scored | None] = [None] * len(pairs)
    for start in range(0, len(order), rows):
        chunk = order[start : start + rows]
        for index, scored in zip(chunk, _score([pairs[i] for i in chunk], model, max_length), strict=True):
            found[index] = scored
    return [scored for scored in found if scored is not None]


def _score(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], model: Any, max_length: int) -> Iterator[Scored]:
    import torch

    inputs = [[*context, *continuation][-max_length - 1 : -1] for context, continuation in pairs]
    width = max(map(len, inputs))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in inputs])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs])
    device = next((p.device for p in model.parameters()), "cpu") if hasattr(model, "parameters") else "cpu"
    with torch.inference_mode():
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    for row, (_, continuation) in enumerate(pairs):
        end = len(inputs[row])
        nats = logits[row, end - len(continuation) : end].float().log_softmax(-1).cpu()
        wanted = torch.tensor(list(continuation))
        total = float(nats.gather(-1, wanted[:, None]).double().sum())
        if math.isnan(total):
            raise ModelError("the model's logits hold NaN: nothing can be scored")
        yield Scored(total, bool((nats.argmax(-1) == wanted).all()))


def harness_model(
    model: Any, tokenizer: Any, max_length: int = 2048, rows: int = 1, max_new_tokens: int | None = None
) -> Any:
    """Return ``model`` as a model of lm-evaluation-harness, to be given to its ``simple_evaluate``.

    ``max_length`` is the longest text, prompt and continuation together; ``rows`` texts run together; generation ends
    after ``max_new_tokens`` (256, or half of ``max_length``) where a task says nothing. Raises
    :class:`UnsupportedError` where the harness is not installed.
    """
    _require_harness()
    from pareto_cpu_runtime.harness_lm import HarnessLM

    return HarnessLM(model, tokenizer, max_length, rows, max_new_tokens or min(256, max_length // 2))


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = CHAPTER_TASKS,
    *,
    max_length: int = 2048,
    rows: int = 1,
    limit: int | None = None,
    include: str | None = None,
) -> dict[str, Any]:
    """Run ``tasks`` of lm-evaluation-harness; returns its results, ``samples`` by task among them.

    ``limit`` keeps the first so many items of each task; ``include`` is a folder with further tasks' YAML files.
    Raises :class:`UnsupportedError` where the harness is not installed, :class:`DataError` for a task that it has not,
    or whose data are not to be had.
    """
    _require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise DataError(f"lm-evaluation-harness has no task {unknown[0]!r} (of {len(manager.all_tasks)})")
    try:
        found = simple_evaluate(
            harness_model(model, tokenizer, max_length, rows),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (OSError, ConnectionError, FileNotFoundError) as error:
        raise DataError(f"the data of {', '.join(tasks)} cannot be read: {error}") from error
    assert found is not None
    return dict(found)


def _require_harness() -> None:
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError('lm-evaluation-harness is not installed: pip install "pareto-cpu-runtime[eval]"')

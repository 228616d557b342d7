"""Calibration tokens, and what flows into each block of a model when it sees them.

Blocks are run one at a time, outside the model: their other arguments (masks, positions, rotary tables) are recorded
once, from a pass in which every block hands its input on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pareto_core.errors import DataError, ModelError
from pareto_core.task import Task
from pareto_cpu_runtime.quantise.config import QuantisationConfig
from pareto_cpu_runtime.quantise.operators import find_blocks

#: what :func:`calibration_tokens` reads: a task, token numbers (rows, length), or batches of them
Calibration = Task | torch.Tensor | Iterable[Any]


def calibration_tokens(calibration: Calibration | None, config: QuantisationConfig, model: Any) -> torch.Tensor:
    """Return at most ``config.samples`` rows of ``config.length`` token numbers, int64 (samples, length).

    A tensor whose rows have that length or less is taken as it is. Otherwise the batches' tokens (where a mask
    marks padding, the others) are strung together and cut into rows. Rows are no longer than the model's positions, and
    all are shorter where there are too few tokens for one.

    Raises :class:`DataError` where there are no tokens, or one that the model's vocabulary does not have.
    """
    if calibration is None:
        raise DataError(f"the method {config.method!r} needs calibration: a task, or token numbers (rows, length)")
    length = min(config.length, _positions(model.config) or config.length)
    if isinstance(calibration, torch.Tensor) and calibration.dim() == 2 and 0 < calibration.shape[1] <= length:
        rows = _whole(calibration[: config.samples])
    else:
        stream = _stream(calibration, config, length)
        length = min(length, len(stream))
        count = min(config.samples, len(stream) // length) if length else 0
        rows = stream[: count * length].view(count, length) if count else stream.view(0, 0)
    if rows.numel() == 0:
        raise DataError("the calibration holds no tokens")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"calibration tokens run from {low} to {high}, the model's vocabulary from 0 to {vocabulary - 1}"
        )
    return rows


def _stream(calibration: Calibration, config: QuantisationConfig, length: int) -> torch.Tensor:
    """Tokens of the batches one after the other, as many as are needed."""
    if isinstance(calibration, Task):
        calibration = calibration.batches("train", config.batch_size, config.seed)
    pieces, needed = [torch.zeros(0, dtype=torch.long)], config.samples * length
    for batch in [calibration] if isinstance(calibration, torch.Tensor) else calibration:
        pieces.append(_tokens(batch))
        needed -= len(pieces[-1])
        if needed <= 0:
            break
    return torch.cat(pieces)


def _tokens(batch: Any) -> torch.Tensor:
    mask = None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise DataError(f"a calibration batch has no input_ids; it has {', '.join(map(str, batch)) or 'nothing'}")
        batch, mask = batch["input_ids"], batch.get("attention_mask")
    tokens = _whole(torch.as_tensor(batch))
    return (tokens if mask is None else tokens[torch.as_tensor(mask).bool()]).reshape(-1)


def _whole(tokens: torch.Tensor) -> torch.Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise DataError(f"calibration tokens must be whole numbers, not {tokens.dtype}")
    return tokens.long()


def _positions(config: Any) -> int | None:
    """The longest text of a model, under the names that transformers' configs have for it; None without such a limit.

    MPT has a name of its own; transformers makes its ALiBi biases for so many tokens and no more.
    """
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a block is called with beside the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, block: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """Return the block's output for ``hidden`` (batch, length, width)."""
        output = block(hidden, *self.positional, **self.named)
        return output[0] if isinstance(output, tuple) else output


class BlockInputs:
    """Runs a model with its blocks switched through, to learn what they are called with and what its head receives."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.name, self.blocks = find_blocks(model)
        self._wrap: Callable[[torch.Tensor], Any] | None = None

    def first(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        """Return the hidden states that enter the first block (batch, length, width), and every block's arguments."""
        entered: list[torch.Tensor] = []
        arguments: list[Arguments] = []

        def record(index: int, hidden: torch.Tensor, rest: Arguments) -> torch.Tensor:
            if index == 0:
                entered.append(hidden.detach().clone())
            arguments.append(rest)
            return hidden

        with self._through(record):
            self.model(input_ids=tokens)
        if len(entered) != 1 or len(arguments) != len(self.blocks):
            raise ModelError(f"{type(self.model).__name__} does not run the blocks of {self.name} once each, in order")
        return entered[0], arguments

    def into(self, module: nn.Module, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Return what ``module``, which follows the blocks, receives when the last block gives ``last``."""
        received: list[torch.Tensor] = []

        def take(hidden: torch.Tensor) -> torch.Tensor:
            received.append(hidden.detach())
            raise _Reached

        final = len(self.blocks) - 1
        blocks = self._through(lambda index, hidden, _: last if index == final else hidden)
        with blocks, _forward(module, take), contextlib.suppress(_Reached):
            self.model(input_ids=tokens)
        if not received:
            raise ModelError(f"{type(self.model).__name__} does not run its output embedding after its blocks")
        return received[0]

    @contextlib.contextmanager
    def _through(self, act: Callable[[int, torch.Tensor, Arguments], torch.Tensor]) -> Iterator[None]:
        def forward_of(index: int, block: nn.Module) -> Callable[..., Any]:
            original = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                named = dict(kwargs)
                hidden = args[0] if args else named.pop("hidden_states")
                if self._wrap is None:
                    self._wrap = _wrapper(original(*args, **kwargs))
                return self._wrap(act(index, hidden, Arguments(args[1:], named)))

            return forward

        with contextlib.ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            for index, block in enumerate(self.blocks):
                stack.enter_context(_forward(block, forward_of(index, block)))
            yield


class _Reached(Exception):
    """Ends a pass once its purpose is served."""


def _wrapper(output: Any) -> Callable[[torch.Tensor], Any]:
    """How a block gives its hidden states: as they are, or first of several."""
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda hidden: (hidden, *rest)
    return lambda hidden: hidden


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training, cache = model.training, getattr(model.config, "use_cache", None)
    model.eval()
    if cache is not None:
        model.config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        if cache is not None:
            model.config.use_cache = cache

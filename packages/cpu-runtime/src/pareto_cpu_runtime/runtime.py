"""The runtime: a decoder on native kernels that is called, and generates, the way a transformers model does."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pareto_core.errors import ConfigError, DataError, ModelError
from pareto_cpu_runtime import memory
from pareto_cpu_runtime.families import describe
from pareto_cpu_runtime.families.build import Builder, Built, Limits, check_limits
from pareto_cpu_runtime.memory import MemoryPlan
from pareto_cpu_runtime.pool import made_pool, thread_count
from pareto_cpu_runtime.slots import Slots

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from pareto_cpu_runtime.batching import Engine
    from pareto_cpu_runtime.families.description import Decoder
    from pareto_cpu_runtime.quantise.config import Precision
    from pareto_cpu_runtime.sources import Source

#: the cache's length where none is asked for, or the model's own where that is shorter
DEFAULT_LENGTH = 2048
CACHE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
INT4 = "int4"


class Runtime:
    """A decoder with its cache; :meth:`from_pretrained` makes one.

    ``runtime(input_ids=...)`` returns logits and loss, ``runtime.generate(...)`` takes transformers' arguments.
    """

    def __init__(
        self,
        source: Source,
        *,
        threads: int | None = None,
        max_length: int | None = None,
        slots: int = 4,
        max_rows: int = 512,
        cache_dtype: str = "bf16",
        kernel: str = "auto",
        compute: str = "",
    ) -> None:
        self.config, self.generation_config = source.config, source.generation_config
        self.decoder = describe(source.config)
        length = min(self.decoder.positions, DEFAULT_LENGTH) if max_length is None else max_length
        limits = Limits(
            max_rows=max_rows, slots=slots, length=length, cache_dtype=cache_dtype, kernel=kernel, compute=compute
        )
        check_limits(limits)
        memory.require_memory(estimate(self.decoder, source, limits))
        self.threads = thread_count(threads)
        self._built = self._build(source, self._pool(), limits)
        self.max_length, self.max_rows, self.limits = length, max_rows, limits
        self.slots = Slots(slots)

    def _pool(self) -> Any:
        """Threads on all CPUs that this process may use: each bound to one where there are as many as threads."""
        return made_pool(self.threads, memory.cpus())

    def _build(self, source: Source, pool: Any, limits: Limits) -> Built:
        return Builder(self.decoder, source, pool, limits).build()

    @classmethod
    def from_pretrained(
        cls,
        path_or_model: Any,
        *,
        precision: Precision | Literal["int4"] | None = INT4,
        threads: int | None = None,
        max_length: int | None = None,
        slots: int = 4,
        max_rows: int = 512,
        cache_dtype: str = "bf16",
        kernel: str = "auto",
        compute: str = "",
        memory: Literal["read", "map"] = "read",
    ) -> Runtime:
        """Make a runtime of a packed directory, a transformers directory or model, or a ``QuantisedModel``.

        Weights that are not quantised yet are rounded to nearest by ``precision`` ("int4": symmetric, groups of 32, or
        one scale per output where 32 does not divide the inputs); None keeps them. ``threads`` default to torch's, at
        most one per CPU of the affinity; where they are as many as those CPUs, each of the runtime's own is bound to
        one of them, else none is. The cache holds ``slots`` texts of ``max_length`` tokens; ``max_rows`` tokens run in
        one call, longer prompts in several. ``kernel`` and ``compute`` ("int8", "fp32", "bf16", "fp16") narrow the
        choice of kernels. ``memory`` says whether packed weights are read or mapped. A child process (fork) may go on
        with a runtime: it starts threads of its own.

        Raises :class:`DataError` for files that are missing, cut off or tampered with, :class:`ModelError` for weights
        that do not fit the config or are not finite, :class:`UnsupportedError` for an architecture that the runtime has
        not, for a model larger than the memory that is available, and for threads that the system refuses.
        """
        if memory not in ("read", "map"):
            raise ConfigError("Runtime", "memory", memory, "expected one of read, map")
        source = open_source(path_or_model, precision, memory)
        return cls(
            source,
            threads=threads,
            max_length=max_length,
            slots=slots,
            max_rows=max_rows,
            cache_dtype=cache_dtype,
            kernel=kernel,
            compute=compute,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory: panels, embedding, norms and biases."""
        return self._built.weight_bytes

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.decoder.vocabulary

    def memory_plan(self) -> MemoryPlan:
        """Bytes of weights, cache, and activations with workspaces."""
        built = self._built
        return MemoryPlan(weights=built.weight_bytes, cache=built.cache.bytes, activations=built.program.planned_bytes)

    def kernels(self) -> dict[str, dict[str, Any]]:
        """Which kernel serves each operator, with the operator's shape, bits, group and bytes."""
        return {name: dict(row) for name, row in self._built.operators.items()}

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine that ``generate`` submits to; other requests may join."""
        from pareto_cpu_runtime.batching import Engine

        return Engine(self)

    def check_tokens(self, tokens: NDArray[Any]) -> None:
        """Raise :class:`DataError` unless ``tokens`` (length) is a text of this vocabulary that fits the cache."""
        if tokens.ndim != 1:
            raise DataError(f"a text is one row of tokens, not an array of shape {tokens.shape}")
        if tokens.size == 0:
            raise DataError("a text must have at least one token")
        if tokens.dtype.kind not in "iu":
            raise DataError(f"tokens must be integers, not {tokens.dtype}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocabulary:
            wrong = low if low < 0 else high
            raise DataError(f"token {wrong} is outside the vocabulary of {self.vocabulary}")
        if tokens.size > self.max_length:
            raise DataError(
                f"{tokens.size} tokens do not fit the cache of {self.max_length}: shorten the text or make the runtime "
                "with a larger max_length"
            )

    def forward(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        want: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Run rows through the model; returns fp32 logits (len(want), vocabulary) of the rows that ``want`` names.

        Row i is ``tokens[i]`` at ``positions[i]`` of the text in ``slots[i]``; ``want`` ascends. Rows of a text come in
        order. More than ``max_rows`` rows are run in several calls.
        """
        logits = np.empty((len(want), self.vocabulary), dtype=np.float32)
        for start in range(0, len(tokens), self.max_rows):
            end = min(start + self.max_rows, len(tokens))
            first, last = np.searchsorted(want, [start, end])
            rows = (tokens[start:end], slots[start:end], positions[start:end], want[first:last] - start)
            self._run(*(np.ascontiguousarray(row, dtype=np.int32) for row in rows), logits[first:last])
        return logits

    def _run(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        want: NDArray[np.int32],
        logits: NDArray[np.float32],
    ) -> None:
        self._built.program.run(tokens, slots, positions, want, logits)

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Give slot ``target`` the first ``tokens`` tokens of slot ``source``."""
        self._built.cache.copy(source, target, tokens)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
    ) -> Any:
        """Score texts (rows, length); returns transformers' output with fp32 ``logits`` and, given labels, ``loss``.

        Padded positions, on either side, have logits of zero. Raises :class:`DataError` for bad tokens.
        """
        import torch
        from transformers.modeling_outputs import CausalLMOutput

        texts, masks = token_arrays(input_ids, attention_mask)
        logits = np.zeros((*texts.shape, self.vocabulary), dtype=np.float32)
        for row in range(len(texts)):
            kept = np.flatnonzero(masks[row])
            text = texts[row, kept]
            self.check_tokens(text)
            with self.slots.lend(1, "a forward pass") as (slot,):
                positions = np.arange(len(text), dtype=np.int32)
                logits[row, kept] = self.forward(text, np.full(len(text), slot, np.int32), positions, positions)
        values = torch.from_numpy(logits)
        return CausalLMOutput(loss=None if labels is None else loss_of(values, labels), logits=values)

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> torch.Tensor:
        """Continue texts as transformers' ``generate`` does; see :mod:`pareto_cpu_runtime.generate` for the options."""
        from pareto_cpu_runtime.generate import generate

        return generate(self, input_ids, attention_mask, **options)


def loss_of(logits: torch.Tensor, labels: Any) -> torch.Tensor:
    """Mean cross-entropy of the next token, labels of -100 left out."""
    import torch

    targets = torch.as_tensor(labels, dtype=torch.long)[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets, ignore_index=-100)


def token_arrays(input_ids: Any, attention_mask: Any) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids (rows, length) and their mask as arrays, from tensors, arrays or lists.

    Raises :class:`DataError` for what is empty, not two-dimensional, not integer, or masked between two kept tokens.
    """
    texts = np.asarray(input_ids)
    texts = texts[None] if texts.ndim == 1 else texts
    if texts.size == 0:
        raise DataError(f"input_ids of shape {texts.shape} hold no token: give at least one text of at least one token")
    if texts.ndim != 2 or texts.dtype.kind not in "iu":
        raise DataError(f"input_ids must be integers of shape (rows, length), not {texts.dtype} of {texts.shape}")
    if texts.max() > np.iinfo(np.int32).max or texts.min() < np.iinfo(np.int32).min:
        raise DataError(f"token {texts.max()} is outside any vocabulary")
    masks = np.ones(texts.shape, dtype=bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    masks = masks[None] if masks.ndim == 1 else masks
    if masks.shape != texts.shape:
        raise DataError(f"attention_mask has shape {masks.shape}, input_ids {texts.shape}")
    for row, mask in enumerate(masks):
        kept = np.flatnonzero(mask)
        if len(kept) == 0 or kept[-1] - kept[0] + 1 != len(kept):
            raise DataError(f"attention_mask of row {row} must keep one run of tokens, padding on the sides only")
    return texts.astype(np.int32), masks


def estimate(decoder: Decoder, source: Source, limits: Limits) -> MemoryPlan:
    """What the runtime will take, before anything is allocated."""
    heads = decoder.heads + 2 * decoder.kv_heads
    widest = 2 * decoder.width + (heads + decoder.heads) * decoder.head_dim + decoder.ffn
    per_token = 2 * len(decoder.blocks) * decoder.kv_heads * decoder.head_dim * CACHE_BYTES[limits.cache_dtype]
    return MemoryPlan(
        weights=source.nbytes(),
        cache=limits.slots * limits.length * per_token,
        activations=limits.max_rows * widest * 4,
    )


def open_source(path_or_model: Any, precision: Any, mode: str) -> Source:
    """The weights behind what :meth:`Runtime.from_pretrained` was given."""
    from pareto_cpu_runtime import sources

    if isinstance(path_or_model, (str, os.PathLike)):
        directory = Path(path_or_model)
        if not directory.is_dir():
            raise DataError(f"{directory}: no such directory; the runtime reads local models only")
        if (directory / "pareto_cpu_runtime.json").exists():
            return sources.read_packed(directory, mode)
        return sources.read_directory(directory, _precision(precision))
    if hasattr(path_or_model, "matrices") and hasattr(path_or_model, "tensors"):
        return sources.QuantisedSource(path_or_model)
    if hasattr(path_or_model, "state_dict") and hasattr(path_or_model, "config"):
        state = path_or_model.state_dict()
        generation = getattr(path_or_model, "generation_config", None)
        return sources.StateSource(path_or_model.config, state, _precision(precision), generation)
    kind = type(path_or_model).__name__
    raise ModelError(f"a runtime is made of a directory, a transformers model or a QuantisedModel, not {kind}")


def _precision(precision: Any) -> Any:
    from pareto_cpu_runtime.quantise.config import Precision

    if precision not in (None, INT4) and not isinstance(precision, Precision):
        raise ConfigError("Runtime", "precision", precision, 'expected "int4", None or a Precision')
    return precision


__all__: Sequence[str] = ("MemoryPlan", "Runtime")

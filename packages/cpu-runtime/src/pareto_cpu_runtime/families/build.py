"""From a description and its weights to a native program: one step per operator, one per attention, one embedding."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pareto_core.errors import ConfigError, DataError, ModelError, ParetoError, UnsupportedError
from pareto_cpu_runtime import matrix as matrices
from pareto_cpu_runtime._library import native
from pareto_cpu_runtime.families.description import Block, Decoder, Norm, Operator
from pareto_cpu_runtime.memory import Arena

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pareto_cpu_runtime.matrix import Matrix, Panels
    from pareto_cpu_runtime.sources import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What is planned for before the first token: rows of a call, slots and length of the cache, and their types."""

    max_rows: int
    slots: int
    length: int
    cache_dtype: str = "bf16"
    kernel: str = "auto"
    compute: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A finished program with its cache, and what its weights take."""

    program: Any
    cache: Any
    weight_bytes: int
    operators: dict[str, dict[str, Any]]


class Builder:
    """Adds the steps of one decoder to a program."""

    def __init__(
        self, decoder: Decoder, source: Source, pool: Any, limits: Limits, exchange: Any = None, head: bool = True
    ) -> None:
        self.exchange, self.head = exchange, head
        self.decoder, self.source, self.limits = decoder, source, limits
        self.program = native().Program(pool, limits.max_rows)
        self.arena = Arena()
        self.weight_bytes = 0
        self.operators: dict[str, dict[str, Any]] = {}
        with _named(source):
            self.table = self._rotary_table()

    def build(self) -> Built:
        """Add every step and plan the memory.

        Raises :class:`ModelError` for weights that do not fit the config or are not finite, :class:`DataError` where
        the files' config cannot be followed at all; both name the files.
        """
        with _named(self.source):
            return self._build()

    def _build(self) -> Built:
        d, limits = self.decoder, self.limits
        cache = native().Cache(len(d.blocks), limits.slots, d.kv_heads, limits.length, d.head_dim, limits.cache_dtype)
        x = self.program.buffer(d.width)
        embedding = self._embed(x)
        for layer, block in enumerate(d.blocks):
            self._block(layer, block, x, cache)
        if self.head:
            self._head(x, embedding)
        self.program.finish()
        return Built(program=self.program, cache=cache, weight_bytes=self.weight_bytes, operators=self.operators)

    def _rotary_table(self) -> NDArray[np.float32] | None:
        rotary = self.decoder.rotary
        if rotary is None:
            return None
        if rotary.longest is not None and self.limits.length > rotary.longest:
            raise UnsupportedError(
                f"max_length = {self.limits.length}: the rotary frequencies of this model change beyond "
                f"{rotary.longest} tokens, which the runtime does not follow"
            )
        return rotary.table(self.limits.length)

    def _embed(self, x: int) -> Any:
        import torch

        from pareto_cpu_runtime.sources import is_finite

        d = self.decoder
        table = self.source.tensor(f"{d.embedding}.weight")
        if table is None or tuple(table.shape) != (d.vocabulary, d.width):
            found = "missing" if table is None else f"of shape {tuple(table.shape)}"
            raise ModelError(f"{d.embedding}.weight is {found}, expected ({d.vocabulary}, {d.width})")
        if not is_finite(table):
            raise ModelError(f"{d.embedding}.weight has values that are not finite")
        table = table.detach().contiguous()
        if table.dtype not in (torch.float32, torch.bfloat16):
            table = table.float()
        self.weight_bytes += table.numel() * table.element_size()
        self.program.embed(table, x)
        return table

    def _block(self, layer: int, block: Block, x: int, cache: Any) -> None:
        d = self.decoder
        qkv = self.program.buffer((d.heads + 2 * d.kv_heads) * d.head_dim)
        context = self.program.buffer(d.heads * d.head_dim)
        self._linear(block.qkv, x, qkv, norm=block.attention_norm)
        self._attention(layer, block, cache, qkv, context)
        up = self._matrix(block.up)
        hidden = self.program.buffer(up.shape[0] // 2 if block.up.gated else up.shape[0])
        if self.exchange is not None:
            self._shared_block(block, x, context, hidden, up)
            return
        # Side by side, the network still reads x when attention's output is added: that sum lies apart.
        joined = self.program.buffer(d.width) if block.parallel else x
        self._linear(block.out, context, joined, residual=x)
        self._linear(block.up, x, hidden, norm=block.ffn_norm, weight=up)
        self._linear(block.down, hidden, x, residual=joined)

    def _shared_block(self, block: Block, x: int, context: int, hidden: int, up: Matrix | Panels) -> None:
        """The same with this process's part of every matrix: partial sums meet once or twice per block."""
        partial = self.program.buffer(self.decoder.width)
        self._linear(block.out, context, partial)
        if not block.parallel:
            self.program.all_reduce(self.exchange, partial, x, x)
        self._linear(block.up, x, hidden, norm=block.ffn_norm, weight=up)
        self._linear(block.down, hidden, partial, residual=partial if block.parallel else None)
        self.program.all_reduce(self.exchange, partial, x, x)

    def _attention(self, layer: int, block: Block, cache: Any, qkv: int, context: int) -> None:
        d = self.decoder
        self.program.attention(
            cache,
            layer,
            x=qkv,
            y=context,
            heads=d.heads,
            kv_heads=d.kv_heads,
            head_dim=d.head_dim,
            scale=float(d.scale),
            rotary=self.table,
            interleaved=bool(d.rotary and d.rotary.interleaved),
            slopes=d.slopes,
            window=block.window if block.window < self.limits.length else 0,
            q_norm=None if block.q_norm is None else self._vector(f"{block.q_norm.module}.weight", d.head_dim),
            k_norm=None if block.k_norm is None else self._vector(f"{block.k_norm.module}.weight", d.head_dim),
            norm_epsilon=block.q_norm.epsilon if block.q_norm else 1e-6,
        )

    def _head(self, x: int, embedding: Any) -> None:
        head = self.decoder.head
        module = head.parts[0].module
        tied = getattr(self.decoder.config, "tie_word_embeddings", False)
        try:
            weight = self._matrix(head)
        except ModelError:
            if not tied or self.source.tensor(f"{module}.weight") is not None:
                raise
            from pareto_cpu_runtime.sources import dense_of

            weight = dense_of(embedding, self.decoder.embedding)
        self._linear(head, x, None, norm=self.decoder.final_norm, weight=weight)

    def _matrix(self, operator: Operator) -> Matrix | Panels:
        """The operator's matrix as the source has it in panels, or joined from its modules."""
        ready = self.source.panels(operator)
        return self._joined(operator) if ready is None else ready

    def _joined(self, operator: Operator) -> Matrix:
        """The operator's rows, out of its modules, in the order that the kernel writes them."""
        read: dict[str, Matrix] = {}
        parts = []
        for part in operator.parts:
            if part.module not in read:
                read[part.module] = self.source.matrix(part.module)
            whole = read[part.module]
            parts.append(whole if part.index is None else whole.rows(part.index))
        joined = matrices.gated(*parts) if operator.gated else matrices.stacked(parts)
        return joined if operator.columns is None else joined.columns(*operator.columns)

    def _linear(
        self,
        operator: Operator,
        x: int,
        y: int | None,
        norm: Norm | None = None,
        residual: int | None = None,
        weight: Matrix | Panels | None = None,
    ) -> None:
        weight = self._matrix(operator) if weight is None else weight
        inputs = self._expected_inputs(operator)
        outputs = weight.shape[0]
        if weight.shape[1] != inputs[0]:
            modules = ", ".join(part.module for part in operator.parts)
            raise ModelError(f"{modules}: {weight.shape[1]} inputs, the config asks for {inputs[0]}")
        if inputs[1] != inputs[0]:
            if isinstance(weight, matrices.Panels):
                weight = self._joined(operator)
            weight = weight.padded(outputs, inputs[1])
        held, size = matrices.place(weight, self.arena)
        self.weight_bytes += size
        settings = self._norm_settings(norm, inputs[0])
        bias = self._bias(operator, outputs)
        try:
            chosen = self.program.linear(
                held,
                x,
                y,
                bias=bias,
                activation=operator.activation,
                gated=operator.gated,
                residual=residual,
                kernel="auto" if isinstance(weight, matrices.Dense) else self.limits.kernel,
                compute="" if isinstance(weight, matrices.Dense) else self.limits.compute,
                **settings,
            )
        except ValueError as error:
            raise ModelError(f"{', '.join(dict.fromkeys(part.module for part in operator.parts))}: {error}") from error
        self.operators[operator.name] = {"kernel": chosen, **_format(weight), "bytes": size}

    def _expected_inputs(self, operator: Operator) -> tuple[int, int]:
        """Inputs that the modules must have, and those of the buffer that is read (gated outputs are filled up)."""
        d = self.decoder
        kind = operator.name.rpartition(".")[2]
        if kind == "out":
            return d.heads * d.head_dim, d.heads * d.head_dim
        if kind == "down":
            gated = d.blocks[0].up.gated
            return d.ffn, -(-d.ffn // 32) * 32 if gated else d.ffn
        return d.width, d.width

    def _norm_settings(self, norm: Norm | None, width: int) -> dict[str, Any]:
        if norm is None:
            return {}
        bias = None
        if norm.kind == "layer" and self.source.tensor(f"{norm.module}.bias") is not None:
            bias = self._vector(f"{norm.module}.bias", width)
        weight = self._vector(f"{norm.module}.weight", width)
        return {"norm": norm.kind, "norm_weight": weight, "norm_bias": bias, "epsilon": float(norm.epsilon)}

    def _bias(self, operator: Operator, outputs: int) -> NDArray[np.float32] | None:
        parts = [self.source.tensor(f"{part.module}.bias") for part in operator.parts]
        if not operator.biased or all(part is None for part in parts):
            return None
        values = []
        for part, tensor in zip(operator.parts, parts, strict=True):
            if tensor is None:
                raise ModelError(f"{part.module} has no bias, but a module that is joined with it has one")
            whole = self._finite(tensor, f"{part.module}.bias")
            values.append(whole if part.index is None else whole[part.index])
        if operator.gated:
            half = outputs // 2
            values = [np.pad(value, (0, half - len(value))) for value in values]
            return np.ascontiguousarray(np.concatenate(values)[matrices.interleaving(half)])
        return np.ascontiguousarray(np.concatenate(values))

    def _vector(self, name: str, size: int) -> NDArray[np.float32]:
        tensor = self.source.tensor(name)
        if tensor is None or tuple(tensor.shape) != (size,):
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ModelError(f"{name} is {found}, expected ({size},)")
        values = self._finite(tensor, name)
        self.weight_bytes += values.nbytes
        return values

    @staticmethod
    def _finite(tensor: Any, name: str) -> NDArray[np.float32]:
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        if not np.isfinite(values).all():
            raise ModelError(f"{name} has values that are not finite")
        return values


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """Say which files an error is about, and let none through that names nothing."""
    where = "" if source.directory is None else f"{source.directory}: "
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{where}{error}") from error
    except ParetoError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = DataError if where else ModelError
        message = f"{where}its config does not make a decoder ({type(error).__name__}: {error})"
        raise kind(message) from error


def _format(weight: Matrix | Panels) -> dict[str, Any]:
    n, k = weight.shape
    if isinstance(weight, matrices.Dense):
        return {"shape": (n, k), "bits": weight.values.dtype.itemsize * 8, "group": k, "asymmetric": False}
    asymmetric = weight.asymmetric if isinstance(weight, matrices.Panels) else weight.zeros is not None
    return {"shape": (n, k), "bits": weight.bits, "group": weight.group, "asymmetric": asymmetric}


def check_limits(limits: Limits) -> None:
    """Raise :class:`ConfigError` for limits that no program can have, and kernels that are not here."""
    rows = native().kernels()
    names, computes = {row[0] for row in rows if row[2] == "yes"}, {row[1] for row in rows if row[2] == "yes"}
    if limits.kernel not in {"auto", *names}:
        raise ConfigError("Runtime", "kernel", limits.kernel, f"here: auto, {', '.join(sorted(names))}")
    if limits.compute not in {"", *computes}:
        raise ConfigError("Runtime", "compute", limits.compute, f'here: "", {", ".join(sorted(computes))}')
    for field in ("max_rows", "slots", "length"):
        value = getattr(limits, field)
        if not isinstance(value, int) or value < 1:
            raise ConfigError("Runtime", "max_length" if field == "length" else field, value, "must be at least 1")
    if limits.cache_dtype not in ("fp32", "bf16", "int8"):
        raise ConfigError("Runtime", "cache_dtype", limits.cache_dtype, "expected one of fp32, bf16, int8")

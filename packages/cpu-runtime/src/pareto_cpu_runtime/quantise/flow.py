"""The flow over a model: block by block, each calibrated on what the quantised blocks before it give.

At any time the source model, the codes so far (two to a byte), one block in fp32 and the hidden states of the
calibration are held: nothing grows with the model but the codes.
"""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from pareto_core.errors import ModelError
from pareto_cpu_runtime.quantise.calibration import Arguments, BlockInputs, Calibration, calibration_tokens
from pareto_cpu_runtime.quantise.config import Precision, QuantisationConfig
from pareto_cpu_runtime.quantise.grid import check_finite_weight, check_group
from pareto_cpu_runtime.quantise.matrix import Matrices, QuantisedLinear, QuantisedModel
from pareto_cpu_runtime.quantise.operators import find_blocks, linears, operators, output_embedding, weight_of
from pareto_cpu_runtime.quantise.rtn import round_to_nearest
from pareto_cpu_runtime.quantise.stage import Stage, give_back_memory

_METHODS = {
    "rtn": "pareto_cpu_runtime.quantise.rtn",
    "gptq": "pareto_cpu_runtime.quantise.gptq",
    "awq": "pareto_cpu_runtime.quantise.awq",
    "teq": "pareto_cpu_runtime.quantise.teq",
    "signround": "pareto_cpu_runtime.quantise.signround",
    "autoround": "pareto_cpu_runtime.quantise.autoround",
}


class BlockMethod(Protocol):
    """What a method's module offers."""

    def quantise_stage(self, stage: Stage) -> dict[str, QuantisedLinear]:
        """Return the quantised operators of a stage by their names within it; may change ``stage.module`` otherwise."""
        ...


def quantise(
    model: Any,
    calibration: Calibration | None = None,
    config: QuantisationConfig | None = None,
    keep_model: bool = True,
) -> QuantisedModel:
    """Quantise a transformers model.

    ``calibration`` is a task, token numbers (rows, length) or batches of them; RTN needs none. ``keep_model`` False
    frees each weight of ``model`` once it is quantised, so that the peak is below the source model and one block; the
    model is then of no further use. Otherwise it is left as it was.

    Raises :class:`ModelError` where the model has no blocks, a weight is not finite or a group size does not divide;
    :class:`ConfigError` where a pattern matches nothing; :class:`DataError` where calibration is missing or unfit.
    """
    check_architecture(model)
    config = QuantisationConfig() if config is None else config
    precisions = _precisions(model, config)
    if config.leave_out_most_sensitive:
        from pareto_cpu_runtime.quantise.sensitivity import rank

        tokens = calibration_tokens(calibration, config, model)
        for name, _ in rank(model, tokens, config)[: config.leave_out_most_sensitive]:
            precisions[name] = None
        calibration = tokens
    chosen = {name: precision for name, precision in precisions.items() if precision is not None}
    if config.method == "rtn":
        matrices, changed = _round_all(model, chosen, keep_model), {}
    else:
        tokens = calibration_tokens(calibration, config, model)
        matrices, changed = _Flow(model, tokens, config, chosen, keep_model).run()
    return _assemble(model, config, matrices, changed, [name for name, p in precisions.items() if p is None])


def _precisions(model: Any, config: QuantisationConfig) -> dict[str, Precision | None]:
    """The precision of each operator, None where it is left out; all that can be refused is refused here."""
    found = operators(model)
    config.check_patterns(list(found))
    precisions = {name: config.precision(name) for name in found}
    for name, precision in precisions.items():
        weight = weight_of(found[name])
        if precision is not None:
            check_group(name, weight.shape[1], precision.group(weight.shape[1]))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            check_finite_weight(name, tensor)
    return precisions


def _round_all(model: Any, precisions: dict[str, Precision], keep_model: bool) -> Matrices:
    matrices = Matrices()
    for name in _progress(list(precisions), "quantise"):
        module = model.get_submodule(name)
        matrices[name] = round_to_nearest(weight_of(module), precisions[name], name)
        if not keep_model:
            _free(model, name)
    return matrices


class _Flow:
    """The calibrated flow: two streams of hidden states go through the blocks, one original, one quantised."""

    def __init__(
        self,
        model: Any,
        tokens: torch.Tensor,
        config: QuantisationConfig,
        precisions: dict[str, Precision],
        keep_model: bool,
    ) -> None:
        self.model, self.tokens, self.config, self.keep_model = model, tokens, config, keep_model
        self.precisions = precisions
        self.method: BlockMethod = importlib.import_module(_METHODS[config.method])  # type: ignore[assignment]
        self.head = output_embedding(model)
        self.prefix, self.blocks = find_blocks(model)
        self.inputs = BlockInputs(model)
        # Equal batches, since a block's other arguments fit one number of rows.
        self.rows = max(n for n in range(1, config.batch_size + 1) if len(tokens) % n == 0)
        self.matrices, self.changed = Matrices(), dict[str, torch.Tensor]()

    def run(self) -> tuple[Matrices, dict[str, torch.Tensor]]:
        """Return the quantised matrices, and the other tensors that the method changed."""
        arguments = {rows: self._arguments(rows) for rows in self._row_counts()}
        hidden = torch.cat([self.inputs.first(part)[0] for part in self.tokens.split(self.rows)])
        reference = hidden.clone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            for index, block in enumerate(_progress(list(self.blocks), f"quantise ({self.config.method})")):
                of_block = {rows: _as_float(found[index]) for rows, found in arguments.items()}
                self._one(f"{self.prefix}.{index}", block, hidden, reference, of_block)
                gc.collect()
                give_back_memory()
            if self.head in self.precisions:
                self._one_head(hidden)
        return self.matrices, self.changed

    def _row_counts(self) -> set[int]:
        """Numbers of rows that blocks are called with: batches of the flow, and those of a method that trains."""
        counts = {self.rows}
        if self.config.method == "teq":
            counts.add(min(self.config.teq.batch, len(self.tokens)))
        if self.config.method in ("signround", "autoround"):
            counts.add(min(self.config.rounding.batch, len(self.tokens)))
        return counts

    def _arguments(self, rows: int) -> list[Arguments]:
        return self.inputs.first(self.tokens[:rows])[1]

    def _one(
        self,
        name: str,
        source: nn.Module,
        hidden: torch.Tensor,
        reference: torch.Tensor,
        arguments: dict[int, Arguments] | None,
    ) -> None:
        """Quantise the block (or head) ``source``; both streams then hold its outputs."""
        module = copy.deepcopy(source).float().requires_grad_(False).eval()
        found = {local: self.precisions.get(f"{name}.{local}" if local else name) for local in linears(module)}
        local_precisions = {local: precision for local, precision in found.items() if precision is not None}
        stage = Stage(name, module, local_precisions, hidden, reference, arguments, self.rows, self.config)
        if arguments is not None:
            stage.outputs(reference)
        quantised = self.method.quantise_stage(stage) if local_precisions else {}
        for local, matrix in quantised.items():
            stage.set_weight(local, matrix.dequantise())
        self._keep(stage, source, quantised)
        if arguments is not None:
            stage.outputs(hidden)

    def _keep(self, stage: Stage, source: nn.Module, quantised: dict[str, QuantisedLinear]) -> None:
        weights = {f"{local}.weight" if local else "weight" for local in quantised}
        before = source.state_dict()
        for local, tensor in stage.module.state_dict().items():
            if local not in weights and not torch.equal(tensor, before[local].to(tensor.dtype)):
                self.changed[stage.full_name(local)] = tensor
        for local, matrix in quantised.items():
            self.matrices[stage.full_name(local)] = matrix
            if not self.keep_model:
                _free(self.model, stage.full_name(local))

    def _one_head(self, hidden: torch.Tensor) -> None:
        assert self.head is not None
        module = self.model.get_submodule(self.head)
        parts = zip(self.tokens.split(self.rows), hidden.split(self.rows), strict=True)
        received = torch.cat([self.inputs.into(module, tokens, part) for tokens, part in parts])
        self._one(self.head, module, received, received, None)


def _assemble(
    model: Any,
    config: QuantisationConfig,
    matrices: Matrices,
    changed: dict[str, torch.Tensor],
    left_out: list[str],
) -> QuantisedModel:
    quantised = {f"{name}.weight" for name in matrices}
    tensors = {
        name: changed.get(name, tensor).detach() for name, tensor in model.state_dict().items() if name not in quantised
    }
    return QuantisedModel(
        config=model.config,
        architecture=type(model).__name__,
        matrices=matrices,
        tensors=tensors,
        left_out=tuple(left_out),
        recipe=config.to_json(),
        generation_config=getattr(model, "generation_config", None),
    )


def _free(model: Any, name: str) -> None:
    """Give up a weight of the source model, unless the input embedding is the same tensor."""
    module = model.get_submodule(name)
    if module.weight is not model.get_input_embeddings().weight:
        module.weight.data = torch.empty(0, dtype=module.weight.dtype)


def _as_float(arguments: Arguments) -> Arguments:
    """Masks and rotary tables in fp32, as the block's copy is."""

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.float() if value.is_floating_point() else value
        return tuple(convert(item) for item in value) if type(value) is tuple else value

    named = {name: convert(value) for name, value in arguments.named.items()}
    return Arguments(tuple(convert(value) for value in arguments.positional), named)


def _progress(items: list[Any], description: str) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(items, desc=description, disable=None, leave=False)


def check_architecture(model: Any) -> None:
    """Raise :class:`ModelError` unless ``model`` is one of transformers' own classes, which can be built again."""
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model: quantise needs its configuration")

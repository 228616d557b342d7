"""What the methods of this package share: fields, their ranges, and the way from a task to its model."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pareto_core import ConfigError, Measurement, Method, ModelError, Paper
from pareto_core.weights import save_transformer
from pareto_sequence._nearest import nearest

if TYPE_CHECKING:
    from torch import nn

    from pareto_core import Task
    from pareto_sequence.configuration import SequenceConfig

CHAPTER = Paper(
    title="TCNCA: Temporal CNN with Chunked Attention for Efficient Training on Long Sequences",
    authors="A. Terzić, M. Hersche, G. Karunaratne, A. Sebastian, A. Rahimi",
    year=2023,
    url="https://arxiv.org/abs/2312.05605",
)

#: where the class of each ``method`` that parameters can be matched to is
CLASSES = {
    "mega": "mega:MEGA",
    "tcnca": "tcnca:TCNCA",
    "tcncmha": "tcncmha:TCNCMHA",
    "tcncgsha": "tcncgsha:TCNCGSHA",
    "tcn_only": "tcn_only:TCNOnly",
    "sequence_transformer": "transformer:TransformerBaseline",
}

#: fields that say how a model is made and used, not what it is
NOT_THE_MODELS = ("trained", "match", "match_tolerance", "evaluation_chunk_size")

Norm = Literal["layer", "scale", "rms", "batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceMethod(Method):
    """A model of N layers, each a temporal block and a position-wise network, made for the task and wholly trained.

    ``match`` names another method (``method = "tcnca"``) and its fields that are not as here. The width is then
    chosen so that both models have the same number of parameters on the task; where no width is within
    ``match_tolerance``, ``ffn_size`` makes up the rest. ``hidden_size`` is the other's. ``trained = False`` leaves the
    model as it was drawn, where only its cost is asked for.
    """

    paper = CHAPTER
    #: ``mixer`` of :class:`pareto_sequence.configuration.SequenceConfig`
    mixer: ClassVar[str]

    num_layers: int = 12
    hidden_size: int = 512
    ffn_size: int = 1024
    norm: Norm = "layer"
    prenorm: bool = True
    dropout: float = 0.1
    tie_word_embeddings: bool = True
    trained: bool = True
    match: dict[str, Any] | None = None
    match_tolerance: float = 0.01

    def validate(self) -> None:
        """Check the ranges of all fields of the method, by name."""
        for field in ("num_layers", "hidden_size", "ffn_size"):
            self.require(field, getattr(self, field) >= 1, "must be at least 1")
        self._require_fractions("dropout", "match_tolerance")
        if self.match is not None:
            reference_of(self)

    def _require_positive(self, *fields: str) -> None:
        for field in fields:
            self.require(field, getattr(self, field) >= 1, "must be at least 1")

    def _require_fractions(self, *fields: str) -> None:
        for field in fields:
            self.require(field, 0 <= getattr(self, field) < 1, "must be at least 0 and below 1")

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Return the model for ``task``, initialised from torch's current seed; every parameter is trained.

        Raises :class:`ModelError` where the task brings a backbone or is not one over sequences.
        """
        from pareto_sequence import modeling

        if model is not None:
            raise ModelError(f"{type(self).__name__} makes its own model; task {task.name} brings a backbone")
        config = self.configuration(task)
        classifies = bool(task.spec.labels) and not config.causal
        cls: Any = modeling.SequenceForSequenceClassification if classifies else modeling.SequenceForCausalLM
        built: nn.Module = cls(config)
        return built.requires_grad_(self.trained)

    def configuration(self, task: Task) -> SequenceConfig:
        """The model's configuration on ``task``; with ``match``, of the width that matches."""
        config = self._configuration(task)
        if self.match is None:
            return config
        target = _count(reference_of(self).configuration(task))
        return self._matching(task, target)

    def _configuration(self, task: Task, **sizes: int) -> SequenceConfig:
        from pareto_sequence.configuration import SequenceConfig

        spec, (inputs, causal) = task.spec, inputs_of(task)
        fields = {name: getattr(self, name) for name in self.model_fields()}
        if not causal:
            fields["tie_word_embeddings"] = False  # a classifier's head has no rows of the vocabulary
        return SequenceConfig(
            mixer=self.mixer,
            **{**fields, **sizes},
            vocab_size=max(1, spec.vocabulary_size),
            num_labels=max(1, len(spec.labels)),
            max_position_embeddings=max(1, spec.max_length),
            inputs=inputs,
            causal=causal,
        )

    def model_fields(self) -> list[str]:
        """Names of the fields that are the model's own, the same in its configuration."""
        return [name for name in self.field_names() if name not in NOT_THE_MODELS]

    def _matching(self, task: Task, target: int) -> SequenceConfig:
        """The configuration whose parameters are nearest to ``target``: by width, then, if need be, by ``ffn_size``."""
        for step in (math.lcm(8, self.width_step()), self.width_step()):  # widths of 8 are computed fastest
            width = step * nearest(lambda steps, step=step: self._parameters(task, hidden_size=steps * step), target)
            if self._matches(found := self._configuration(task, hidden_size=width), target):
                return found
        size = nearest(lambda size: self._parameters(task, hidden_size=width, ffn_size=size), target)
        if self._matches(found := self._configuration(task, hidden_size=width, ffn_size=size), target):
            return found
        off = _count(found) / target - 1
        raise ModelError(
            f"{type(self).__name__}: width {width} with ffn_size {size} comes nearest to {target:,} parameters and is "
            f"off by {off:+.1%}; match_tolerance = {self.match_tolerance} allows less"
        )

    def _parameters(self, task: Task, **sizes: int) -> int:
        return _count(self._configuration(task, **sizes))

    def _matches(self, config: SequenceConfig, target: int) -> bool:
        return abs(_count(config) / target - 1) <= self.match_tolerance

    def width_step(self) -> int:
        """What ``hidden_size`` must be a multiple of."""
        return 1

    def figures(self, deployed: Any) -> tuple[Measurement, ...]:
        """The sizes in use, and how far back one layer's mixer sees, where it has an end."""
        config = deployed.config
        sizes = ("hidden_size", "ffn_size")
        found = [Measurement(name=name, value=getattr(config, name), unit="channels") for name in sizes]
        if self.mixer.startswith("tcn"):
            from pareto_sequence.tcn import receptive_field

            seen = receptive_field(config.kernel_size, config.dilation_factor, config.tcn_depth)
            found.append(Measurement(name="receptive_field", value=seen, unit="positions"))
        return tuple(found)

    def save(self, deployed: Any, directory: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        save_transformer(deployed, directory)

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote, in evaluation mode."""
        from pareto_sequence.modeling import load_model

        return load_model(directory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCNMethod(SequenceMethod):
    """A method with a TCN: kernel K, dilations F^0 … F^(D-1) in D residual blocks, and the norm inside them."""

    kernel_size: int = 15
    dilation_factor: int = 12
    tcn_depth: int = 3
    tcn_norm: Norm = "layer"
    conv_implementation: Literal["auto", "reference", "library", "native", "triton"] = "auto"

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self._require_positive("kernel_size", "dilation_factor", "tcn_depth")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedMethod(SequenceMethod):
    """A method that attends within chunks; None: over the whole sequence.

    ``evaluation_chunk_size`` is the chunks' size once trained, where it is another.
    """

    chunk_size: int | None = 2048
    evaluation_chunk_size: int | None = None

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        for field in ("chunk_size", "evaluation_chunk_size"):
            given = getattr(self, field)
            self.require(field, given is None or given >= 1, "must be at least 1, or nothing")
        simple = getattr(self, "bias", None) == "simple" and self.evaluation_chunk_size is not None
        self.require("evaluation_chunk_size", not simple, "a table of simple biases has its size: use bias = 'rotary'")

    @property
    def finishes_exactly(self) -> bool:  # type: ignore[override]
        """Whether ``finish`` leaves outputs as they were: another chunk size does not."""
        return self.evaluation_chunk_size in (None, self.chunk_size)

    def finish(self, model: Any, task: Task) -> Any:
        """Return the trained weights in a model that attends within chunks of ``evaluation_chunk_size``."""
        if self.finishes_exactly:
            return model
        config = copy.deepcopy(model.config)
        config.chunk_size = self.evaluation_chunk_size
        finished = type(model)(config).to(device=model.device, dtype=model.dtype)
        finished.load_state_dict(model.state_dict())
        return finished.train(model.training).requires_grad_(False)


def require_heads(method: SequenceMethod, num_heads: int) -> None:
    """Refuse heads that do not divide the width."""
    method.require("num_heads", num_heads >= 1, "must be at least 1")
    fits = method.match is not None or method.hidden_size % num_heads == 0
    method.require("num_heads", fits, f"must divide hidden_size = {method.hidden_size}")


def reference_of(method: SequenceMethod) -> SequenceMethod:
    """The method that ``method.match`` describes; raises :class:`ConfigError` where it describes none."""
    fields = dict(method.match or {})
    name = fields.pop("method", None)
    if not isinstance(name, str) or name not in CLASSES:
        allowed = f"its key method must be one of {sorted(CLASSES)}"
        raise ConfigError(type(method).__name__, "match", method.match, allowed)
    module, _, attribute = CLASSES[name].partition(":")
    cls: type[SequenceMethod] = getattr(importlib.import_module(f"pareto_sequence.{module}"), attribute)
    shared = {field: getattr(method, field) for field in method.model_fields() if field in cls.field_names()}
    try:
        reference = cls.from_json({**shared, **fields})
    except ConfigError as error:
        raise ConfigError(type(method).__name__, "match", method.match, str(error)) from error
    if reference.match is not None:
        raise ConfigError(type(method).__name__, "match", method.match, "must not be matched itself")
    return reference


def inputs_of(task: Task) -> tuple[str, bool]:
    """What a sequence task feeds, and whether it is a language model's; raises :class:`ModelError` on other tasks."""
    inputs, causal = getattr(task, "inputs", None), getattr(task, "causal", None)
    if inputs not in ("tokens", "values", "pairs") or not isinstance(causal, bool):
        raise ModelError(
            f"task {task.name} is not a task over sequences: it has no inputs (tokens, values or pairs) and causal"
        )
    return str(inputs), causal


def _count(config: SequenceConfig) -> int:
    from pareto_sequence.matching import parameter_count  # imports torch, which a benchmark file need not

    return parameter_count(config)

"""Configuration of the sequence models: one class for MEGA, TCNCA, the variants between, and a Transformer.

``mixer`` names a row of the ladder of chapter 7 (figures 7.1 to 7.4): ``mega`` (damped EMA inside moving-average gated
attention), ``tcnca`` (a TCN in the EMA's place), ``tcncmha`` (TCN, then chunked multi-head attention), ``tcncgsha``
(TCN, then chunked gated single-head attention), ``tcn`` (no attention), ``transformer`` (dense attention, the
baseline). Defaults are TCNCA's on EnWik8: table 7.5 for the TCN, MEGA's published shapes for the rest.
"""

from __future__ import annotations

import inspect
import typing
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

from pareto_core.config import convert
from pareto_core.errors import ConfigError
from pareto_sequence._span import reach_problem

Mixer = Literal["mega", "tcnca", "tcncmha", "tcncgsha", "tcn", "transformer"]
MIXERS: tuple[str, ...] = typing.get_args(Mixer)
#: the mixers that hold a TCN, and those whose attention is cut into chunks
WITH_TCN = ("tcnca", "tcncmha", "tcncgsha", "tcn")
WITH_CHUNKS = ("mega", "tcnca", "tcncmha", "tcncgsha")


class SequenceConfig(PreTrainedConfig):
    """Shape and options of a sequence model; :class:`pareto_core.errors.ConfigError` names a field out of range.

    Sizes carry the chapter's and MEGA's symbols: D ``hidden_size``, E ``value_size`` (values and gates), S
    ``shared_size`` (queries and keys), N ``state_size`` (of the EMA, per channel), C ``chunk_size`` (None: attention
    over the whole sequence), K ``kernel_size``, F ``dilation_factor``, and ``tcn_depth`` residual blocks per TCN. Where
    q, k and v have the embedding's width (``tcncmha``, ``tcncgsha``), E and S play no part.

    ``tcn_omega`` keeps the EMA's residual term (omega times the input, per channel) beside the TCN; off by default,
    since each residual block of a TCN passes its input on already. ``positions`` is how the Transformer marks places;
    the other models need none but the attention's relative ``bias``. ``max_position_embeddings`` is the size of the
    bias tables where ``chunk_size`` is None; nothing else limits the length. With ``inputs = "values"`` a sequence of
    numbers is read through a linear map from 1 to D; with ``"pairs"`` two texts go through the same encoder.
    ``num_labels`` (a keyword of the base class) is the number of classes.
    """

    model_type = "pareto_sequence"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_size",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    mixer: Mixer = "tcnca"
    inputs: Literal["tokens", "values", "pairs"] = "tokens"
    causal: bool = True
    vocab_size: int = 256
    hidden_size: int = 512
    value_size: int = 1024
    ffn_size: int = 1024
    shared_size: int = 128
    num_layers: int = 12
    chunk_size: int | None = 2048
    attention: Literal["softmax", "laplace"] = "softmax"
    bias: Literal["simple", "rotary", "none"] = "rotary"
    num_heads: int = 4
    norm: Literal["layer", "scale", "rms", "batch"] = "layer"
    prenorm: bool = True
    state_size: int = 16
    ema_algorithm: Literal["fft", "factored", "truncated", "auto"] = "fft"
    kernel_size: int = 15
    dilation_factor: int = 12
    tcn_depth: int = 3
    tcn_norm: Literal["layer", "scale", "rms", "batch"] = "layer"
    tcn_omega: bool = False
    conv_implementation: Literal["auto", "reference", "library", "native", "triton"] = "auto"
    positions: Literal["rotary", "sinusoidal"] = "rotary"
    max_position_embeddings: int = 8192
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    pooling: Literal["mean", "last"] = "mean"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Take the base class's keywords, then check types and ranges."""
        super().__post_init__(**kwargs)
        own = inspect.get_annotations(SequenceConfig, eval_str=True)
        for name in own.keys() - {"attribute_map", "keys_to_ignore_at_inference"}:
            setattr(self, name, convert("SequenceConfig", name, own[name], getattr(self, name)))
        self._check_sizes()
        self._check_mixer()

    def _require(self, field: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ConfigError("SequenceConfig", field, getattr(self, field), allowed)

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "value_size", "ffn_size", "shared_size", "num_layers", "num_heads")
        for name in (*sizes, "state_size", "kernel_size", "dilation_factor", "tcn_depth", "max_position_embeddings"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("chunk_size", self.chunk_size is None or self.chunk_size >= 1, "must be at least 1, or None")
        for name in ("dropout", "attention_dropout", "hidden_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "must be at least 0 and less than 1")
        self._require("initializer_range", self.initializer_range > 0, "must be positive")

    def _check_mixer(self) -> None:
        if self.mixer in WITH_TCN:
            problem = reach_problem(self.kernel_size, self.dilation_factor, self.tcn_depth, "tcn_depth")
            self._require("dilation_factor", not problem, problem)
            no_future = "batch norm lets positions see later ones: a causal model takes layer, scale or rms"
            self._require("tcn_norm", not (self.causal and self.tcn_norm == "batch"), no_future)
        no_future = "batch norm lets positions see later ones: a causal model takes layer, scale or rms"
        self._require("norm", not (self.causal and self.norm == "batch"), no_future)
        if self.mixer in ("tcncmha", "transformer"):
            allowed = f"must be a divisor of hidden_size = {self.hidden_size}"
            self._require("num_heads", self.hidden_size % self.num_heads == 0, allowed)
        if self.mixer == "transformer":
            self._require("hidden_size", self.hidden_size % 2 == 0, "must be even for sines and cosines")
            self._require("attention", self.attention == "softmax", "the Transformer's attention is 'softmax'")
        self._check_rotation()

    def _check_rotation(self) -> None:
        """Rotary positions turn the halves of a query in pairs: what they turn must be even."""
        rotary = self.positions if self.mixer == "transformer" else self.bias
        if rotary != "rotary" or self.mixer == "tcn":
            return
        if self.mixer in ("mega", "tcnca"):
            self._require("shared_size", self.shared_size % 2 == 0, "must be even for the rotary bias")
            return
        heads = 1 if self.mixer == "tcncgsha" else self.num_heads
        allowed = f"must be a multiple of {2 * heads} for rotary positions of {heads} heads"
        self._require("hidden_size", self.hidden_size % (2 * heads) == 0, allowed)

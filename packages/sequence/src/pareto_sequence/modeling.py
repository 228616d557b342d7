"""Sequence models as transformers models: embedding, layers of temporal block and position-wise network, heads.

A layer is MEGA's: a temporal block (the ``mixer`` of :class:`~pareto_sequence.configuration.SequenceConfig`), then a
normalised position-wise network with SiLU; figure 7.1 of the TCNCA chapter. Decoders (``causal``) pad convolutions with
zeros and attend backwards; encoders wrap convolutions around, run the EMA both ways and attend within whole chunks.

Batches are padded on the right. In an encoder, outputs at valid positions do not depend on the padding: masked keys are
not attended to, the EMA reads zeros, a TCN wraps around each row at its own length, and batch norm counts valid
positions only. In a decoder nothing looks right, so padding there changes nothing either. Hidden inputs are read as
zeros, so that not even infinities come through.

Initialisation is MEGA's: linear layers N(0, 0.02^2) with biases 0, embeddings N(0, 1 / D); a TCN's taps uniform within
1 / sqrt(K). Weights are kept as safetensors by ``save_pretrained`` and read by ``from_pretrained``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput

from pareto_core.errors import DataError, ModelError, ParetoError, UnsupportedError
from pareto_sequence.blocks import FeedForward, Residual, sinusoids
from pareto_sequence.configuration import SequenceConfig
from pareto_sequence.generation import SequenceGenerationMixin, SequenceState, check_continuation, step_through
from pareto_sequence.norms import make_norm
from pareto_sequence.temporal import make_temporal


class SequenceLayer(GradientCheckpointingLayer):
    """One layer: temporal block, then position-wise network, each with norm and residual."""

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.temporal = make_temporal(config)
        inner = FeedForward(config.hidden_size, config.ffn_size, config.hidden_dropout)
        self.feed_forward = Residual(inner, config.hidden_size, config.norm, config.prenorm, config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to the same shape; ``mask`` (B, L) is nonzero at valid positions."""
        return self.feed_forward(self.temporal(x, mask), mask)

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        """Map (B, L, D) to the same shape and return the state after the last position."""
        y, state = self.temporal.prefill(x)
        return self.feed_forward(y), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Advance by one position, x and y (B, D)."""
        y, state = self.temporal.step(x, state)
        return self.feed_forward(y), state


class SequencePreTrainedModel(PreTrainedModel):
    """Base of the models: initialisation, saving, loading, gradient checkpointing."""

    config_class = SequenceConfig
    config: SequenceConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SequenceLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw a module's own weights, those that were read from a file excepted."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif hasattr(module, "reset_parameters"):
            own = list(module.parameters(recurse=False))
            if not any(getattr(parameter, "_is_hf_initialized", False) for parameter in own):
                module.reset_parameters()


class SequenceModel(SequencePreTrainedModel):
    """Embedding, layers, and with pre-norm a last norm: tokens (B, L) or values (B, L) to (B, L, D)."""

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.values = config.inputs == "values"
        self.embedding = nn.Linear(1, width) if self.values else nn.Embedding(config.vocab_size, width)
        self.sinusoidal = config.mixer == "transformer" and config.positions == "sinusoidal"
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SequenceLayer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config.norm, width) if config.prenorm else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that reads tokens or values."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the module that reads tokens or values."""
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        past_key_values: SequenceState | None = None,
        use_cache: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the layers; with ``use_cache`` or a state, return the state after the last position as well.

        What continues from a state records no gradient. Raises :class:`ModelError` for inputs, masks or states of the
        wrong kind or shape, :class:`UnsupportedError` for a state in an encoder or with padding.
        """
        tokens = self._inputs(input_ids, input_values)
        stateful = use_cache or past_key_values is not None
        if stateful and not self.config.causal:
            raise UnsupportedError("use_cache: an encoder keeps no state, since every position sees the whole sequence")
        if stateful:
            check_continuation(past_key_values, attention_mask, tokens)
        valid = None if stateful else self._valid(attention_mask, tokens)
        mask = None if self.config.causal else valid  # nothing in a decoder looks right
        with torch.set_grad_enabled(torch.is_grad_enabled() and not continues(past_key_values)):
            x = self._embed(tokens, valid, 0 if past_key_values is None else past_key_values.length)
            hidden: list[Tensor] | None = [x] if output_hidden_states or self.config.output_hidden_states else None
            x, state = self._run(x, mask, past_key_values, stateful, hidden)
            x = x if self.norm is None else self.norm(x, mask)
        output = BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=state, hidden_states=None if hidden is None else (*hidden[:-1], x)
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _run(
        self,
        x: Tensor,
        mask: Tensor | None,
        state: SequenceState | None,
        stateful: bool,
        hidden: list[Tensor] | None,
    ) -> tuple[Tensor, SequenceState | None]:
        if state is not None and continues(state):
            if hidden is not None:
                raise UnsupportedError("output_hidden_states: a continued state returns the last layer's outputs only")
            return step_through(self, x, state), state
        length, layers = x.shape[1], []
        for layer in self.layers:
            if stateful:
                x, own = layer.prefill(x)
                layers.append(own)
            else:
                x = layer(x, mask)
            if hidden is not None:
                hidden.append(x)
        if not stateful:
            return x, None
        state = SequenceState() if state is None else state
        state.layers, state.length = layers, length
        return x, state

    def _inputs(self, input_ids: Tensor | None, input_values: Tensor | None) -> Tensor:
        name, given = ("input_values", input_values) if self.values else ("input_ids", input_ids)
        if given is None or (input_values is not None and input_ids is not None):
            raise ModelError(f"a model with inputs = {self.config.inputs!r} takes {name}, and nothing else")
        if given.ndim != 2 or given.shape[1] == 0:
            raise ModelError(f"{name} has shape {tuple(given.shape)}: expected (B, L) with L at least 1")
        if given.is_floating_point() != self.values:
            kind = "numbers in floating point" if self.values else "token numbers"
            raise ModelError(f"{name} is {given.dtype}: expected {kind}")
        return given

    def _valid(self, attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        if attention_mask is None:
            return None
        if attention_mask.shape != tokens.shape:
            shape = tuple(attention_mask.shape)
            raise ModelError(f"attention_mask has shape {shape}: expected the inputs' {tuple(tokens.shape)}")
        valid = attention_mask.bool()
        if bool(valid.all()):
            return None
        if bool((valid[:, 1:] & ~valid[:, :-1]).any()) or not bool(valid[:, 0].all()):
            raise ModelError(
                "attention_mask: rows must be valid from their first position and padded on the right only"
            )
        return valid

    def _embed(self, tokens: Tensor, valid: Tensor | None, start: int) -> Tensor:
        if self.values:
            assert isinstance(self.embedding, nn.Linear)
            if valid is not None:  # here as well: 0 times NaN would be in the gradient of the weight
                tokens = tokens.masked_fill(~valid, 0.0)
            x = self.embedding(tokens[:, :, None].to(self.embedding.weight.dtype))
        else:
            x = self.embedding(tokens)
        if self.sinusoidal:
            x = x + sinusoids(x.shape[1], x.shape[2], start, x.device).to(x.dtype)
        if valid is not None:
            x = x.masked_fill(~valid[:, :, None], 0.0)
        return self.dropout(x)


class SequenceForCausalLM(SequencePreTrainedModel, SequenceGenerationMixin):
    """Language model: a linear head over the vocabulary on a decoder."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: SequenceConfig) -> None:
        if not config.causal or config.inputs != "tokens":
            raise ModelError(
                f"a language model reads tokens and is causal; causal = {config.causal}, inputs = {config.inputs!r}"
            )
        super().__init__(config)
        self.model = SequenceModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: SequenceState | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (B, L, V), of the last ``logits_to_keep`` positions where that is not 0.

        ``labels`` (B, L) are aligned with ``input_ids``: position t's logits are scored on label t + 1; -100 is left
        out. The loss is the mean cross-entropy in nats. Raises :class:`UnsupportedError` for labels with a state to
        continue from where gradients are recorded: the tokens before would get none.
        """
        trains = torch.is_grad_enabled() and not continues(past_key_values)
        if labels is not None and torch.is_grad_enabled() and not trains:
            raise UnsupportedError(
                "labels with past_key_values: a state keeps no graph, so the loss would lack the gradients through "
                "earlier tokens; train on whole sequences, or evaluate under torch.no_grad()"
            )
        base = self.model(
            input_ids,
            attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = base.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else base.last_hidden_state
        with torch.set_grad_enabled(trains):
            logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ModelError(f"logits_to_keep = {logits_to_keep}: must be 0 where labels are given")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=base.past_key_values, hidden_states=base.hidden_states
        )
        return output if return_dict is None or return_dict else output.to_tuple()


class SequenceForSequenceClassification(SequencePreTrainedModel):
    """Classifier: pooled outputs, a hidden layer with SiLU, and one logit per class.

    ``pairs`` encodes two texts with the same weights and classifies [x1, x2, x1 * x2, x1 - x2].
    """

    def __init__(self, config: SequenceConfig) -> None:
        if not config.num_labels or config.num_labels < 2:
            raise ModelError(f"num_labels = {config.num_labels}: a classifier needs at least 2")
        super().__init__(config)
        self.model = SequenceModel(config)
        joined = 4 * config.hidden_size if config.inputs == "pairs" else config.hidden_size
        self.hidden = nn.Linear(joined, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_values: Tensor | None = None,
        input_ids_2: Tensor | None = None,
        attention_mask_2: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Return logits (B, classes), and with ``labels`` (B,) the mean cross-entropy in nats.

        Raises :class:`ModelError` where a second text is missing, or given to a model of single texts.
        """
        if (input_ids_2 is not None) != (self.config.inputs == "pairs"):
            raise ModelError(f"input_ids_2 goes with inputs = 'pairs' and only then; it is {self.config.inputs!r}")
        pooled, hidden = self._encode(input_ids, attention_mask, input_values, output_hidden_states)
        if input_ids_2 is not None:
            second, _ = self._encode(input_ids_2, attention_mask_2, None, None)
            pooled = torch.cat([pooled, second, pooled * second, pooled - second], -1)
        logits = self.classifier(self.dropout(F.silu(self.hidden(pooled))))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden)
        return output if return_dict is None or return_dict else output.to_tuple()

    def _encode(
        self, ids: Tensor | None, mask: Tensor | None, values: Tensor | None, output_hidden_states: bool | None
    ) -> tuple[Tensor, Any]:
        base = self.model(ids, mask, values, output_hidden_states=output_hidden_states, return_dict=True)
        return pool(base.last_hidden_state, mask, self.config.pooling), base.hidden_states


def continues(state: SequenceState | None) -> bool:
    """Whether ``state`` holds anything to continue from."""
    return state is not None and bool(state.layers)


def pool(x: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Reduce (B, L, D) over the positions where ``mask`` (B, L) is nonzero to their mean, or to the last: (B, D)."""
    valid = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask.long()
    lengths = valid.sum(1)
    if pooling == "last":
        return x[torch.arange(len(x), device=x.device), lengths - 1]
    x = x if mask is None else x.masked_fill(valid[:, :, None] == 0, 0.0)
    total = x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / lengths[:, None]).to(x.dtype)


def load_model(directory: Path | str) -> SequencePreTrainedModel:
    """Read a model that ``save_pretrained`` wrote, as the class that was saved, in evaluation mode.

    Raises :class:`DataError` where the directory holds none, one of another class, or weights that cannot be read or
    are not exactly the model's, and :class:`ConfigError` for a configuration out of range.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise DataError(f"no config.json in {directory}: not a saved model")
    classes = {cls.__name__: cls for cls in (SequenceForCausalLM, SequenceForSequenceClassification, SequenceModel)}
    try:
        config = SequenceConfig.from_pretrained(directory)
        name = (config.architectures or [""])[0]
        if name not in classes:
            raise DataError(f"{directory}: {name!r} is none of {', '.join(classes)}")
        # Sizes that do not fit come back in the report, which names them; the error for them does not.
        model, report = classes[name].from_pretrained(directory, output_loading_info=True, ignore_mismatched_sizes=True)
    except ParetoError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{directory}: the saved model cannot be read: {error}") from error
    problems = [
        f"{kind.replace('_', ' ')} {sorted(map(str, report[kind]))[:3]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[kind]
    ]
    if problems:
        raise DataError(f"{directory}: not the weights of this {name}: {'; '.join(problems)}")
    loaded: SequencePreTrainedModel = model.eval()
    return loaded

"""Prefix tuning: trained keys and values in front of every layer's own, by PEFT's own tuner.

X. L. Li, P. Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021,
https://arxiv.org/abs/2101.00190.

Reproduced: p positions whose keys and values are trained in each of the L layers of a causal language model, 2·L·p·d
numbers for width d; five positions, as the paper takes for table-to-text. The text stands behind them: its first token
is at position p.

Deviations:

- The keys and values are trained themselves. The paper computes them by a network that is dropped after training, since
  training them from random numbers was unstable; here they start as those of p random words, a start that the paper
  found to be better (section 7.4).
- Encoders that classify (BERT) can be tuned too, as PEFT allows. Encoder-decoder models, which the paper has, cannot:
  PEFT hands a prefix of L layers out in fours where their decoder takes pairs, so that layer L/2 reads layer 0's part
  again and every other layer's part is never read.
- PEFT refuses models under gradient checkpointing: the prefix is in the cache, which that does without.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from pareto_adapters._build import attach, plain, refuse_adapters
from pareto_adapters._stored import ADAPTERS, load_adapted, save_adapted
from pareto_core import Method, ModelError, Paper
from pareto_core.weights import require_files

if TYPE_CHECKING:
    from pathlib import Path

    from pareto_core import Task

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefixed(Method):
    """Base of the methods that put ``positions`` trained positions in front of what a model reads.

    What is deployed is PEFT's prefix tuning, whichever way the prefix was trained.
    """

    positions: int = 5
    train_layer_norms: bool = False

    def validate(self) -> None:
        """Check ranges."""
        self.require("positions", self.positions > 0, "must be above 0")

    def attach_prefix(self, task: Task, model: Any, kind: str) -> tuple[peft.PeftModel, torch.Tensor]:
        """Wrap the starting model as one of PEFT's ``kind``; also return the words that the prefix starts as."""
        start: Any = self.starting_model(task, model)
        check_room(type(self).__name__, start, self.positions, task)
        words = torch.randint(0, start.config.vocab_size, (1, self.positions)).to(start.device)
        config = peft.PrefixTuningConfig(task_type=kind, num_virtual_tokens=self.positions)
        return _with_one_head(attach(start, config, task, self.train_layer_norms)), words

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        """Keep the trained keys and values themselves, and nothing that they were computed by."""
        if ADAPTER not in getattr(model, "prompt_encoder", {}):
            raise ModelError(f"{type(model).__name__} holds no prefix: finish takes what build returned")
        with torch.no_grad():
            prefix = model.get_prompt_embedding_to_save(ADAPTER)
        _set_prefix(model, prefix.to(model.prompt_encoder[ADAPTER].embedding.weight.device))
        return model.eval()

    def save(self, deployed: Any, directory: Path) -> None:
        """Write the model, and in ``prefix/`` what PEFT reads as an adapter of it."""
        save_adapted(deployed, directory)

    def load(self, directory: Path) -> Any:
        """Read what :meth:`save` wrote."""
        require_files(directory, "config.json", f"prefix/{ADAPTERS}", f"prefix/{WEIGHTS}")
        return load_adapted(directory)


def save_prefix(deployed: Any, directory: Path) -> None:
    """Write in ``prefix/`` the keys and values in front of a model, which PEFT reads; nothing where there are none."""
    if ADAPTER in getattr(deployed, "prompt_encoder", {}):
        deployed.peft_config[ADAPTER].save_pretrained(str(directory / "prefix"))
        prefix = deployed.prompt_encoder[ADAPTER].embedding.weight
        save_file({"prompt_embeddings": prefix.detach().contiguous()}, directory / "prefix" / WEIGHTS)


def load_prefix(model: Any, directory: Path) -> Any:
    """Put what :func:`save_prefix` wrote in front of ``model``, which is returned as it is where that is nothing."""
    if not (directory / "prefix" / WEIGHTS).is_file():
        return model
    config = peft.PeftConfig.from_pretrained(str(directory / "prefix"))
    model = _with_one_head(peft.get_peft_model(model, config))
    _set_prefix(model, load_file(directory / "prefix" / WEIGHTS)["prompt_embeddings"])
    return model.eval()


def _with_one_head(model: nn.Module) -> nn.Module:
    """Undo what PEFT does to a classifier's head, which is trained in place: a copy of it for each adapter."""
    base = plain(model)
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.original_module)
    return model


def _set_prefix(model: Any, prefix: torch.Tensor) -> None:
    """Make ``prefix`` (p, L·2·d) the fixed keys and values of a wrapped model."""
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    model.peft_config[ADAPTER] = config
    encoder = peft.PrefixEncoder(config).to(prefix.device, prefix.dtype)
    encoder.load_prompt_embeddings(prefix)
    model.prompt_encoder[ADAPTER] = encoder.requires_grad_(False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Prefixed):
    """Train the keys and values of ``positions`` positions in front of the text, in each layer."""

    paper = Paper(
        title="Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        authors="X. L. Li, P. Liang",
        year=2021,
        url="https://arxiv.org/abs/2101.00190",
    )

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put the keys and values of random words in front, to be trained.

        Raises :class:`ModelError` for an encoder-decoder model and for one whose layers read no keys and values from
        outside.
        """
        start: Any = self.starting_model(task, model)
        refuse_adapters(start)
        if getattr(getattr(start, "config", None), "is_encoder_decoder", False):
            raise ModelError(
                f"PrefixTuning is not for {type(start).__name__}: PEFT would give several layers of its decoder one "
                "part of the prefix, and leave other parts unread"
            )
        core = getattr(start, "base_model", start)
        if "past_key_values" not in inspect.signature(core.forward).parameters:
            raise ModelError(f"the layers of {type(start).__name__} read no keys and values but their own: no prefix")
        tuned, words = self.attach_prefix(task, start, "CAUSAL_LM" if start.can_generate() else "SEQ_CLS")
        tuned.prompt_encoder[ADAPTER].load_prompt_embeddings(keys_and_values(core, words))
        return tuned


@torch.no_grad()
def keys_and_values(core: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """The keys and values that a model without its head computes for ``words`` (1, p), in PEFT's order.

    The shape is (p, L·2·d): for each of the L layers all heads' keys, then all heads' values.
    """
    training, cache = core.training, DynamicCache()
    core.eval()(input_ids=words, past_key_values=cache)
    core.train(training)
    states = [state[0].transpose(0, 1).flatten(1) for layer in cache.layers for state in (layer.keys, layer.values)]
    return torch.cat(states, dim=1)


def check_decoder(method: str, model: nn.Module) -> None:
    """Raise :class:`ModelError` for anything but a causal language model of transformers without adapters."""
    refuse_adapters(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ModelError(f"{method} is for causal language models: {name} generates no text")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{method} is for causal language models: {name} answers a text instead of going on with it")


def check_room(method: str, model: Any, taken: int, task: Task) -> None:
    """Raise :class:`ModelError` where ``taken`` positions in front leave too few for the texts of ``task``."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and taken + task.spec.max_length > positions:
        raise ModelError(
            f"{method} puts {taken} positions in front of texts of up to {task.spec.max_length} tokens, "
            f"but {type(model).__name__} has {positions}: shorten the prefix or the task's max_length"
        )

"""PreLayer (prefix-layer tuning): trained activations in front of the text, after the embedding and after every layer.

E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen, "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685, section 5.1, which extends the prefixes of X. L. Li and
P. Liang, "Prefix-Tuning", 2021, https://arxiv.org/abs/2101.00190.

Reproduced: at l_p positions in front of the text, what a layer would pass on is replaced by trained vectors. In a
causal model these positions depend on nothing behind them, so all that a layer lets the text see of them are the keys
and values that its frozen projections make of the trained vectors; they are computed so, and the longer sequence is
never run.

====== ========== ============================================================================
l_p    number     prefix positions, ``positions``
L      number     layers; the first takes what follows the embedding, the last one's output has no reader
d      number     width of the model
E      (l_p, L·d) the trained activations, those of a position and layer side by side
====== ========== ============================================================================

Readings and deviations:

- The count is L·d·(l_p + l_i). The infix positions l_i, between a prompt and its answer, are left out: a model is not
  told where a prompt ends. Table 5.1's 0.35 M is 24·1024·15 = 368,640 of GPT2-medium, in units of 2^20.
- The activations start as those of random words: at the start, the model behaves as if these stood in front.
- ``finish`` computes the keys and values once: what is deployed is PEFT's prefix tuning and costs what that costs, with
  twice the numbers that were trained.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pareto_adapters.lora import LoRA
from pareto_adapters.prefix import ADAPTER, Prefixed, check_decoder
from pareto_core import ModelError

if TYPE_CHECKING:
    from pareto_core import Task

#: how the layers of these architectures make keys and values of what they read
KINDS = ("gpt2", "llama", "mistral", "qwen2")


class Activations(nn.Module):
    """The trained activations E of every layer; gives keys and values in the place of PEFT's ``PrefixEncoder``.

    ``model`` is the frozen language model, which stays outside (it is no submodule); ``start`` is what E starts as.
    """

    def __init__(self, model: Any, start: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(start, freeze=False)
        object.__setattr__(self, "_model", model)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Keys and values of the positions (batch, l_p), in PEFT's order: (batch, l_p, L·2·width of the keys)."""
        core = self._model.base_model
        layers = decoder_layers(core)
        hidden = self.embedding(positions[:1]).to(self._model.dtype).chunk(len(layers), dim=-1)
        states = [state for layer, x in zip(layers, hidden, strict=True) for state in seen(core, layer, x)]
        return torch.cat(states, dim=-1).expand(len(positions), -1, -1)


def decoder_layers(core: Any) -> nn.ModuleList:
    """The layers of a language model without its head."""
    layers: nn.ModuleList = core.h if hasattr(core, "h") else core.layers
    return layers


def seen(core: Any, layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, (1, l_p, width of the keys) each, that ``layer`` makes of the activations ``x`` (1, l_p, d)."""
    if hasattr(layer, "attn"):
        _, keys, values = layer.attn.c_attn(layer.ln_1(x)).chunk(3, dim=-1)
        return keys, values
    x, attention = layer.input_layernorm(x), layer.self_attn
    keys = attention.k_proj(x).unflatten(-1, (-1, attention.head_dim))
    cos, sin = core.rotary_emb(x, torch.arange(x.shape[1], device=x.device).unsqueeze(0))
    _, keys = apply_rotary_pos_emb(keys, keys, cos, sin, unsqueeze_dim=2)
    return keys.flatten(-2), attention.v_proj(x)


@torch.no_grad()
def activations(model: Any, words: torch.Tensor) -> torch.Tensor:
    """What ``model`` computes for ``words`` (1, l_p) after its embedding and each layer but the last: (l_p, L·d)."""
    training = model.training
    hidden = model.eval()(input_ids=words, output_hidden_states=True).hidden_states
    model.train(training)
    return torch.cat(hidden[:-1], dim=-1)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreLayer(Prefixed):
    """Train the activations of ``positions`` positions in front of the text, in each layer."""

    paper = LoRA.paper

    positions: int = 15

    def build(self, task: Task, model: Any = None, teacher: nn.Module | None = None) -> nn.Module:
        """Put the activations of random words in front, to be trained."""
        start: Any = self.starting_model(task, model)
        check_decoder("PreLayer", start)
        kind = start.config.model_type
        if kind not in KINDS:
            raise ModelError(f"PreLayer knows how {', '.join(KINDS)} make keys and values, but not how {kind} does")
        tuned, words = self.attach_prefix(task, start, "CAUSAL_LM")
        encoder = tuned.prompt_encoder[ADAPTER]
        first = activations(start, words).to(encoder.embedding.weight.dtype)
        tuned.prompt_encoder[ADAPTER] = Activations(start, first)
        return tuned

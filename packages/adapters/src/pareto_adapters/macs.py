"""Multiply-accumulates of the query, key and value projections, counted on the model as it was built.

The measure of table 5.2 (J. Liu et al., "LoDA: Low-Dimensional Adaptation of Large Language Models", chapter 5): what
W_proj = [W_q, W_k, W_v] and the adapters beside it multiply for one token at inference. One token is sent through the
projections of each self-attention, on whatever device they are (``meta`` suffices), and PyTorch's counter adds up the
matrix products.

Readings, which give the table's column to the last digit:

- Of a sparsified projection the entries that are kept count, as in the chapter; a dense kernel multiplies all.
- An adapter's activations and norms count where section 5.3.2 counts them, one for each number of the bottleneck
  (:meth:`~pareto_adapters._peft.Cell.elementwise_macs`). The activation f2 of LoDA+, over the full width, is in no
  row, and additions of biases and outputs are no multiplications.
- B is applied twice in equation 5.2, so LoDA+ counts 3rd + 2r² + 4r per adapted matrix.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pareto_adapters._build import plain
from pareto_adapters._peft import CellLayer
from pareto_adapters.approximate import NOTE, Attention, self_attentions
from pareto_core import Measurement, ModelError


def qkv_macs(model: nn.Module) -> dict[str, int]:
    """Multiply-accumulates per token of query, key and value, by the name of each self-attention of ``model``.

    Adapters that are active and not merged are counted with them. Raises :class:`pareto_core.ModelError` where the
    model has no self-attention with projections of a known name.
    """
    model = plain(model)
    note = getattr(model, NOTE, {})
    keep = note["size"] if note.get("kind") == "sparse" else None
    return {attention.name: _macs(attention, keep) for attention in self_attentions(model)}


def qkv_macs_per_token(model: nn.Module) -> int:
    """The sum of :func:`qkv_macs` over all layers."""
    return sum(qkv_macs(model).values())


def qkv_figures(model: nn.Module) -> tuple[Measurement, ...]:
    """:func:`qkv_macs_per_token` for a result; nothing for a model whose projections have other names."""
    try:
        return (Measurement(name="qkv_macs_per_token", value=qkv_macs_per_token(model), unit="MACs"),)
    except ModelError:
        return ()


@torch.no_grad()
def _macs(attention: Attention, keep: float | None) -> int:
    weight = next(attention.module.parameters())
    x = torch.zeros(1, 1, attention.in_features, dtype=weight.dtype, device=weight.device)
    with FlopCounterMode(display=False) as counter:
        for layer in attention.layers:
            layer(x)
    zeros = 0 if keep is None else _zeros(attention, keep)
    return counter.get_total_flops() // 2 - zeros + sum(map(_elementwise, attention.layers))


def _elementwise(layer: nn.Module) -> int:
    if not isinstance(layer, CellLayer) or layer.merged or layer.disable_adapters:
        return 0
    return sum(layer.cells[name].elementwise_macs() for name in layer.active_adapters if name in layer.cells)


def _zeros(attention: Attention, keep: float) -> int:
    weight = attention.matrix()
    kept = round(keep * weight.numel()) if weight.is_meta else int(weight.count_nonzero())
    return weight.numel() - kept

"""Whole models with each tuner: latency by the KronA chapter's protocol, and peak memory of training on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from pareto_adapters._build import plain, projections
from pareto_adapters.compacter import CompacterConfig
from pareto_adapters.cost.timing import Estimate, Times, estimate, median, ratio, take_turns
from pareto_adapters.houlsby import HoulsbyConfig
from pareto_adapters.krona import KronAConfig
from pareto_adapters.krona_block import KronABConfig
from pareto_adapters.parallel_adapter import ParallelAdapterConfig
from pareto_core import ModelError, UnsupportedError
from pareto_core.backbones import MINILM, from_pretrained
from pareto_core.tasks.classification import CHAPTER4_LENGTH, CHAPTER4_PROTOCOL

T5_BASE = "t5-base"
MODELS = (MINILM, T5_BASE)
BASE, AGAIN, MERGED = "base", "base again", "KronA, merged"
#: latency of table 4.6, in percent of the base's
TABLE_4_6 = {MERGED: 100, "Adapter": 146, "PA": 113, "Compacter": 181, "KronA^B": 127, "KronA^B_res": 136}
#: calls of a turn: 200 runs of the protocol are 20 turns
CALLS = 10
#: batch, length and label length of the training step whose peak is taken; steps, of which the first makes the state
TRAINING_SHAPE, TRAINING_STEPS = (32, 128, 4), 3
GIB = 2**30
T5_BASE_BYTES = 4 * 222_903_552


@dataclasses.dataclass(frozen=True)
class Latency:
    """One tuner on one model: milliseconds of a call, and its ratio to the base's, turn by turn."""

    model: str
    case: str
    milliseconds: Estimate
    ratio: Estimate
    paper_percent: int | None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak of a training step of one tuner, in bytes, and its trained parameters."""

    case: str
    parameters: int
    peak_memory_bytes: int


def backbone(name: str) -> nn.Module:
    """MiniLM with a head, or a T5-base of random weights; frozen, in evaluation mode."""
    if name == MINILM:
        logging.set_verbosity_error()  # that the head is new is no surprise here
        logging.disable_progress_bar()
        model = from_pretrained(AutoModelForSequenceClassification, MINILM)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if free < 3 * T5_BASE_BYTES:
            raise UnsupportedError(f"T5-base needs {3 * T5_BASE_BYTES / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(t5_base())
    return model.eval().requires_grad_(False)


def t5_base() -> T5Config:
    """The shape of T5-base."""
    return T5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        decoder_start_token_id=0,
    )


def tuners(model: nn.Module) -> dict[str, peft.PeftConfig]:
    """The chapter's adapters by name, as table 4.3 sizes them, for ``model``; its width may be 768 or 384."""
    width = model.config.hidden_size
    shape = (32, 24) if width == 768 else (24, 16)
    query_value = projections(model, ("q", "v"))
    return {
        "LoRA": peft.LoraConfig(r=1, lora_alpha=1, **query_value),
        "KronA": KronAConfig(a_shape=shape, **query_value),
        "Adapter": HoulsbyConfig(r=1),
        "PA": ParallelAdapterConfig(),
        "Compacter": CompacterConfig(),
        "KronA^B": KronABConfig(a_shape=shape),
        "KronA^B_res": KronABConfig(a_shape=shape, residual="learned"),
    }


def latency_cases(base: nn.Module) -> dict[str, nn.Module]:
    """``base`` twice and with each adapter of table 4.6 that costs something, and KronA merged.

    All but the merged one share the base's weights. Raises :class:`ModelError` where an adapter changes nothing, or
    merging changes the answer.
    """
    configs = tuners(base)
    inputs = dummy(base)
    found = {BASE: base, AGAIN: _sharing(base)}
    kron = _tuned(copy.deepcopy(base), configs["KronA"])
    before = _answer(kron, inputs)
    found[MERGED] = kron.merge_and_unload()
    if not torch.allclose(_answer(found[MERGED], inputs), before, atol=1e-3, rtol=1e-3):
        raise ModelError("merging KronA changed the answer: not timed")
    for name in TABLE_4_6:
        if name in configs:
            found[name] = plain(_tuned(_sharing(base), configs[name]))
            if torch.equal(_answer(found[name], inputs), _answer(base, inputs)):
                raise ModelError(f"{name} does not change the answer: not timed")
    return found


def dummy(model: nn.Module) -> dict[str, torch.Tensor]:
    """The protocol's input: one sequence of ten random tokens, with the start token for a decoder."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, CHAPTER4_LENGTH), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def measure_latency(name: str, device: str = "cpu", done: Callable[[float], None] | None = None) -> tuple[Latency, ...]:
    """Time a pass of each case: 150 calls to warm up, then three times 200 calls, in turns of ten."""
    base = backbone(name).to(device)
    found, inputs = latency_cases(base), dummy(base)

    def ten(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            for _ in range(CALLS):
                model(**inputs)

        return run

    calls = {case: ten(model) for case, model in found.items()}
    protocol = CHAPTER4_PROTOCOL
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(protocol.warmups // CALLS):
                call()
        times = take_turns(calls, protocol.runs * protocol.repeats // CALLS, device, done)
    return tuple(_latency(name, case, times) for case in found)


def _latency(model: str, case: str, times: Times) -> Latency:
    return Latency(
        model=model,
        case=case,
        milliseconds=estimate(median, 1000 / CALLS * times[case]),
        ratio=estimate(ratio, times[case], times[BASE]),
        paper_percent=TABLE_4_6.get(case, 100 if case == BASE else None),
    )


def measure_memory(device: str, done: Callable[[float], None] | None = None) -> tuple[Memory, ...]:
    """Peak memory of a step of AdamW on a T5-base of random weights, for each tuner and for fine-tuning.

    Raises :class:`UnsupportedError` off a GPU, whose allocator alone knows the peak.
    """
    if not device.startswith("cuda"):
        raise UnsupportedError(f"peak memory of training is read from a GPU's allocator, and {device} has none")
    base = backbone(T5_BASE)
    names = ["fine-tuning", *tuners(base)]
    found = []
    for number, name in enumerate(names):
        model = copy.deepcopy(base)
        model = model.requires_grad_(True) if name == names[0] else _tuned(model, tuners(model)[name])
        model.to(device).train()
        torch.cuda.reset_peak_memory_stats(device)
        train_steps(model, TRAINING_SHAPE)
        peak = torch.cuda.max_memory_allocated(device)
        found.append(Memory(name, sum(p.numel() for p in model.parameters() if p.requires_grad), peak))
        del model
        torch.cuda.empty_cache()
        if done is not None:
            done((number + 1) / len(names))
    return tuple(found)


def train_steps(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """Take a few steps on random tokens, (batch, length) in and (batch, label length) out; return the last loss."""
    batch, length, labels = shape
    device = next(model.parameters()).device
    ids = torch.randint(3, model.config.vocab_size, (batch, length + labels), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = torch.zeros(())
    for _ in range(TRAINING_STEPS):
        loss = model(input_ids=ids[:, :length], labels=ids[:, length:].contiguous()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _sharing(model: nn.Module) -> Any:
    """A copy of ``model`` that holds the same weights, not copies of them."""
    return copy.deepcopy(model, {id(p): p for p in [*model.parameters(), *model.buffers()]})


@torch.no_grad()
def _tuned(model: nn.Module, config: peft.PeftConfig) -> Any:
    """``model`` in PEFT's wrapper, in evaluation mode; the adapter's weights are moved off where they start."""
    tuned = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 1e-2)
    return tuned.eval()


def _answer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits

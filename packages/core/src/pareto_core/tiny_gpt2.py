"""A small GPT-2 that is trained once on this machine and kept: a backbone for generation that needs no download.

It reads the Python language reference (``pydoc_data.topics``) and, of the functions of CPython's library that lie in
the training split (:mod:`pareto_core.library`), docstrings and bodies, each as a text of its own: prose about Python
and code, but never a signature beside its summary, and nothing of the splits that tasks are scored on. Training takes
two to three minutes on two cores; the files (``config.json``, ``model.safetensors``, the tokenizer's) are kept in the
cache directory, under a key of corpus and recipe. ``python -m pareto_core.tiny_gpt2`` makes them ahead of time.

The same recipe gives the same weights on one machine; another processor rounds differently, hence trains a slightly
different model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core.backbones import TINY_GPT2
from pareto_core.cache import cache_directory
from pareto_core.library import corpus_hash, library_path, read_functions, split_functions
from pareto_core.task import Batch
from pareto_core.training_once import fit, run_command, save_whole, shuffled_windows, to_standard_error, trained_once

if TYPE_CHECKING:
    import torch

END = "<|endoftext|>"
#: characters of a function's body that are read: with them, one pass over all texts fits into the time
BODY = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the model besides its texts: its shape, and ``steps`` batches of ``batch`` windows of tokens."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    positions: int = 512
    vocabulary: int = 4096
    window: int = 128
    batch: int = 8
    steps: int = 600
    learning_rate: float = 1.5e-3
    warmup: int = 40


def tiny_gpt2_path(name: str = TINY_GPT2, say: Callable[[str], None] = to_standard_error) -> Path:
    """Directory of the trained model and its tokenizer; trains it first where it is not there.

    ``say`` is told how far the training is. Processes that ask at once wait for the one that trains. Raises
    :class:`ModelError` where training fails.
    """
    path = cache_directory() / name / revision()
    return trained_once(path, "pareto_core.tiny_gpt2", "the offline GPT-2", name, "two to three minutes", say)


@functools.cache
def revision() -> str:
    """Key of the model: a hash of its texts and its recipe."""
    content = [corpus_hash(read_functions(library_path())), topics(), BODY, dataclasses.astuple(Recipe())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def topics() -> list[str]:
    """The chapters of the language reference that ``help()`` shows."""
    found: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return [found[name] for name in sorted(found)]


def training_texts() -> list[str]:
    """What the model reads: the language reference, and docstrings and bodies of the training split's functions."""
    functions = split_functions(read_functions(library_path()))["train"]
    return [*topics(), *(f.docstring for f in functions), *(f.body[:BODY] for f in functions)]


def train(recipe: Recipe, texts: list[str], path: Path) -> None:
    """Train tokenizer and model on ``texts`` and write them to the new directory ``path``, whole or not at all."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    model = GPT2LMHeadModel(_config(recipe, tokenizer))
    ids = [tokenizer.eos_token_id]
    for tokens in tokenizer(texts)["input_ids"]:
        ids += [*tokens, tokenizer.eos_token_id]
    fit(model, _batches(torch.tensor(ids), recipe), recipe)
    save_whole(model, tokenizer, path)


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Return GPT-2's kind of tokenizer, byte pairs learned from ``texts``; it can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _config(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batches(ids: torch.Tensor, recipe: Recipe) -> Iterator[Batch]:
    import torch

    for batch in shuffled_windows(ids, recipe):
        # A window may stand at any position, so that all positions are learned from short windows.
        offset = torch.randint(recipe.positions - recipe.window + 1, (len(batch), 1))
        yield {"input_ids": batch, "labels": batch, "position_ids": offset + torch.arange(recipe.window)}


if __name__ == "__main__":
    run_command(
        "pareto_core.tiny_gpt2",
        (TINY_GPT2,),
        lambda _, directory: train(Recipe(), training_texts(), directory),
        tiny_gpt2_path,
    )

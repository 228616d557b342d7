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

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core.backbones import TINY_GPT2
from pareto_core.cache import cache_directory
from pareto_core.errors import ModelError
from pareto_core.library import corpus_hash, library_path, read_functions, split_functions

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


def tiny_gpt2_path() -> Path:
    """Directory of the trained model and its tokenizer; trains it first where it is not there.

    Processes that ask at once wait for the one that trains. Raises :class:`ModelError` where training fails.
    """
    path = cache_directory() / TINY_GPT2 / revision()
    if (path / "config.json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not (path / "config.json").is_file():
            message = f"training the offline GPT-2, once: two to three minutes on two idle cores; kept in {path}"
            print(message, file=sys.stderr, flush=True)
            # In a process of its own: random numbers and peak memory of this one stay as they are.
            command = [sys.executable, "-m", "pareto_core.tiny_gpt2", str(path)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                raise ModelError(f"training the offline GPT-2 failed: {done.stderr.strip()[-500:]}")
    return path


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
    _fit(model, torch.tensor(ids), recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        made = Path(directory) / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            os.rename(made, path)
        except OSError:
            if not (path / "config.json").is_file():  # else another process was faster: its files are as good
                raise


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


def _fit(model: Any, ids: torch.Tensor, recipe: Recipe) -> None:
    import torch

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    model.train()
    for step, batch in enumerate(_batches(ids, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(step, recipe)
        # A window may stand at any position, so that all positions are learned from short windows.
        offset = torch.randint(recipe.positions - recipe.window + 1, (len(batch), 1))
        loss = model(batch, labels=batch, position_ids=offset + torch.arange(recipe.window)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _rate(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: a linear rise over the warm-up, then a linear fall to zero."""
    return min((step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.steps - recipe.warmup))


def _batches(ids: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield ``steps`` batches (batch, window): all windows in random order, over and over."""
    import torch

    windows = ids[: len(ids) // recipe.window * recipe.window].view(-1, recipe.window)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(recipe.steps):
        while len(order) < recipe.batch:
            order = torch.cat([order, torch.randperm(len(windows))])
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        yield windows[chosen]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Recipe(), training_texts(), Path(sys.argv[1]))
    else:
        print(tiny_gpt2_path())

"""A small Llama over bytes that is trained once on this machine and kept: the decoder that needs no download.

It reads the sources of CPython's library and the Python language reference (``pydoc_data.topics``), files in whole:
those whose name hashes into the training split, and nothing of those that :mod:`pareto_core.tasks.byte_text` scores.
Two recipes make the same network: ``byte-llama`` takes two to three minutes on two cores, for a first look;
``byte-llama-long`` reads 8 times as much in longer windows, in some 25 minutes, for figures about accuracy: weights
that hardly differ from their random start lose little by any treatment. The files (``config.json``,
``model.safetensors``, the tokenizer's) are kept in the cache directory, under a key of corpus and recipe. ``python -m
pareto_core.byte_llama`` makes them ahead of time.

Byte b is token b; :data:`END` begins and ends a text, :data:`PAD` fills a batch. The vocabulary has further marks that
nothing uses: its size is a multiple of 16, as products with 4-bit weights want it, and the inputs of every linear layer
are multiples of 256. The same recipe gives the same weights on one machine; another processor rounds differently, hence
trains a slightly different model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pareto_core.backbones import BYTE_LLAMA, BYTE_LLAMA_LONG
from pareto_core.cache import cache_directory
from pareto_core.errors import DataError
from pareto_core.library import library_path
from pareto_core.task import Batch, Split
from pareto_core.tasks.docstrings import EXCLUDED, split_of
from pareto_core.tiny_gpt2 import topics
from pareto_core.training_once import fit, run_command, save_whole, shuffled_windows, to_standard_error, trained_once

if TYPE_CHECKING:
    import torch

END, PAD = 256, 257
VOCABULARY = 272
#: tables of characters that are copies of each other, and what describes the machine that Python was built on
_TABLES, _MACHINE = "encodings", "_sysconfigdata"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the model besides its texts: its shape, and ``steps`` batches of ``batch`` windows of bytes."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    inner: int = 768
    positions: int = 1024
    window: int = 256
    batch: int = 4
    steps: int = 750
    learning_rate: float = 3e-3
    warmup: int = 40


#: by the backbone's name; ``long`` trains on windows as long as those that are scored
RECIPES = {BYTE_LLAMA: Recipe(), BYTE_LLAMA_LONG: Recipe(window=512, steps=3000, warmup=100)}
_MINUTES = {BYTE_LLAMA: "two to three minutes", BYTE_LLAMA_LONG: "some 25 minutes"}


def byte_llama_path(name: str = BYTE_LLAMA, say: Callable[[str], None] = to_standard_error) -> Path:
    """Directory of the trained model ``name`` of :data:`RECIPES` and its tokenizer; trains it where it is not there.

    ``say`` is told how far the training is. Processes that ask at once wait for the one that trains. Raises
    :class:`ModelError` where training fails.
    """
    path = cache_directory() / name / revision(name)
    return trained_once(path, "pareto_core.byte_llama", "the byte-level Llama", name, _MINUTES[name], say)


@functools.cache
def revision(name: str = BYTE_LLAMA) -> str:
    """Key of the model: a hash of its texts and its recipe."""
    content = [text_hash(read_texts()), dataclasses.astuple(RECIPES[name]), VOCABULARY]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_texts(root: Path | None = None) -> dict[str, bytes]:
    """Read the texts by name, sorted: the Python files under ``root``, or the interpreter's library and its topics.

    Character tables (``encodings``) and what describes the machine that Python was built on are left out. Raises
    :class:`DataError` where there is nothing.
    """
    folder = library_path() if root is None else root
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        known = {*EXCLUDED, _TABLES, "pydoc_data"} if root is None else EXCLUDED
        if not known & set(place.parts) and not place.name.startswith(_MACHINE):
            found[place.as_posix()] = path.read_bytes()
    if root is None:
        found |= {f"topics/{number:03}": text.encode() for number, text in enumerate(topics())}
    found = {name: text for name, text in found.items() if text.strip()}
    if not found:
        raise DataError(f"no Python files with any text under {folder}")
    return found


def split_texts(texts: dict[str, bytes]) -> dict[Split, dict[str, bytes]]:
    """Put each text into ``train`` (about 70 %), ``dev`` (10 %) or ``test`` (20 %) by its name, the order kept."""
    found: dict[Split, dict[str, bytes]] = {"train": {}, "dev": {}, "test": {}}
    for name, text in texts.items():
        found[split_of(name)][name] = text
    return found


def text_hash(texts: dict[str, bytes]) -> str:
    """Return the sha256 of names and texts: results over different ones are not compared."""
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def tokens_of(texts: dict[str, bytes]) -> torch.Tensor:
    """All texts as tokens (length), :data:`END` before each and after the last."""
    import numpy as np
    import torch

    parts = [np.array([END])]
    for text in texts.values():
        parts += [np.frombuffer(text, np.uint8), np.array([END])]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def tokenizer() -> Any:
    """Return a transformers tokenizer of single bytes, each its own token; it can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level tokenizers write each byte as a character: printable ones as themselves, the others from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    names = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    marks = ["<|end|>", "<|pad|>", *(f"<|{number}|>" for number in range(PAD + 1, VOCABULARY))]
    raw = Tokenizer(models.BPE({name: token for token, name in enumerate(names)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(marks)
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(
        tokenizer_object=raw,
        bos_token=marks[0],
        eos_token=marks[0],
        pad_token=marks[1],
        clean_up_tokenization_spaces=False,
    )


def train(recipe: Recipe, texts: dict[str, bytes], path: Path) -> None:
    """Train the model on ``texts`` and write it with its tokenizer to the new directory ``path``."""
    import torch

    torch.manual_seed(0)
    model = untrained(recipe)
    fit(model, _batches(tokens_of(texts), recipe), recipe)
    save_whole(model, tokenizer(), path)


def untrained(recipe: Recipe) -> Any:
    """Return the model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.positions,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def _batches(ids: torch.Tensor, recipe: Recipe) -> Iterator[Batch]:
    for batch in shuffled_windows(ids, recipe):
        yield {"input_ids": batch, "labels": batch}


if __name__ == "__main__":
    run_command(
        "pareto_core.byte_llama",
        tuple(RECIPES),
        lambda name, directory: train(RECIPES[name], split_texts(read_texts())["train"], directory),
        byte_llama_path,
    )

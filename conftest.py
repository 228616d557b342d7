"""Tests side by side: each worker of pytest-xdist keeps to a CPU of its own, and so do the processes that it starts."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Threads that wander between CPUs which several workers share wait for each other most of the time."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(worker.removeprefix("gw")) % len(cpus)]})
        os.environ["OMP_NUM_THREADS"] = "1"

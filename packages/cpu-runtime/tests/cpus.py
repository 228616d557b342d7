"""CPUs for the tests that need several: a worker of pytest-xdist keeps to one (see the repository's conftest.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

#: those of the whole run
CPUS = sorted(os.sched_getaffinity(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else 0))


def needs_cpus(test: Callable[..., Any]) -> Any:
    """Give ``test`` all of :data:`CPUS`; skip it where there are fewer than two."""
    return pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")(pytest.mark.usefixtures("all_cpus")(test))

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cpus import CPUS


@pytest.fixture
def all_cpus() -> Iterator[None]:
    """Lift the limit of one CPU for a test."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CPUS)
    yield
    os.sched_setaffinity(0, before)

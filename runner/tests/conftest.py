"""What several test files use."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY = """
title = "Tiny"
text = "Does it work?"
baseline = "Full"
[task]
name = "core.tiny"
[training]
batch_size = 16
learning_rate = 0.01
max_steps = 4
[[variants]]
name = "Full"
stages = [[{ method = "full" }]]
[[variants]]
name = "KronA"
stages = [[{ method = "krona", a_shape = [8, 6] }]]
compare_with = ["Full"]
[profiles.smoke]
measure_seconds = 0.2
[profiles.full]
seeds = [0, 1, 2]
"""


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A benchmark file on the tiny synthetic task."""
    path = tmp_path / "tiny" / "question.toml"
    path.parent.mkdir()
    path.write_text(TINY)
    return path

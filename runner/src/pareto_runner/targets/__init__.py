"""The hardware that models run on; one file each, imported when it is used."""

from __future__ import annotations

import importlib

from pareto_core import Target


def make(name: str) -> Target:
    """Make the target whose module is called ``name``."""
    target = importlib.import_module(f"pareto_runner.targets.{name}").TARGET()
    assert isinstance(target, Target)
    return target

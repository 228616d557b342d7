from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def reference(monkeypatch):
    """Programs in plain float64 in place of the native ones."""
    import reference_native

    for module in ("matrix", "families.build", "runtime"):
        monkeypatch.setattr(f"pareto_cpu_runtime.{module}.native", lambda: reference_native)

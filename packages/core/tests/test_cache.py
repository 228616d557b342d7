from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pareto_core.cache import cache_directory, write_json


def test_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/somewhere")
    monkeypatch.delenv("PARETO_CACHE")
    assert cache_directory() == Path("/xdg/pareto")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_directory() == Path("/home/me/.cache/pareto")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text()) == {"é": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"é": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text()) == {"é": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_names_that_are_no_text_come_back_as_they_were(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff")
    write_json(tmp_path / "x.json", {"reason": name, "é": "→"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"reason": name, "é": "→"}

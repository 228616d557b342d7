"""Whoever adds a package is told here what else has to know about it."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MEMBERS = [*sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml")), ROOT / "runner"]


def _import_name(member: Path) -> str:
    (source,) = (path.name for path in (member / "src").iterdir() if (path / "__init__.py").is_file())
    return source


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_the_import_contracts_cover_every_member(member):
    name = _import_name(member)
    contracts = SETTINGS["tool"]["importlinter"]
    assert name in contracts["root_packages"]
    (layers,) = (contract["layers"] for contract in contracts["contracts"] if contract["type"] == "layers")
    assert name in [part for layer in layers for part in layer.split(" | ")]
    if member.name != "runner":
        (engines,) = (c for c in contracts["contracts"] if "deepspeed" in c.get("forbidden_modules", []))
        assert name in engines["source_modules"]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_members_come_from_the_workspace(member):
    project = tomllib.loads((member / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SETTINGS["tool"]["uv"]["sources"][project["name"]] == {"workspace": True}
    assert project["name"].replace("-", "_") == _import_name(member)
    assert project["license"] == "Apache-2.0"

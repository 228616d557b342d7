"""The lock stays neutral: rewriting, and the check that guards it."""

from pathlib import Path

import pytest

import lock

ROOT = Path(__file__).resolve().parents[2]
SCHEME = "https:" + "//"

RESOLVED = f"""\
version = 1

[[package]]
name = "pareto-core"
source = {{ editable = "packages/core" }}
dependencies = [
    {{ name = "numpy", version = "2.4.6", source = {{ registry = "{SCHEME}a.example/simple" }}, marker = "x < '3'" }},
]

[[package]]
name = "numpy"
version = "2.4.6"
source = {{ registry = "{SCHEME}a.example/simple" }}
sdist = {{ url = "{SCHEME}f.example/a/b/numpy-2.4.6.tar.gz", hash = "sha256:00", size = 7 }}
wheels = [
    {{ url = "{SCHEME}f.example/c/numpy-2.4.6-py3-none-any.whl#sha256=11", hash = "sha256:11" }},
    {{ url = "{SCHEME}f.example/c/numpy-2.4.6%2Bx-py3-none-any.whl", hash = "sha256:22" }},
]
"""

NEUTRAL = """\
version = 1

[[package]]
name = "pareto-core"
source = { editable = "packages/core" }
dependencies = [
    { name = "numpy", version = "2.4.6", source = { registry = "index" }, marker = "x < '3'" },
]

[[package]]
name = "numpy"
version = "2.4.6"
source = { registry = "index" }
sdist = { url = "numpy-2.4.6.tar.gz", hash = "sha256:00", size = 7 }
wheels = [
    { url = "numpy-2.4.6-py3-none-any.whl", hash = "sha256:11" },
    { url = "numpy-2.4.6%2Bx-py3-none-any.whl", hash = "sha256:22" },
]
"""

GIT = f'source = {{ git = "{SCHEME}g.example/a/b.git?rev=v1#0123" }}\n'


def test_neutralise_rewrites_registries_and_files_and_nothing_else():
    assert lock.neutralise(RESOLVED) == NEUTRAL


def test_neutralise_is_idempotent():
    assert lock.neutralise(NEUTRAL) == NEUTRAL


def test_git_sources_are_left_for_the_check_to_refuse():
    assert lock.neutralise(GIT) == GIT
    assert list(lock.problems(GIT)) == [f"line 1: names a host: {GIT.strip()}"]


def test_a_neutral_lock_has_no_problems():
    assert list(lock.problems(NEUTRAL)) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f'source = {{ registry = "{SCHEME}a.example/simple" }}', "names a host"),
        ('source = { registry = "/srv/wheels" }', "outside the project"),
        ('source = { registry = "../../srv/wheels" }', "outside the project"),
        ('source = { directory = "C:/wheels" }', "outside the project"),
        ('source = { registry = "wheels" }', "registry other than"),
        ('    { path = "torch-2.11.0-py3-none-any.whl", hash = "sha256:00" },', "folder of one machine"),
        ('version = "2.11.0+cpu"', "local version"),
    ],
)
def test_the_check_names_the_line_and_the_reason(line, reason):
    (problem,) = lock.problems(f"version = 1\n\n{line}\n")
    assert problem.startswith("line 3: ")
    assert reason in problem


def test_command_line_rewrites_then_checks(tmp_path, capsys):
    path = tmp_path / "uv.lock"
    path.write_text(RESOLVED)
    assert lock.main(["check", str(path)]) == 1
    assert f"{path}: line 7: names a host" in capsys.readouterr().err
    assert lock.main(["rewrite", str(path)]) == 0
    assert path.read_text() == NEUTRAL
    assert lock.main(["check", str(path)]) == 0


@pytest.mark.parametrize("arguments", [[], ["check"], ["frobnicate", "uv.lock"], ["check", "nowhere.lock"]])
def test_command_line_refuses_wrong_usage(arguments, capsys):
    assert lock.main(arguments) == 2
    assert capsys.readouterr().err


def test_the_lock_of_this_repository_is_neutral():
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    assert list(lock.problems(text)) == []
    assert lock.neutralise(text) == text

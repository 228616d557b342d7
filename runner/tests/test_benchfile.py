"""Benchmark files: what a good one means, and that each bad one gets one clear message and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pareto_runner.benchfile import BenchmarkFileError, Choices, cases, read
from pareto_runner.cli import main

GOOD = """
title = "T"
baseline = "Full"
[task]
name = "core.tiny"
[training]
batch_size = 16
learning_rate = 0.01
[engine]
zero_stage = 1
[[variants]]
name = "Full"
stages = [[{ method = "full" }]]
[[variants]]
name = "KronA"
stages = [[{ method = "krona", a_shape = [8, 6] }]]
training = { learning_rate = 0.02 }
compare_with = ["Full"]
[profiles.smoke]
training = { max_steps = 3 }
seeds = [0, 1]
[profiles.two]
[[profiles.two.cases]]
name = "short"
task = { length = 8 }
[[profiles.two.cases]]
name = "long"
task = { length = 20 }
training = { epochs = 2.5 }
variants = { KronA = { training = { learning_rate = 0.5 }, methods = { krona = { a_shape = [6, 8] } } } }
"""

#: name of the fault: (text to replace, replacement, words that the message must hold)
BAD = {
    "not toml": ('title = "T"', "title = = 3", ["is not TOML", "line 2"]),
    "title missing": ('title = "T"', "", ["title", "required"]),
    "title empty": ('title = "T"', 'title = ""', ["title", "at least 1"]),
    "title wrong type": ('title = "T"', "title = 3", ["title", "string", "3"]),
    "unknown top key": ('title = "T"', 'title = "T"\nbasline = "Full"', ["basline", "'baseline'"]),
    "unknown baseline": ('baseline = "Full"', 'baseline = "Fall"', ["baseline", "Fall", "'Full'"]),
    "task missing": ('[task]\nname = "core.tiny"', "", ["task", "required"]),
    "task name missing": ('name = "core.tiny"', "length = 8", ["task.name", "core.docstrings"]),
    "unknown task": ('name = "core.tiny"', 'name = "core.tinny"', ["core.tinny", "'core.tiny'"]),
    "unknown task field": ('name = "core.tiny"', 'name = "core.tiny"\nlenth = 8', ["lenth", "'length'"]),
    "task field type": ('name = "core.tiny"', 'name = "core.tiny"\nlength = "8"', ["length", "'8'", "an integer"]),
    "variants missing": ("[[variants]]", "[[rows]]", ["no such key 'rows'"]),
    "variants empty": (GOOD[GOOD.index("[[variants]]") : GOOD.index("[profiles.smoke]")], "", ["variants", "required"]),
    "variants not a list": ("[[variants]]\nname = \"Full\"", "[variants]\nname = \"Full\"", ["is not TOML"]),
    "variant without name": ('[[variants]]\nname = "Full"', "[[variants]]", ["variants[0].name", "required"]),
    "variant without a printable name": ('name = "KronA"\n', 'name = "\\u001b"\n', ["variants[1].name", "x1b"]),
    "variant with a blank name": ('name = "KronA"\n', 'name = " "\n', ["variants[1].name", "1 to 100 printable"]),
    "profile without a printable name": ("[profiles.two]", '[profiles."a\\nb"]', ["profiles.a", "1 to 100 printable"]),
    "case with a long name": ('name = "long"', f'name = "{"x" * 101}"', ["profiles.two.cases[1].name", "1 to 100"]),
    "two variants alike": ('name = "KronA"\n', 'name = "Full"\n', ["two variants", "'Full'"]),
    "stages missing": ('stages = [[{ method = "full" }]]', "", ["variants[0].stages", "required"]),
    "stages empty": ('stages = [[{ method = "full" }]]', "stages = []", ["variants[0].stages", "at least 1"]),
    "stage empty": ('stages = [[{ method = "full" }]]', "stages = [[]]", ["variants[0].stages[0]", "at least 1"]),
    "stages a text": ('stages = [[{ method = "full" }]]', 'stages = "full"', ["variants[0].stages", "list", "'full'"]),
    "unknown method": ('method = "full"', 'method = "ful"', ["ful", "'full'", "krona"]),
    "method name a list": ('method = "krona"', 'method = ["krona"]', ["stages[0][0].method", "['krona']"]),
    "method field a date": ("[8, 6]", "2024-01-01", ["a_shape", "2024"]),
    "integer past 64 bits": ("[8, 6]", f"[8, 0x{'f' * 5000}]", ["a_shape[1]", "2^63"]),
    "integer of 5000 digits": ("[8, 6]", f"[8, {'9' * 5000}]", ["is not TOML", "4300 digits"]),
    "deep table": ("a_shape", f"a_shape{'.k' * 50}", ["a_shape.k.k", "32 levels"]),
    "line breaks in a key": ("a_shape", '"a\\nb"', ["a\\nb", "a_shape"]),
    "method without name": ('{ method = "full" }', "{ r = 1 }", ["stages[0][0].method", "krona"]),
    "unknown method field": ("a_shape", "a_shap", ["a_shap", "'a_shape'"]),
    "method field type": ("[8, 6]", '"8x6"', ["a_shape", "'8x6'", "a list of 2"]),
    "method field length": ("[8, 6]", "[8, 6, 2]", ["a_shape", "a list of 2"]),
    "method field range": ("[8, 6]", "[8, 0]", ["a_shape", "0"]),
    "training field type": ("batch_size = 16", "batch_size = 16.5", ["batch_size", "16.5", "an integer"]),
    "training field range": ("batch_size = 16", "batch_size = 0", ["batch_size", "above 0"]),
    "unknown training field": ("batch_size = 16", "batchsize = 16", ["batchsize", "'batch_size'"]),
    "learning rate": ("learning_rate = 0.01", "learning_rate = nan", ["learning_rate", "finite"]),
    "negative rate": ("learning_rate = 0.02", "learning_rate = -1", ["learning_rate", "above 0"]),
    "zero stage": ("zero_stage = 1", "zero_stage = 4", ["zero_stage", "0, 1, 2, 3"]),
    "unknown engine field": ("zero_stage = 1", "zero = 1", ["zero", "zero_stage"]),
    "rival unknown": ('compare_with = ["Full"]', 'compare_with = ["Fill"]', ["compare_with", "Fill", "'Full'"]),
    "profiles missing": (GOOD[GOOD.index("[profiles.smoke]") :], "", ["profiles", "required"]),
    "profile key": ("seeds = [0, 1]", "seed = [0, 1]", ["profiles.smoke", "no such key 'seed'", "'seeds'"]),
    "seeds empty": ("seeds = [0, 1]", "seeds = []", ["seeds", "at least one"]),
    "seeds twice": ("seeds = [0, 1]", "seeds = [1, 1]", ["seeds", "twice"]),
    "seeds huge": ("seeds = [0, 1]", "seeds = [0, 4294967296]", ["seeds", "none", "above 4294967295"]),
    "seeds type": ("seeds = [0, 1]", 'seeds = ["0"]', ["seeds[0]", "integer"]),
    "steps": ("max_steps = 3", "max_steps = 0", ["max_steps", "above 0"]),
    "two cases alike": ('name = "long"', 'name = "short"', ["two cases", "'two'", "'short'"]),
    "case without name": ('name = "short"', "", ["profiles.two.cases[0].name", "required"]),
    "override of no variant": ("variants = { KronA", "variants = { Krone", ["Krone", "'KronA'"]),
}  # fmt: skip


def write(folder: Path, text: str) -> Path:
    path = folder / "question.toml"
    path.write_text(text)
    return path


def test_the_good_file_expands_to_variants_and_seeds(tmp_path: Path) -> None:
    question = read(write(tmp_path, GOOD))
    [(name, specs)] = cases(question, Choices())
    assert name == f"{tmp_path.name}/question"
    assert [(s.variant, s.seed) for s in specs] == [("Full", 0), ("KronA", 0), ("Full", 1), ("KronA", 1)]
    full, krona = specs[0].stages[0], specs[1].stages[0]
    assert (full.training.learning_rate, krona.training.learning_rate) == (0.01, 0.02)
    assert full.training.budget.max_steps == 3
    assert krona.methods[0].fields == {"a_shape": [8, 6]}
    assert specs[1].rivals == ("Full",)
    assert (specs[0].engine.zero_stage, specs[0].engine.precision) == (1, "fp32")


def test_cases_override_task_training_and_method_fields(tmp_path: Path) -> None:
    question = read(write(tmp_path, GOOD))
    (short, a), (long, b) = cases(question, Choices(profile="two", seeds=(7,)))
    assert (short.rpartition("/")[2], long.rpartition("/")[2]) == ("short", "long")
    assert (a[0].task.fields, b[0].task.fields) == ({"length": 8}, {"length": 20})
    assert b[1].stages[0].training.budget.epochs == 2.5
    assert b[1].stages[0].training.learning_rate == 0.5
    assert b[1].stages[0].methods[0].fields == {"a_shape": [6, 8]}
    assert a[1].stages[0].methods[0].fields == {"a_shape": [8, 6]}
    assert {spec.seed for spec in a + b} == {7}


def test_command_line_choices_reach_the_specification(tmp_path: Path) -> None:
    text = (
        GOOD.replace("core.tiny", "core.docstrings")
        .replace("task = { length = 8 }", "")
        .replace("task = { length = 20 }", "")
    )
    question = read(write(tmp_path, text))
    [(_, specs)] = cases(question, Choices(target="gpu", model="some/model", data="here", processes=2))
    assert specs[0].task.fields == {"model": "some/model", "data": "here"}
    assert (specs[0].target, specs[0].engine.precision, specs[0].engine.processes) == ("gpu", "bf16", 2)


@pytest.mark.parametrize("fault", BAD)
def test_each_bad_file_gives_one_clear_message(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, words = BAD[fault]
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(BenchmarkFileError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message, message
    monkeypatch.setattr("sys.argv", ["pareto", "bench", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_there_are_at_least_thirty_bad_files() -> None:
    assert len(BAD) >= 30


def test_more_combinations_than_anyone_runs_are_refused(tmp_path: Path) -> None:
    variants = "".join(f'[[variants]]\nname = "{n}"\nstages = [[{{ method = "full" }}]]\n' for n in range(101))
    cases = "".join(f'[[profiles.p.cases]]\nname = "{n}"\n' for n in range(100))
    path = write(tmp_path, f'title = "T"\ntask = {{ name = "core.tiny" }}\n{variants}{cases}')
    with pytest.raises(BenchmarkFileError, match="10100 variants in all cases of all profiles; at most 10000"):
        read(path)


def test_a_file_in_this_folder_is_named_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert read(Path("question.toml")).name == f"{tmp_path.name}/question"


def test_unknown_profile_names_the_known(tmp_path: Path) -> None:
    question = read(write(tmp_path, GOOD))
    with pytest.raises(BenchmarkFileError, match="'smoke'"):
        list(cases(question, Choices(profile="smok")))


def test_every_benchmark_of_the_project_is_readable() -> None:
    paths = sorted((Path(__file__).parents[2] / "benchmarks").glob("*/*.toml"))
    assert paths
    for path in paths:
        assert {"smoke", "full"} <= set(read(path).content.profiles)


def test_help_teaches() -> None:
    from pareto_runner.cli import app

    text = CliRunner().invoke(app, ["bench", "--help"]).output
    for word in ("--profile", "--seeds", "--only", "--nproc", "--model", "--data", "--dry-run", "--target"):
        assert word in text

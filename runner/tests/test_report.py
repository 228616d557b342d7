"""The report: figures in its tables by hand, machines apart, hostile names and figures, failures, nothing at all."""

from __future__ import annotations

import csv
import dataclasses
import errno
import math
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from rich.console import Console
from scipy import stats

from pareto_core import DataError, Measurement, Result
from pareto_runner import report, sections, tables, wording
from pareto_runner.journal import Damaged
from pareto_runner.sections import QuestionInfo, Reference

SAMPLES = runpy.run_path(str(Path(__file__).with_name("samples.py")))
ok, failed, suite, compare = (SAMPLES[name] for name in ("ok", "failed", "suite", "compare"))
NAME = "adapters/krona_vs_lora"
TABLE_46 = Reference(
    "Table 4.6",
    "Normalized latency and training time",
    ("Inference latency (%)", "Training time (%)"),
    {"Fine-tuning": (100, 100), "KronA": (100, 75), "Adapter": (146, None)},
)
INFO = QuestionInfo(
    NAME,
    title="KronA against LoRA",
    text="Does a higher rank buy accuracy?",
    baseline="Full fine-tuning",
    references=(TABLE_46,),
    ours={"Fine-tuning": "Full fine-tuning", "KronA": "KronA (24, 16)"},
)


def section(results: list[Result], info: QuestionInfo = INFO) -> sections.Section:
    (only,) = sections.make_sections(results, {NAME: info})
    return only


def row(results: list[Result], variant: str) -> dict[str, tables.Cell]:
    """Cells of a variant's row by head."""
    table = tables.results_table(section(results))
    found = next(cells for cells in table.rows if cells[0].text == variant)
    return dict(zip(table.heads, found, strict=False))


def test_student_quantiles_are_scipys() -> None:
    exact = [round(float(stats.t.ppf(0.975, degrees)), 3) for degrees in range(1, 31)]
    assert list(sections.STUDENT) == exact


def test_score_of_several_seeds() -> None:
    assert sections.combine_score([70.0]) == (70.0, None, None)
    assert sections.combine_score([70.0, 72.0]) == (71.0, 70.0, 72.0)
    mean, low, high = sections.combine_score([70.0, 71.0, 72.0])
    assert mean == 71.0
    assert high == pytest.approx(71 + 4.303 / math.sqrt(3), abs=1e-9)  # standard deviation 1
    assert low == pytest.approx(71 - 4.303 / math.sqrt(3), abs=1e-9)
    many = [float(i % 7) for i in range(50)]
    half = sections.combine_score(many)[2] - sections.combine_score(many)[0]
    assert half == pytest.approx(stats.t.ppf(0.975, 49) * stats.sem(many), rel=2e-3)


def test_ratios_of_several_seeds_are_combined_conservatively() -> None:
    both = sections.combine_ratio([compare("x", 0.8, 0.05), compare("x", 0.9, 0.05)])
    assert both.ratio == pytest.approx(math.sqrt(0.72))
    assert (both.low, both.high, both.verdict) == (0.75, pytest.approx(0.95), "better")
    wide = dataclasses.replace(compare("x", 0.9, 0.05), margin=0.04)
    assert sections.combine_ratio([compare("x", 0.8, 0.05), wide]).margin == 0.04
    split = sections.combine_ratio([compare("x", 0.9, 0.05), compare("x", 0.98, 0.05)])
    assert split.verdict == "inconclusive"


def test_a_row_by_hand() -> None:
    cells = row(suite(3), "KronA (24, 16)")
    # accuracies 68.4, 68.8, 69.2: standard deviation 0.4, half width 4.303 * 0.4 / sqrt(3) = 0.99
    assert cells["Accuracy (%)"].text == "68.8 ± 1.0"
    assert cells["Variant"].spread == "3 seeds"
    assert cells["Trainable parameters"] == tables.Cell("17,001", spread="0.0749 %")
    latency = cells["Latency, batch 1 (ms)"]
    # latencies 4.008, 4.028, 4.048, each with p10 = 0.97 and p90 = 1.06 of it
    assert (latency.text, latency.spread) == ("4.03", "p10–p90 3.91–4.27")
    # intervals from 0.99 to 1.02 of each: from the lowest to the highest
    assert latency.interval == "[3.97, 4.13]"
    # ratios 1.002, 1.003, 1.004, each ± 0.01
    assert latency.change == "×1.003 [0.992, 1.014]"
    assert latency.verdict == "inconclusive"
    step = cells["Training step (ms)"]
    assert (step.text, step.change, step.verdict) == ("139", "×0.764 [0.754, 0.774]", "better")
    assert cells["Training peak memory (MiB)"].text == "708"
    assert cells["Inference peak memory (MiB)"].text == "513"
    assert "Weights (MiB)" not in cells  # equal for all


def test_the_baseline_comes_first_and_is_marked() -> None:
    table = tables.results_table(section(list(reversed(suite(1)))))
    assert table.rows[0][0] == tables.Cell("Full fine-tuning", spread="1 seed", mark="baseline")


def test_a_column_says_what_the_machine_tells_apart() -> None:
    coarse = dataclasses.replace(compare("train_step_ms", 0.8), margin=0.034)
    other = dataclasses.replace(ok("BitFit"), comparisons=(coarse,))
    table = tables.results_table(section([*(r for r in suite(1) if r.spec.variant != "BitFit"), other]))
    notes = dict(zip(table.heads, table.notes, strict=True))
    assert notes["Training step (ms)"] == "told apart beyond ±3.4 %"  # the coarsest of the column
    assert notes["Latency, batch 1 (ms)"] == "told apart beyond ±1 %"
    assert notes["Accuracy (%)"] == notes["Training peak memory (MiB)"] == ""


def test_the_score_of_one_seed_is_compared_as_the_result_says() -> None:
    cell = row(suite(1), "KronA (24, 16)")["Accuracy (%)"]
    assert cell.change == "−2.4 [−3.4, −1.4], p = 0.04"
    assert cell.verdict == "worse"
    assert row(suite(1), "Full fine-tuning")["Accuracy (%)"].change == ""


def test_scores_of_several_seeds_are_compared_over_the_same_items() -> None:
    cell = row(suite(3), "BitFit")["Accuracy (%)"]
    lines = [[np.array(ok(name, seed).resampled) for seed in range(3)] for name in ("BitFit", "Full fine-tuning")]
    replicates = np.mean(lines[0], axis=0) - np.mean(lines[1], axis=0)
    low, high = np.quantile(replicates, [0.025, 0.975])
    assert cell.change == f"−7.8 [−{-low:.1f}, −{-high:.1f}]"  # every seed differs by 7.8, so seeds add no scatter
    assert cell.verdict == "worse"


def test_one_seeds_score_is_bounded_by_its_resamples() -> None:
    figure = section(suite(1)).rows[1].score
    assert figure is not None
    ordered = sorted(ok("BitFit").resampled)
    assert figure.interval == (ordered[5], ordered[-6])  # 2.5 % of 200 lie outside on either side
    own = Measurement(name="accuracy", value=63.0, unit="%", interval_low=61.0, interval_high=65.0)
    result = dataclasses.replace(ok("BitFit"), measurements=(own,))
    assert row([result], "BitFit")["Accuracy (%)"].interval == "[61.0, 65.0]"


def test_an_interval_of_some_seeds_alone_is_not_shown() -> None:
    bare = dataclasses.replace(
        ok("BitFit", 1), measurements=(Measurement(name="latency_ms.batch1", value=4.0, unit="ms"),)
    )
    assert row([ok("BitFit", 0), bare], "BitFit")["Latency, batch 1 (ms)"].interval == ""


def test_one_and_two_seeds_say_what_their_interval_is() -> None:
    one, two = (row(suite(count), "LoRA r=1")["Accuracy (%)"] for count in (1, 2))
    assert (one.text, one.spread, bool(one.interval)) == ("67.5", "", True)
    assert (two.text, two.spread, two.interval) == ("67.7", "67.5–67.9", "")
    assert "one seed (0)" in section(suite(1)).facts


def test_failed_seeds_are_counted_and_failed_variants_keep_their_row() -> None:
    results = [*suite(3), failed("LoRA r=1", "out of memory", 3), failed("KronA (7, 5)", "7 does not divide 384")]
    assert row(results, "LoRA r=1")["Variant"].spread == "3 of 4 seeds"
    assert row(results, "KronA (7, 5)")["Accuracy (%)"] == tables.Cell("7 does not divide 384", mark="failed")


def test_a_run_that_knew_no_machine_joins_the_section_that_it_fits() -> None:
    early = dataclasses.replace(failed("KronA (7, 5)", "refused"), machine={})
    assert len(sections.make_sections([early, *suite(1)], {})) == 1
    other = dataclasses.replace(ok("LoRA r=1", 5), machine={"cpu": "Another CPU"})
    assert len(sections.make_sections([early, *suite(1), other], {})) == 2


def test_the_later_result_of_a_seed_stands() -> None:
    for results in ([failed("BitFit", "once"), ok("BitFit")], [ok("BitFit"), failed("BitFit", "now")]):
        (kept,) = section(results).rows[0].results
        assert kept is results[-1]


def test_machines_are_never_mixed() -> None:
    newer = {**SAMPLES["MACHINE"], "libraries": {"torch": "2.15.0", "transformers": "5.23.0"}}
    slow = [dataclasses.replace(result, machine=newer) for result in suite(2)[4:]]
    slow = [
        dataclasses.replace(r, measurements=(Measurement(name="latency_ms.batch1", value=400.0, unit="ms"),))
        for r in slow
    ]
    parts = sections.make_sections([*suite(1), *slow], {NAME: INFO})
    assert [part.machine.split(" · ", 2)[2] for part in parts] == [
        "libraries torch 2.11.0",
        "libraries torch 2.15.0",
    ]
    assert [part.title.endswith(part.machine) for part in parts] == [True, True]
    assert [{row.figures["latency_ms.batch1"].value for row in part.rows} for part in parts] == [{4.0, 4.008}, {400.0}]
    assert [name for name, _ in tables.environment_tables([*suite(1), *slow])] == [part.machine for part in parts]


def test_a_machines_name_says_as_little_as_tells_it_apart() -> None:
    machines = [{"cpu": "A"}, {"cpu": "A", "turbo": True}, {"cpu": "A", "turbo": True, "smt": False}, {"cpu": "B"}, {}]
    results = [dataclasses.replace(ok("BitFit"), machine=machine) for machine in machines]
    assert list(sections.machine_names(results).values()) == [
        "A · turbo – · smt –",
        "A · turbo True · smt –",
        "A · turbo True · smt False",
        "B",
        "machine not recorded",
    ]


def test_many_values_of_a_fact_are_its_range() -> None:
    results = [
        dataclasses.replace(ok("BitFit", seed), context={"load": load}) for seed, load in enumerate([9.5, 10.2, 2, 4])
    ]
    ((_, facts),) = tables.environment_tables(results)
    assert dict(facts)["load"] == "2 … 10.2 (4 values)"


def test_code_that_changed_between_the_seeds_is_told() -> None:
    def measured(code: str, seed: int) -> Result:
        return dataclasses.replace(ok("BitFit", seed), context={"code": code})

    warning = "seeds measured with different code"
    assert warning in section([measured("a", 0), measured("b", 1)]).facts
    assert warning not in section([measured("a", 0), measured("a", 1)]).facts


def test_other_targets_and_data_have_sections_of_their_own() -> None:
    tpu = failed("LoRA r=1", "no TPU", status="unsupported", target="tpu")
    other = dataclasses.replace(ok("LoRA r=1"), data={"corpus": "another"})
    slugs = [part.slug for part in sections.make_sections([*suite(1), tpu], {})]
    assert slugs == ["adapters-krona-vs-lora", "adapters-krona-vs-lora-smoke-tpu"]
    parts = sections.make_sections([*suite(1), other], {NAME: INFO})
    assert [part.slug for part in parts] == [
        "adapters-krona-vs-lora-smoke-xeon",
        "adapters-krona-vs-lora-smoke-xeon-2",
    ]
    assert [part.title for part in parts] == [f"KronA against LoRA · data or task {number}" for number in (1, 2)]
    assert [part.facts[-1] for part in parts] == ["data corpus 8c3fa1", "data corpus another"]


def test_a_case_and_a_profile_are_named_in_the_title() -> None:
    case = f"{NAME}/sst2"
    full = dataclasses.replace(ok("BitFit"), spec=SAMPLES["spec"]("BitFit", profile="full"))
    tuned = dataclasses.replace(ok("BitFit"), spec=SAMPLES["spec"]("BitFit", question=case))
    parts = sections.make_sections([ok("BitFit"), full, tuned], {NAME: INFO, case: INFO})
    assert [part.title for part in parts] == [
        "KronA against LoRA · full · xeon",
        "KronA against LoRA · smoke · xeon",
        "KronA against LoRA · sst2",
    ]


def test_a_rival_beside_the_baseline_has_a_line_and_leaves_the_ratio_alone() -> None:
    [section] = sections.make_sections(suite(1), {})
    assert tables.rivalries(section) == [
        "accuracy: KronA (24, 16) against LoRA r=1 +0.9 [−0.1, +1.9], p = 0.04, inconclusive",
        "train step: KronA (24, 16) against LoRA r=1 ×1.030 [1.020, 1.040], higher beyond ±1 %",
    ]
    krona = next(r for r in section.rows if r.variant == "KronA (24, 16)")
    assert krona.ratios["train_step_ms"].baseline == "Full fine-tuning"


def test_the_score_is_the_one_that_the_result_names() -> None:
    result = dataclasses.replace(
        ok("LoRA r=1"),
        metric="matthews",
        measurements=(
            Measurement(name="train_step_ms", value=1.0, unit="ms"),
            Measurement(name="matthews", value=62.13, unit="%"),
        ),
    )
    assert sections.find_metric([result]) == "matthews"
    assert row([result], "LoRA r=1")["Matthews (%)"].text == "62.1"


def test_compiled_figures_and_synthetic_data_are_marked() -> None:
    compiled = dataclasses.replace(
        ok("LoRA r=1"),
        measurements=(Measurement(name="latency_ms.batch1", value=2.0, unit="ms", kind="compiled"),),
        data={"synthetic": "associative recall"},
    )
    assert row([compiled], "LoRA r=1")["Latency, batch 1 (ms)"].mark == "compiled"
    assert "synthetic data: associative recall" in section([compiled]).facts


def test_the_papers_table_stands_beside_ours() -> None:
    table = tables.reference_table(section(suite(3)), TABLE_46)
    assert table.heads[:3] == ("Method", "Inference latency (%)", "Training time (%)")
    tuning, krona, adapter = (dict(zip(table.heads, cells, strict=True)) for cells in table.rows)
    assert (krona["Training time (%)"].text, krona["Ours: train step ×"].text) == ("75", "0.764")
    assert krona["Method"] == tables.Cell("KronA", spread="KronA (24, 16)")
    assert krona["Ours: accuracy"].text == "68.8 ± 1.0"
    assert (tuning["Ours: train step ×"].text, tuning["Ours: train step ×"].spread) == ("1", "baseline")
    assert (adapter["Training time (%)"].text, adapter["Ours: accuracy"].text) == ("–", "–")


def test_numbers() -> None:
    shown = [wording.number(value) for value in (1234567.0, 100.4, 99.96, 99.94, 10.04, 9.996, 1.234, 0.01234, 5.0)]
    assert shown == ["1,234,567", "100", "100", "99.9", "10.0", "10.0", "1.23", "0.0123", "5"]
    assert wording.number(71.26, "%") == "71.3"
    assert wording.number(1e300) == "1e+300"
    assert [wording.signed(value, "%") for value in (1.26, -0.31, -0.04)] == ["+1.3", "−0.3", "0.0"]
    assert [wording.margin(value) for value in (0.01, 0.0201, 0.034, 1.63)] == ["±1 %", "±2 %", "±3.4 %", "±163 %"]
    assert wording.show({"a": None, "b": [1, 2.50]}) == "a –, b 1, 2.5"


class Page(HTMLParser):
    """Collects tags and text, every address that a browser would load, and where the links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        wanted = [value or "" for name, value in attrs if name in ("src", "srcset", "data", "poster")]
        self.loads += wanted + ([str(dict(attrs).get("href"))] if tag == "link" else [])
        self.links += [value or "" for name, value in attrs if tag == "a" and name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_files_and_the_page(tmp_path: Path) -> None:
    results = [*suite(3), failed("KronA (7, 5)", "7 does not divide 384", log="step 3\nshapes <do not> fit")]
    damaged = [Damaged(tmp_path / "000007-x.json", "not a result of this version: half a file")]
    path = report.write_report(results, {NAME: INFO}, tmp_path / "out", damaged)
    assert path == tmp_path / "out" / "report.html"
    names = {file.name for file in path.parent.iterdir()}
    stem = "adapters-krona-vs-lora"
    kinds = ("pareto.svg", "pareto.png", "pareto.csv", "curves.svg", "curves.png", "curves.csv")
    assert names == {"report.html", "report.md", *(f"{stem}-{kind}" for kind in kinds)}
    text = path.read_text()
    page = Page(text)
    assert page.tags.count("svg") == 4  # three fronts and the curves
    assert not page.loads
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    for link in page.links:
        here = link[1:] in identifiers if link.startswith("#") else (path.parent / link).is_file()
        assert here or link.startswith("https://arxiv.org/"), link
    assert {"svg", "png", "csv"} <= {link.rsplit(".", 1)[-1] for link in page.links}
    for part in (
        "Platinum 8481C",
        "68.8 ± 1.0",
        "×0.764 [0.754, 0.774]",
        "7 does not divide 384",
        "Table 4.6",
        "11.0 %",
        "Full fine-tuning: 71.2 ± 1.0 %",  # the overview's best score
        "told apart beyond ±1 %",
        "step 3\nshapes <do not> fit",
        "000007-x.json: not a result of this version: half a file",
    ):
        assert part in page.text
    assert "no difference, as it should" in page.text  # the A/A control


def test_the_markdown(tmp_path: Path) -> None:
    report.write_report(suite(3), {NAME: INFO}, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| Variant |"))
    assert {line.count("|") for line in lines[head : head + 6]} == {9}
    assert "| Full fine-tuning (baseline) <small>3 seeds</small> | 71.2 ± 1.0 |" in lines[head + 2]
    assert "| KronA (24, 16) <small>3 seeds</small> | 68.8 ± 1.0<br>−2.4 \\[" in lines[head + 5]
    assert "![Pareto front: KronA against LoRA](adapters-krona-vs-lora-pareto.svg)" in lines
    assert lines[head - 2].startswith("**Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz · 2 cores**")


def test_the_csv_has_every_figure_unrounded(tmp_path: Path) -> None:
    report.write_report(suite(3), {NAME: INFO}, tmp_path)
    with open(tmp_path / "adapters-krona-vs-lora-pareto.csv", newline="") as file:
        rows = {line["variant"]: line for line in csv.DictReader(file)}
    krona = rows["KronA (24, 16)"]
    assert float(krona["accuracy"]) == pytest.approx(68.8)
    assert float(krona["ratio.train_step_ms"]) == pytest.approx(139 / 182)
    assert (krona["seeds_ok"], krona["status"], krona["ratio.latency_ms.batch1.verdict"]) == ("3", "ok", "inconclusive")
    assert float(krona["latency_ms.batch1.interval_low"]) == pytest.approx(0.99 * 4.008)
    assert float(krona["ratio.train_step_ms.margin"]) == 0.01
    assert (float(krona["difference.accuracy"]), krona["difference.accuracy.verdict"]) == (-2.4, "worse")
    assert rows["Full fine-tuning"]["front"] == "True"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|\"'[x](javascript:alert(2)) $\\frac$"
    bad = dataclasses.replace(
        ok("LoRA r=1"),
        spec=SAMPLES["spec"](evil, 1),
        machine={"cpu": evil},
        context={"commit": evil, evil: evil},
        data={evil: evil},
        paper={"title": evil, "authors": evil, "year": 1, "url": "javascript:alert(3)"},
    )
    worse = dataclasses.replace(failed(evil, evil, log=f"</pre>{evil}"), machine={"cpu": evil})
    reference = Reference(evil, evil, (evil,), {evil: (evil,)}, evil)
    info = QuestionInfo(NAME, evil, evil, evil, (reference,), {evil: evil})
    damaged = [Damaged(Path(evil.replace("/", "")), evil)]
    path = report.write_report([bad, worse], {NAME: info}, tmp_path, damaged)
    page = Page(path.read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "javascript:alert(3)" not in path.read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("| &lt;script")]
    assert tables
    assert all(file.parent == tmp_path for file in tmp_path.iterdir())


@settings(max_examples=15, deadline=None)
@given(results=SAMPLES["odd_results"]())
def test_any_result_that_can_be_stored_can_be_reported(
    tmp_path_factory: pytest.TempPathFactory, results: list[Result]
) -> None:
    path = report.write_report(results, {NAME: INFO}, tmp_path_factory.mktemp("odd"))
    assert Page(path.read_text()).tags.count("section") >= 1
    shown(results)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = report.write_report([failed("\ud800", "half \ud800")], {}, tmp_path)
    assert "half ?" in path.read_text(encoding="utf-8")


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results to report on: run `pareto bench` first"):
        report.write_report([], {}, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_report_of_failures_alone(tmp_path: Path) -> None:
    path = report.write_report([failed("LoRA r=1", "it broke")], {NAME: INFO}, tmp_path)
    assert "it broke" in path.read_text()
    assert not list(tmp_path.glob("*.svg"))
    assert len(list(tmp_path.glob("*.csv"))) == 1


def shown(results: list[Result]) -> str:
    console = Console(width=170, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.terminal_table(results))
    return console.export_text()


def test_the_terminal_table() -> None:
    text = shown([*suite(3), failed("[bold]x[/]", "it broke [/red]")])
    line = next(line for line in text.splitlines() if "KronA (24, 16)" in line)
    assert " ".join(line.split()) == "KronA (24, 16) 68.8 ± 1.0 0.0749 % 4.03 ×1.003 ≈ 139 ×0.764 ▲ 708"
    assert "[bold]x[/] failed: it broke [/red]" in text
    assert "Platinum 8481C" in text
    assert "No results" in shown([])


def test_the_front_of_the_first_figure() -> None:
    values: list[Any] = report.front_names(section(suite(3)))
    assert values == ["Full fine-tuning"]  # as fast as the others, and the most accurate


def test_training_curves_are_averaged_over_steps_and_seeds() -> None:
    def curve(seed: int) -> tuple[tuple[int, float], ...]:
        return tuple((step, float(step // 8) + seed + (0.5 if step % 2 else -0.5)) for step in range(24))

    results = [dataclasses.replace(ok("BitFit", seed), curve=curve(seed)) for seed in (0, 1)]
    (found,) = report.training_curves(section(results))
    assert found.mean == (0.5, 1.5, 2.5)
    assert (found.low, found.high) == ((0.0, 1.0, 2.0), (1.0, 2.0, 3.0))
    assert found.steps == (4.0, 12.0, 20.0)  # middles of steps 0 to 7, 8 to 15, 16 to 23


def test_a_full_disk_keeps_the_last_report_and_says_so(tmp_path, monkeypatch):
    path = report.write_report([ok("BitFit")], {NAME: INFO}, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write = Path.write_bytes

    def fill(file: Path, content: bytes) -> int:
        if file.suffix != ".html":
            return write(file, content)
        write(file, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(DataError, match=r"could not be written to .*: No space left on device; no result is lost"):
        report.write_report([ok("LoRA r=1")], {NAME: INFO}, tmp_path)
    assert path.read_bytes() == before[path.name]
    assert {file.name for file in tmp_path.iterdir()} == set(before)

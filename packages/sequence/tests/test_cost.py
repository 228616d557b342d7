from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pareto_core import ModelError, UnsupportedError
from pareto_sequence.cost import averages, convolutions, models, plots, tables, turns
from pareto_sequence.cost.__main__ import main, parse
from pareto_sequence.cost.turns import Case, Estimate, Row, Settings, estimate, ratio_of_medians, take_turns
from pareto_sequence.ema import DampedEMA
from pareto_sequence.tcn import TCN

QUICK = Settings(seconds=0.0, fewest=2)
TINY = models.Shape(width=16, state=4, layers=2, chunk=8, vocabulary=32)


def quiet(what: str):
    return lambda share: None


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def case_that(act) -> Case:
    x = torch.ones(3, requires_grad=True)

    def forward() -> torch.Tensor:
        act()
        return 2 * x

    return Case(forward, (x,))


def test_turns_rotate_and_each_case_gets_one_a_round():
    called: list[str] = []
    done: list[float] = []
    busy = {name: case_that(lambda name=name: (called.append(name), spin(0.021))) for name in "abc"}
    times = take_turns(busy, Settings(seconds=0.0, fewest=3), done.append)
    # two steps of each find how long it takes; then, of each turn, one is not counted and one is
    assert "".join(called) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert done == pytest.approx([1 / 3, 2 / 3, 1])
    for name in "abc":
        assert {way: len(found) for way, found in times.seconds[name].items()} == {"forward": 3, "backward": 3}
        assert (times.seconds[name]["forward"] >= 0.021).all()


def test_forward_and_backward_are_told_apart():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            spin(0.03)
            return gradient

    x = torch.ones(3, requires_grad=True)
    (found,) = take_turns({"slow": Case(lambda: Slow.apply(x), (x,))}, QUICK).seconds.values()
    assert (found["backward"] >= 0.03).all()
    assert np.median(found["forward"]) < np.median(found["backward"])


def test_ratios_of_medians_by_hand():
    slow, fast = np.array([3.0, 9.0, 6.0, 100.0, 6.0]), np.array([2.0, 1.0, 2.0, 2.0, 50.0])
    assert ratio_of_medians(slow, fast) == 3.0
    times = turns.Times({"base": {"forward": 3 * fast}, "case": {"forward": fast}})
    # rounds are resampled together, so what disturbs both leaves their ratio alone
    assert times.speedup("case", "base", "forward") == Estimate(3.0, 3.0, 3.0)
    assert times.speedup("case", "gone", "forward") is None
    assert times.milliseconds("case", "forward").value == 2000.0
    drawn = np.random.default_rng(1).normal(10, 1, 400)
    found = estimate(lambda values: np.median(values, axis=-1), drawn)
    # the median's standard error is 1.25 σ / √n: the interval is about four of them wide
    assert found.high - found.low == pytest.approx(4 * 1.25 / 20, rel=0.35)


def test_a_case_that_runs_out_of_memory_is_shown_as_such_and_others_go_on():
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cases = {"base": case_that(lambda: None), "large": case_that(fail)}
    rows = turns.speedups("models", {"length": 8}, take_turns(cases, QUICK), "base", "base")
    assert {(row.case, row.problem) for row in rows} == {("base", ""), ("large", "out of memory")}
    without_base = turns.speedups("models", {}, take_turns(cases, QUICK), "large")
    assert [row.ratio for row in without_base if row.case == "base"] == [None, None]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        take_turns({"bad": case_that(fail)}, QUICK)


def test_memory_beyond_the_limit_fails_as_an_allocation():
    script = (
        "import torch; from pareto_sequence.cost import turns\n"
        "turns.limit_memory(0.25)\n"
        "torch.zeros(2**20)\n"
        "try:\n    torch.zeros(2**28)\n"
        "except (RuntimeError, MemoryError) as error:\n    print(turns.is_out_of_memory(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(("length", "dilation"), [(1, 1), (7, 3), (40, 16), (33, 5)])
def test_the_convolution_by_fft_is_torchs(length, dilation):
    x, weight, bias = torch.randn(2, 3, length), torch.randn(3, 4), torch.randn(3)
    expected = F.conv1d(F.pad(x, (3 * dilation, 0)), weight[:, None], bias, dilation=dilation, groups=3)
    torch.testing.assert_close(convolutions.fft_conv(x, weight, bias, dilation), expected, atol=1e-5, rtol=1e-5)


def test_every_convolution_has_its_row():
    rows = list(convolutions.measure([20, 30], [1, 7], 4, 5, QUICK, quiet))
    assert len(rows) == 2 * 2 * 3 * 2
    assert {row.case for row in rows} == {"library", "own (native)", "FFT"}
    assert all(row.ratio.value == 1 for row in rows if row.case == "library")
    assert all(row.milliseconds.low <= row.milliseconds.value <= row.milliseconds.high for row in rows)
    assert {(row.place["length"], row.place["dilation"]) for row in rows} == {(20, 1), (20, 7), (30, 1), (30, 7)}


@pytest.mark.parametrize("part", ["output", "gradient of the input", "gradient of the weight"])
@pytest.mark.parametrize("case", ["own (native)", "FFT"])
def test_a_wrong_convolution_is_not_timed(case, part):
    found = convolutions.cases(24, 3, 4, 5, "cpu")
    convolutions.check(found, 24, 3)
    right = found[case]

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, x, weight):
            ctx.save_for_backward(x, weight)
            return y * 1.001 if part == "output" else y.clone()

        @staticmethod
        def backward(ctx, gradient):
            x, weight = (torch.zeros_like(t) for t in ctx.saved_tensors)
            if part == "gradient of the input":
                x[..., -1] = 0.01
            if part == "gradient of the weight":
                weight[0, 0] = 0.1
            return gradient, x, weight

    wrong = Case(lambda: Wrong.apply(right.forward(), *right.inputs[:2]), right.inputs)
    with pytest.raises(ModelError, match=f"its {part} is off by .*: not timed"):
        convolutions.check({**found, case: wrong}, 24, 3)


def test_every_average_has_its_row_and_a_wrong_one_is_not_timed():
    rows = list(averages.measure([30], [2, 3], 4, QUICK, quiet))
    assert len(rows) == 2 * 3 * 2
    found, x, modules = averages.cases(30, 2, 4, "cpu")
    with torch.no_grad():
        modules["truncated"].gamma.mul_(1.01)
    with pytest.raises(ModelError, match="EMA by truncated, length 30, state 2: its output is off"):
        averages.check(found, x, modules)


def test_nothing_like_a_number_passes_as_one():
    x = torch.ones(3)
    with pytest.raises(ModelError, match="is off by nan"):
        turns.require_close("this", x * float("nan"), x, 1.0)
    with pytest.raises(ModelError, match=r"has shape \(2,\), not \(3,\)"):
        turns.require_close("this", x[:2], x, 1.0)


@pytest.mark.parametrize(("state", "both", "expected"), [(16, False, 19), (16, True, 40), (60, False, 77)])
def test_kernels_have_the_parameters_of_the_average(state, both, expected):
    """By hand, per channel: D (4 N + 1) or D (8 N + 1) for the average, 3 (K + 3) for bias, scale and shift."""
    found = models.matched_kernel(32, state, both)
    assert found == expected
    target = sum(p.numel() for p in DampedEMA(32, state, bidirectional=both).parameters())
    off = {k: abs(sum(p.numel() for p in TCN(32, k, 1, 3).parameters()) - target) for k in range(found - 2, found + 3)}
    assert min(off, key=off.get) == found


def test_the_factor_is_the_smallest_that_covers_the_sequence():
    """8 layers, K = 19: a network sees 1 + 8 * 18 * (1 + F + F²) positions."""
    assert models.covering_factor(400, 19, 8) == 1
    assert models.covering_factor(434, 19, 8) == 2
    assert models.covering_factor(16384, 19, 8) == 11
    assert 8 * 18 * (1 + 10 + 100) + 1 < 16384 <= 8 * 18 * (1 + 11 + 121) + 1


@pytest.mark.parametrize("decoding", [True, False])
def test_a_cell_has_every_case_and_its_bound(decoding):
    shape = dataclasses.replace(TINY, decoding=decoding)
    rows = list(models.measure([12, 20], [shape], QUICK, quiet))
    names = (models.BASE, models.FACTORED, models.TRUNCATED, models.TCNCA, models.LIBRARY, models.WITHOUT)
    assert [row.case for row in rows[:12]] == [name for name in names for _ in range(2)]
    assert len(rows) == 2 * 12
    assert {row.place["mode"] for row in rows} == {"decoding" if decoding else "encoding"}
    assert all(row.bound.value > 0 for row in rows)
    bare = [row for row in rows if row.case == models.WITHOUT]
    assert all(row.bound == row.ratio for row in bare)


@pytest.mark.parametrize("name", [models.FACTORED, models.TRUNCATED, models.TCNCA])
def test_a_wrong_model_is_not_timed(name):
    built = models.models(20, TINY, "cpu")
    models.check(built, TINY, 20, "cpu")
    with torch.no_grad():
        next(parameter for parameter in built[name].parameters() if parameter.ndim == 2).mul_(1.05)
    with pytest.raises(ModelError, match=r"its (logits|gradients) is off"):
        models.check(built, TINY, 20, "cpu")


def test_leaving_the_mixer_out_leaves_the_rest():
    built = models.models(20, TINY, "cpu")
    kept = {name for name, _ in built[models.BASE].named_parameters() if ".mixer." not in name}
    assert {name for name, _ in built[models.WITHOUT].named_parameters()} == kept
    with pytest.raises(ModelError, match="no moving average"):
        models.without_mixer(built[models.TCNCA])


def test_outputs_are_compared_at_the_whole_length_and_gradients_at_a_part(monkeypatch):
    monkeypatch.setattr(models, "CHECKED", 8)
    lengths: dict[str, list[int]] = {"answers": [], "outputs": []}
    answers, outputs = models.answers, models.check_outputs
    monkeypatch.setattr(models, "answers", lambda case: (lengths["answers"].append(0), answers(case))[1])
    monkeypatch.setattr(models, "check", lambda built, shape, length, device: lengths["answers"].append(length))

    def at(built, shape, length, device):
        lengths["outputs"].append(length)
        outputs(built, shape, length, device)

    monkeypatch.setattr(models, "check_outputs", at)
    rows = list(models.measure([20], [TINY], QUICK, quiet))
    assert lengths == {"answers": [8], "outputs": [20]}
    assert {row.place["checked"] for row in rows} == {20}


def test_a_model_that_is_wrong_beyond_the_part_is_not_timed(monkeypatch):
    monkeypatch.setattr(models, "CHECKED", 8)
    build = models.models

    def wrong(*arguments):
        found = build(*arguments)
        first = next(module for module in found[models.TCNCA].modules() if isinstance(module, TCN))
        # Wrong from position 10 on: the check at 8 positions sees nothing of it.
        first.register_forward_hook(lambda module, inputs, y: y + (torch.arange(y.shape[1]) >= 10)[:, None] * 3 * y)
        return found

    monkeypatch.setattr(models, "models", wrong)
    with pytest.raises(ModelError, match="length 20, width 16: its logits is off"):
        list(models.measure([20], [TINY], QUICK, quiet))
    with pytest.raises(ModelError, match="length 24, width 16: its logits is off"):
        list(models.measure_tokens([8, 24], TINY, QUICK, quiet))


def test_what_memory_did_not_let_compare_is_in_the_table(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(models, "CHECKED", 8)
    monkeypatch.setattr(models, "check_outputs", fail)
    assert {row.place["checked"] for row in models.measure([20], [TINY], QUICK, quiet)} == {8}
    rows = list(models.measure_tokens([6, 20], TINY, QUICK, quiet))
    assert {(row.place["length"], row.place["checked"]) for row in rows} == {(6, 6), (20, 6)}


@pytest.mark.parametrize("decoding", [True, False])
def test_an_average_that_is_not_its_recurrence_is_not_timed(decoding):
    shape = dataclasses.replace(TINY, decoding=decoding)
    built = models.models(20, shape, "cpu")
    models.check_average(built[models.BASE], shape, 20, "cpu")
    average = next(module for module in built[models.BASE].modules() if isinstance(module, DampedEMA))
    average.register_forward_hook(lambda module, inputs, y: y * 1.001)
    with pytest.raises(ModelError, match="its moving average is off"):
        models.check(built, shape, 20, "cpu")


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_recurrence_is_the_average_in_double_precision(bidirectional):
    torch.manual_seed(0)
    module = DampedEMA(3, 4, bidirectional=bidirectional).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    torch.testing.assert_close(averages.recurrence(module, x), module(x))


def test_where_memory_ends_a_whole_cell_says_so(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(models, "models", fail)
    rows = list(models.measure([12], [TINY], QUICK, quiet))
    assert {row.problem for row in rows} == {"out of memory"}
    assert len(rows) == 12


def test_time_per_token_is_relative_to_the_shortest_length(monkeypatch):
    times = {"8": 4.0, "16": 10.0}

    def fake(cases, settings, done):
        return turns.Times({name: {way: np.full(5, times[name]) for way in turns.DIRECTIONS} for name in cases})

    monkeypatch.setattr(models, "take_turns", fake)
    rows = list(models.measure_tokens([16, 8], TINY, QUICK, quiet))
    found = {row.place["length"]: row for row in rows if row.case == models.TCNCA and row.direction == "backward"}
    assert found[8].ratio == Estimate(1.0, 1.0, 1.0)
    assert found[16].ratio == Estimate(1.25, 1.25, 1.25)  # 10 / 16 to 4 / 8
    assert found[16].milliseconds.value == 10_000.0


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pareto_sequence.cost.__main__.limit_memory", lambda gibibytes: None)  # not in this process
    pytest.importorskip("matplotlib")
    options = ["--out", str(tmp_path), "--quick", "--figures", "7.6", "--lengths", "16", "24", "--chunk", "8"]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "cost.md").read_text(encoding="utf-8") + "\n"
    for title in tables.TITLES.values():
        assert f"## {title}" in captured.out
    stored = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert {row["table"] for row in stored["rows"]} == set(tables.TITLES)
    assert {row["place"]["length"] for row in stored["rows"]} == {16, 24}
    pictures = {path.name for path in tmp_path.glob("*.png")}
    grids = {"tcnca_decoding_state_16.png", "mega-truncated_decoding_state_16.png"}
    assert pictures == {"convolution.png", "ema.png", "tokens.png", *grids}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_table_that_is_refused_is_an_error_not_a_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pareto_sequence.cost.__main__.limit_memory", lambda gibibytes: None)
    monkeypatch.setattr(convolutions, "fft_conv", lambda x, weight, bias, dilation: x * weight[:, :1] + bias[:, None])
    assert main(["--out", str(tmp_path), "--quick", "--only", "convolution"]) == 1
    captured = capsys.readouterr()
    assert "error: FFT, length 64, dilation 1: its output is off" in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("problem", "code"), [(KeyboardInterrupt(), 130), (ModelError("it is off"), 1)])
def test_what_was_measured_stays_when_the_rest_fails(problem, code, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise problem

    monkeypatch.setattr("pareto_sequence.cost.__main__.limit_memory", lambda gibibytes: None)
    monkeypatch.setattr(averages, "measure", fail)
    assert main(["--out", str(tmp_path), "--quick", "--only", "convolution", "ema"]) == code
    stored = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert {row["table"] for row in stored["rows"]} == {"convolution"}
    assert "Depthwise dilated convolution" in (tmp_path / "cost.md").read_text(encoding="utf-8")
    assert ("what was measured until now is kept" if code == 130 else "it is off") in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pareto_sequence.cost.__main__.limit_memory", lambda gibibytes: None)
    monkeypatch.setattr(convolutions, "measure", lambda *_: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "folder"), "--quick"]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_options_are_checked(capsys, tmp_path):
    assert parse(["--quick"]).lengths is None
    with pytest.raises(SystemExit):
        parse(["--lengths", "0"])
    assert "--lengths: must be at least 1" in capsys.readouterr().err
    for option, value, message in (
        ("--device", "foo", "'foo' is none of cpu, cuda and cuda:N"),
        ("--device", "mps", "'mps' is none of"),
        ("--device", "cuda:x", "'cuda:x' is none of"),
        ("--memory", "-1", "--memory: must be a finite number of GiB above 0"),
        ("--memory", "0", "--memory: must be"),
        ("--memory", "nan", "--memory: must be"),
        ("--seconds", "inf", "--seconds: must be a finite number"),
    ):
        with pytest.raises(SystemExit):
            parse([option, value])
        assert message in capsys.readouterr().err
    assert parse(["--device", "cuda:1", "--memory", "0.5"]).device == "cuda:1"
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--only", "--malloc", "--memory", "--figures", "--quick", "examples:"))
    if not torch.cuda.is_available():
        assert main(["--device", "cuda", "--out", str(tmp_path)]) == 1
        assert "torch sees no GPU" in capsys.readouterr().err


def test_tables_show_every_part():
    figure = Estimate(1.5, 1.25, 1.75)
    place = {"mode": "decoding", "state": 16, "width": 512, "length": 1024}
    rows = (
        Row("models", models.TCNCA, "forward", place, figure, models.BASE, figure, Estimate(2.0, 2.0, 2.0)),
        Row("models", models.BASE, "forward", place, problem="out of memory"),
    )
    text = tables.markdown(tables.Costs({"device": "A machine", "threads": 2}, rows, ("tokens: no reason",)))
    assert "| decoding | 16 | 512 | 1024 | TCNCA (own kernel) | 1.500 [1.250, 1.750] | 1.50 [1.25, 1.75] |" in text
    assert "| 2.00 [2.00, 2.00] | 75 % |" in text
    assert "| out of memory |" in text
    assert "A machine (threads 2)" in text
    assert "- tokens: no reason" in text


def test_cells_without_memory_are_drawn_as_such():
    row = Row("models", models.TCNCA, "forward", {}, problem="out of memory")
    assert plots._text(row, float("nan")) == "OOM"
    assert plots._text(None, float("nan")) == ""
    assert plots._text(None, 1.234) == "1.23"
    assert set(plots.GRIDS) == {models.TCNCA, models.TRUNCATED}


def test_pictures_need_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="matplotlib"):
        plots.draw(tables.Costs({}, ()), tmp_path)

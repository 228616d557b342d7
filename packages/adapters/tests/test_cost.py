from __future__ import annotations

import csv
import io
import json
import math
import time

import numpy as np
import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

from pareto_adapters.cost import layers, models, tables
from pareto_adapters.cost.__main__ import main
from pareto_adapters.cost.timing import Estimate, estimate, extra_ratio, median, ratio, rounds_within, take_turns
from pareto_core import DataError, ModelError, UnsupportedError
from pareto_core.task import Protocol


def test_turns_rotate_and_each_case_gets_one_a_round():
    called: list[str] = []
    done: list[float] = []
    busy = {name: lambda name=name: (called.append(name), spin(0.021)) for name in "abc"}
    times = take_turns(busy, 4, done=done.append)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    # two calls of each find how long it takes; then, of each turn, one is not counted and one is
    assert called[:6] == list("aabbcc")
    assert "".join(called[6:]) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert done == [0.25, 0.5, 0.75, 1.0]


def test_times_are_those_that_the_calls_themselves_saw():
    own: list[float] = []

    def call() -> None:
        start = time.perf_counter()
        spin(0.001)
        own.append(time.perf_counter() - start)

    (times,) = take_turns({"call": call}, 5).values()
    assert (times >= 0.001).all()
    # all counted calls lie within the turns, so their own clocks cannot have seen less than the shortest of them
    assert times.max() >= min(own)
    assert np.median(times) <= max(own) * 2 + 1e-3


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_rounds_fill_the_time_and_are_never_too_few():
    assert rounds_within({"a": lambda: spin(0.03)}, 0.0) == 12
    assert 12 < rounds_within({"a": lambda: spin(0.03)}, 3.0) <= 50


def test_estimates_by_hand():
    base = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 1.0, 2.0])
    assert estimate(median, base).value == 2.0
    assert estimate(ratio, 3 * base, base) == Estimate(3.0, 3.0, 3.0)
    assert estimate(extra_ratio, base + 10, base + 2, base) == Estimate(5.0, 5.0, 5.0)
    drawn = np.random.default_rng(1).normal(10, 1, 400)
    found = estimate(median, drawn)
    assert found.low < found.value < found.high
    # the median's standard error is 1.25 σ / √n: the interval is about four of them wide
    assert found.high - found.low == pytest.approx(4 * 1.25 / 20, rel=0.35)


def test_a_drift_that_hits_a_whole_round_leaves_ratios_alone():
    drift = np.linspace(1, 5, 50)
    assert estimate(ratio, 1.2 * drift, drift).value == pytest.approx(1.2)


def test_balanced_shapes_have_the_fewest_parameters():
    for width in (768, 1024, 2048, 4096, 96, 7):
        m1, n1 = layers.balanced_shape(width)
        best = min(a * b + width * width // (a * b) for a in divisors(width) for b in divisors(width))
        assert m1 * n1 + (width // m1) * (width // n1) == best
        assert m1 <= n1
    assert layers.balanced_shape(2048) == (32, 64)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_width_is_checked_then_timed(dtype):
    found = layers.measure(64, 0.0, dtype=dtype)
    rows = {row.case: row for row in found.rows}
    assert found.a_shape == (8, 8)
    assert found.equal_rank == 8
    assert [rows[f"LoRA r={r}"].parameters for r in (1, 2, 4, 8)] == [128, 256, 512, 1024]
    assert rows["Kronecker"].parameters == rows["kron formed, then linear"].parameters == 128
    assert rows["Kronecker"].multiplications == rows["LoRA r=8"].multiplications == 1024
    assert rows["frozen layer"].parameters == rows["merged"].parameters == 0
    assert rows["frozen layer"].ratio == Estimate(1.0, 1.0, 1.0)
    assert all(row.milliseconds.low <= row.milliseconds.value <= row.milliseconds.high for row in found.rows)


@pytest.mark.parametrize(("width", "rank"), [(768, 24), (1024, 32), (2048, 32), (4096, 64), (144, 12), (7, 1)])
def test_lora_of_the_equal_rank_multiplies_as_often(width, rank):
    m1, n1 = layers.balanced_shape(width)
    x, b, a = torch.randn(m1, width // m1), torch.randn(width // m1, width // n1), torch.randn(m1, n1)
    counts = []
    for first, second in (((x, b), lambda h: (a.T, h)), ((a.T, x), lambda h: (h, b))):
        with FlopCounterMode(display=False) as counter:
            torch.mm(*second(torch.mm(*first)))
        counts.append(counter.get_total_flops() // 2)
    assert layers.equal_rank(width) == rank <= math.sqrt(width)
    assert layers.kron_multiplications(width) == min(counts) == 2 * width * rank


def test_the_table_has_a_row_of_as_many_multiplications():
    found = layers.measure(144, 0.0)
    rows = {row.case: row.multiplications for row in found.rows}
    assert rows["LoRA r=12"] == rows["Kronecker"] == 3456
    assert rows["LoRA r=8"] == 2304
    text = tables.markdown(tables.Costs({"device": "A machine"}, (found,)))
    assert "multiplies 20,736 times and the factorised Kronecker product 3,456 times" in text
    assert "as often as LoRA of rank 12 (√d is 12.0)" in text
    assert "| LoRA r=12 | 3,456 | 3,456 |" in text


@pytest.mark.parametrize("case", [layers.KRON, layers.MATERIALISED, layers.MERGED])
def test_a_wrong_answer_is_not_timed(case):
    found = layers.cases(64)
    x, g = torch.randn(8, 64), torch.randn(8, 64)
    layers.check(found, x, g)
    found[case].register_forward_hook(lambda module, inputs, output: 1.01 * output)
    with pytest.raises(ModelError, match=f"{case} at width 64 is off by .*: not timed"):
        layers.check(found, x, g)


def small_t5() -> tf.T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=64, d_model=384, d_kv=32, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config).eval().requires_grad_(False)


def test_models_share_weights_but_for_the_merged_one():
    base = small_t5()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = models.latency_cases(base)
    assert set(found) == {"base", "base again", *models.TABLE_4_6}
    for name, model in found.items():
        shared = model.shared.weight.data_ptr() == base.shared.weight.data_ptr()
        assert shared == (name != "KronA, merged")
    assert type(found["KronA, merged"]) is type(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_the_protocol_gives_a_ratio_for_each_case(monkeypatch):
    monkeypatch.setattr(models, "backbone", lambda name: small_t5())
    monkeypatch.setattr(models, "CHAPTER4_PROTOCOL", Protocol(warmups=10, runs=20, repeats=3))
    found = {latency.case: latency for latency in models.measure_latency("t5-base")}
    assert found["base"].ratio == Estimate(1.0, 1.0, 1.0)
    assert found["KronA^B"].paper_percent == 127
    assert found["base again"].paper_percent is None
    assert all(latency.milliseconds.value > 0 for latency in found.values())


def test_an_adapter_that_does_nothing_is_not_timed(monkeypatch):
    monkeypatch.setattr(models, "_tuned", lambda model, config: models.peft.get_peft_model(model, config).eval())
    with pytest.raises(ModelError, match="PA does not change the answer"):
        models.latency_cases(small_t5())


def test_every_tuner_takes_training_steps():
    for config in models.tuners(small_t5()).values():
        model = models._tuned(small_t5(), config).train()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert np.isfinite(models.train_steps(model, (2, 6, 3)))
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
        assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_tuners_are_the_sizes_of_table_4_5():
    with torch.device("meta"):
        base = tf.T5ForConditionalGeneration(models.t5_base()).requires_grad_(False)
    counted = {}
    for name, config in models.tuners(base).items():
        model = models.peft.get_peft_model(models.copy.deepcopy(base), config)
        counted[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    norms = 47_616
    shares = {name: round(100 * (count + norms) / 222_903_552, 2) for name, count in counted.items()}
    assert shares == {**dict.fromkeys(shares, 0.07), "PA": 0.06}
    assert counted["Compacter"] == 114_112


def test_memory_needs_a_gpu():
    with pytest.raises(UnsupportedError, match="cpu has none"):
        models.measure_memory("cpu")


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--widths", "64", "--seconds", "0", "--models"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "cost.md").read_text() + "\n"
    assert "| kron formed, then linear |" in printed
    assert "- peak memory of training is read from a GPU's allocator" in printed
    stored = json.loads((tmp_path / "cost.json").read_text())
    assert [width["width"] for width in stored["widths"]] == [64]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "cost.csv").read_text())))
    figures = {(row["size"], row["case"], row["quantity"]): row for row in rows}
    assert len(figures) == len(rows) == 1 + 4 * 8
    assert figures["64", "Kronecker", "parameters"]["value"] == "128"
    again = stored["widths"][0]["speedup"]
    assert float(figures["64", "Kronecker", "speedup_over_formed"]["low"]) == again["low"]


def nothing_may_be_measured(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("measured although it was asked for in vain")

    for module, name in ((layers, "measure"), (models, "measure_latency"), (models, "measure_memory")):
        monkeypatch.setattr(module, name, fail)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--device", "xyz", "--device: 'xyz' is not cpu, cuda or cuda:N"),
        ("--device", "cuda:-1", "--device: 'cuda:-1' is not"),
        ("--widths", "0", "--widths: 0 is below 1"),
        ("--seconds", "nan", "--seconds: nan is not a number of at least 0"),
        ("--seconds", "inf", "--seconds: inf is not"),
        ("--seconds", "-1", "--seconds: -1.0 is not"),
    ],
)
def test_options_that_mean_nothing_are_refused(capsys, monkeypatch, option, value, problem):
    nothing_may_be_measured(monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        main([f"{option}={value}"])
    assert problem in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    nothing_may_be_measured(monkeypatch)
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "out")]) == 1
    assert f"error: [Errno 20] Not a directory: '{tmp_path}/file/out'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    nothing_may_be_measured(monkeypatch)

    def refuse(dir: object) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("pareto_adapters.cost.__main__.tempfile.TemporaryFile", refuse)
    assert main(["--out", str(tmp_path)]) == 1
    assert f"error: [Errno 13] Permission denied: '{tmp_path}'" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    nothing_may_be_measured(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["--out", str(tmp_path), "--device", "cuda"]) == 1
    assert "error: --device cuda: torch sees no GPUs here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["--out", str(tmp_path), "--device", "cuda:1"]) == 1
    assert "error: --device cuda:1: torch sees 1 GPU here" in capsys.readouterr().err


def test_what_was_measured_stays_when_the_next_fails(tmp_path, capsys, monkeypatch):
    measure = layers.measure

    def twice(width: int, *rest: object) -> layers.Width:
        if width == 72:
            raise ModelError("off: not timed")
        return measure(width, *rest)

    monkeypatch.setattr(layers, "measure", twice)
    assert main(["--out", str(tmp_path), "--widths", "64", "72", "--seconds", "0", "--models"]) == 1
    assert "error: off: not timed" in capsys.readouterr().err
    assert [width["width"] for width in json.loads((tmp_path / "cost.json").read_text())["widths"]] == [64]


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "measure_memory", stop)
    assert main(["--out", str(tmp_path), "--widths", "64", "--seconds", "0", "--models"]) == 130
    assert "One layer of width 64" in (tmp_path / "cost.md").read_text()


def test_a_model_that_is_not_installed_is_left_out(tmp_path, capsys, monkeypatch):
    def missing(name: str) -> None:
        raise DataError("the MiniLM encoder is not installed")

    monkeypatch.setattr(models, "backbone", missing)
    assert main(["--out", str(tmp_path), "--widths", "--models", "minilm"]) == 0
    assert "- the MiniLM encoder is not installed" in capsys.readouterr().out


def test_tables_show_every_part():
    figure = Estimate(1.5, 1.25, 1.75)
    costs = tables.Costs(
        {"device": "A machine", "threads": 2},
        latencies=(models.Latency("minilm", "PA", figure, figure, 113),),
        memories=(models.Memory("PA", 1000, 3 * 2**20),),
        left_out=("nothing else",),
    )
    text = tables.markdown(costs)
    assert "| PA | 1.50 [1.25, 1.75] | 1.500 [1.250, 1.750] | 1.13 |" in text
    assert "| PA | 1,000 | 3 |" in text
    assert "A machine (threads 2)" in text
    assert "- nothing else" in text
    assert "memory,t5-base,PA,peak_memory_bytes,3145728,," in tables.figures(costs)

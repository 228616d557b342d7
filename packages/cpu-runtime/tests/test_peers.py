import sys

import numpy as np
import pytest

from pareto_core import DataError, ModelError
from pareto_cpu_runtime.peers import report
from pareto_cpu_runtime.peers.__main__ import main
from pareto_cpu_runtime.peers.compare import check_agreement, correlation
from pareto_cpu_runtime.peers.geometry import Geometry, neighbouring, q4_0, random_blocks
from pareto_cpu_runtime.peers.intervals import ratio_of_medians
from pareto_cpu_runtime.peers.loading import CASES, loading
from pareto_cpu_runtime.peers.workers import Worker, run_script


def test_tinyllama_has_its_published_number_of_weights():
    geometry = Geometry()
    matrices = sum(n * k for _, n, k in geometry.matrices())
    norms = (2 * geometry.layers + 1) * geometry.width
    assert matrices + geometry.vocabulary * geometry.width + norms == 1_100_048_384


def test_a_block_of_q4_0_by_hand():
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    block = q4_0(codes, np.array([[0.5]], np.float16))
    assert block.shape == (1, 18)
    assert block[0, :2].view(np.float16)[0] == 0.5
    # Byte i holds input i low and input 16 + i high; both have code i here.
    assert list(block[0, 2:]) == [i | i << 4 for i in range(16)]


def test_random_blocks_are_the_same_in_every_process_and_share_scales_in_a_group():
    first, again = random_blocks("a", 8, 256), random_blocks("a", 8, 256)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    _, scales = random_blocks("a", 8, 256, 128)
    assert (scales[:, :4] == scales[:, :1]).all()
    assert not (random_blocks("b", 8, 256)[0] == first[0]).all()


def test_rotation_of_neighbours_and_of_halves_give_the_same_scores():
    """Rotary embedding by neighbours on reordered rows is the embedding by halves on the original ones."""
    heads, dim, rng = 2, 8, np.random.default_rng(0)
    weight, x = rng.standard_normal((heads * dim, 4)), rng.standard_normal(4)
    angles = rng.standard_normal(dim // 2)
    by_halves = (weight @ x).reshape(heads, 2, dim // 2)
    a, b = by_halves[:, 0], by_halves[:, 1]
    halves = np.stack([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], 1)
    by_pairs = (neighbouring(weight, heads) @ x).reshape(heads, dim // 2, 2)
    c, d = by_pairs[..., 0], by_pairs[..., 1]
    pairs = np.stack([c * np.cos(angles) - d * np.sin(angles), d * np.cos(angles) + c * np.sin(angles)], -1)
    assert np.allclose(halves.swapaxes(1, 2), pairs)


def test_a_ratio_with_its_interval():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 2, 400).tolist()  # hits both sides of a turn
    found = ratio_of_medians([2 * value for value in drift], drift)
    assert found.value == pytest.approx(2)
    assert found.low <= 2 <= found.high
    with pytest.raises(ValueError, match="equal counts"):
        ratio_of_medians([1.0], [])


def test_runtimes_that_disagree_are_not_timed():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50))
    assert check_agreement({"x": a, "y": a + 1e-3 * b}, {"x": "y"})["x"] > 0.999
    with pytest.raises(ModelError, match="answer differently"):
        check_agreement({"x": a, "y": b}, {"x": "y"})
    with pytest.raises(ModelError, match="answer differently"), np.errstate(invalid="ignore"):
        check_agreement({"x": a, "y": np.zeros(50)}, {"x": "y"})
    assert correlation(a, -a) == pytest.approx(-1)


def test_a_worker_answers_and_one_that_ends_says_why():
    echo = "import sys; print('{\"ready\": 1}', flush=True); [print(line, end='', flush=True) for line in sys.stdin]"
    with Worker("echo", [sys.executable, "-c", echo], 1) as worker:
        assert worker.ready == {"ready": 1}
        assert worker.ask(a=[1, 2]) == {"a": [1, 2]}
    with pytest.raises(ModelError, match=r"broken ended with code 3: .*no such thing"):
        Worker("broken", [sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], 1)


def test_a_script_that_fails_says_why(tmp_path):
    with pytest.raises(DataError, match=r"gguf_writer.py: .*pip install"):
        run_script(sys.executable, "gguf_writer.py", geometry={"no such size": 1}, path=str(tmp_path / "model.gguf"))


def test_loading_is_measured_in_processes_of_their_own(tmp_path):
    small = Geometry(layers=1, vocabulary=512, width=256, inner=512, heads=4, kv_heads=2)
    found = loading(small, tmp_path, 1, 1)
    assert [(case.group, case.memory) for case in found.cases] == list(CASES)
    for case in found.cases:
        assert case.runs[0]["weights"] > packed_bytes_of(small, case.group)
        assert 0 < case.runs[0]["seconds"] < 60
        assert case.peak("generating") >= case.peak("loading") > 0
    assert report.markdown(small, [found]).count("| read |") == 2


def packed_bytes_of(geometry, group):
    return sum(n * k // 2 + n * k // group * 2 for _, n, k in geometry.matrices())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--threads", "0"], "whole number above 0"), (["--turns", "x"], "whole number above 0")],
)
def test_counts_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--only", "loading", "--out", str(tmp_path / "file")]) == 1
    assert "error: " in capsys.readouterr().err

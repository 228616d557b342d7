from __future__ import annotations

import pytest

from pareto_adapters import approximation, sparsify_projections, truncate_projections
from pareto_adapters.approximate import self_attentions
from pareto_adapters.cost.energy import Kept, energy_kept, main, markdown
from pareto_core import ConfigError


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_the_energy_kept_is_what_the_approximations_keep(make_model, kind):
    name = self_attentions(make_model(kind))[0].name
    (row,) = energy_kept(make_model(kind), [0.25])
    assert row.rank == 4
    sparse, low = make_model(kind), make_model(kind)
    sparsify_projections(sparse, 0.25)
    truncate_projections(low, 4)
    for model, found in ((sparse, row.by_entries), (low, row.by_rank)):
        record = approximation(model)
        assert found == pytest.approx((record["energy_by_attention"][name], record["energy"]), rel=1e-5)


def test_it_grows_to_all(make_model):
    rows = energy_kept(make_model("gpt2"), [0.01, 0.5, 1.0])
    assert [row.rank for row in rows] == [1, 8, 16]
    assert rows[0].by_rank < rows[1].by_rank < rows[2].by_rank == pytest.approx((1.0, 1.0))
    assert rows[0].by_entries < rows[1].by_entries < rows[2].by_entries == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("share", [0.0, 1.1, float("nan")])
def test_shares_out_of_range_are_refused(make_model, share):
    with pytest.raises(ConfigError, match=r"energy_kept\.shares = .*: must be above 0 and at most 1"):
        energy_kept(make_model("gpt2"), [share])


def test_the_command_prints_a_models_table(tmp_path, make_model, capsys):
    make_model("bert").save_pretrained(tmp_path)
    assert main([str(tmp_path), "--shares", "0.5"]) == 0
    # DeepSpeed, where it is installed, may say on standard output which accelerator it takes
    assert capsys.readouterr().out.endswith(markdown(str(tmp_path), energy_kept(make_model("bert"), [0.5])) + "\n")
    assert "| 50 | 8 | 12.3 | 45.6 | 78.9 | 10.0 |" in markdown("m", [Kept(0.5, 8, (0.123, 0.456), (0.789, 0.1))])


def test_the_command_names_what_is_wrong(tmp_path, make_model, capsys):
    make_model("bert").save_pretrained(tmp_path)
    assert main([str(tmp_path), "--shares", "2"]) == 1
    assert "error: energy_kept.shares = 2.0" in capsys.readouterr().err

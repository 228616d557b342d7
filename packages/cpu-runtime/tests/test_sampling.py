from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pareto_core.errors import ConfigError, ModelError
from pareto_cpu_runtime import _native
from pareto_cpu_runtime.sampling import Chooser, Sampling, processed


def drawn(logits: torch.Tensor, draws: int, seed: int = 0, **how) -> torch.Tensor:
    """Counts of each token over many draws from one row of logits."""
    random = torch.rand(draws, generator=torch.Generator().manual_seed(seed))
    tokens = _native.sample(logits.expand(draws, -1).contiguous(), random=random, **how)
    return torch.bincount(torch.from_numpy(tokens).long(), minlength=logits.shape[-1])


def warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> torch.Tensor:
    """Probabilities as transformers' warpers leave them, in their order."""
    scores = logits[None].double()
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return torch.softmax(scores, dim=-1)[0]


def normal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


SETTINGS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.9, 5, 1.0),
    (1.0, 0, 0.6),
    (1.3, 0, 0.99),
    (0.8, 7, 0.8),
    (1.0, 100, 0.9),
    (1.0, 2, 0.05),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_frequencies_are_those_of_transformers_warpers(temperature, top_k, top_p):
    draws = 40_000
    logits = normal(23)
    want = warped(logits, temperature, top_k, top_p)
    got = drawn(logits, draws, temperature=temperature, top_k=top_k, top_p=top_p)
    kept = want > 0
    assert not got[~kept].any()
    if kept.sum() > 1:
        expected = want[kept] * draws
        assert stats.chisquare(got[kept].double(), expected / expected.sum() * draws).pvalue > 1e-3
    else:
        assert int(got[kept]) == draws


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("size", [1, 2, 50, 3000])
def test_the_same_tokens_are_kept(temperature, top_k, top_p, size):
    logits = normal(size, seed=size)
    want = warped(logits, temperature, top_k, top_p)
    # Evenly spaced numbers reach every token whose probability is above their distance.
    draws = 4000
    random = torch.arange(draws) / draws
    rows = logits.expand(draws, -1).contiguous()
    tokens = torch.from_numpy(
        _native.sample(rows, temperature=temperature, top_k=top_k, top_p=top_p, random=random)
    ).long()
    got = torch.bincount(tokens, minlength=size)
    assert not got[want == 0].any()
    assert got[want > 1.01 / draws].all()
    assert torch.allclose(got / draws, want.float(), atol=1.01 / draws)


def test_top_p_over_more_candidates_than_are_ordered_at_first():
    logits = torch.zeros(20_000) + torch.arange(20_000) * 1e-5
    tokens = torch.from_numpy(
        _native.sample(logits.expand(200, -1).contiguous(), temperature=1.0, top_p=0.5, random=torch.arange(200) / 200)
    ).long()
    kept = warped(logits, 1.0, 0, 0.5) > 0
    assert kept[tokens].all()
    assert len(tokens.unique()) == 200
    assert int(tokens.min()) < 20_000 - int(kept.sum()) + 120


def test_equals_of_the_kth_largest_stay():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    want = warped(logits, 1.0, 2, 1.0)
    assert int((want > 0).sum()) == 4
    got = drawn(logits, 5000, temperature=1.0, top_k=2)
    assert torch.equal(got > 0, want > 0)


@pytest.mark.parametrize("size", [1, 7, 32_001])
def test_greedy_takes_the_first_of_the_largest(size):
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(size))
    logits[0] = 1.0
    want = logits.argmax(dim=-1)
    want[0] = 0
    for how in ({}, {"temperature": 0.0}, {"temperature": 1.0, "top_k": 1, "random": torch.rand(6)}):
        got = _native.sample(logits, **how)
        assert got.dtype.name == "int32"
        assert got.tolist() == want.tolist()


def test_a_tiny_temperature_is_greedy():
    logits = normal(1000)
    got = drawn(logits, 50, temperature=1e-6)
    assert int(got[logits.argmax()]) == 50


def test_each_row_has_its_own_settings():
    logits = normal(40).expand(4, -1).contiguous()
    settings = {
        "temperature": torch.tensor([0.0, 1.0, 2.0, 0.5]),
        "top_k": torch.tensor([0, 3, 0, 10], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 1.0, 0.7, 0.9]),
    }
    random = torch.tensor([0.1, 0.5, 0.95, 0.99])
    together = _native.sample(logits, random=random, **settings)
    for row in range(4):
        alone = {name: values[row].item() for name, values in settings.items()}
        assert _native.sample(logits[row : row + 1], random=random[row : row + 1], **alone)[0] == together[row]


def test_banned_tokens_are_never_drawn():
    logits = torch.full((12,), -math.inf)
    logits[[2, 9]] = torch.tensor([0.0, 1.0])
    for how in ({}, {"top_k": 5}, {"top_p": 0.9999}):
        got = drawn(logits, 3000, temperature=1.0, **how)
        assert torch.equal(got.nonzero()[:, 0], torch.tensor([2, 9]))
    for number in (0.0, 1 - 2**-24):
        assert _native.sample(logits[None], 1.0, random=torch.tensor([number]))[0] in (2, 9)


def test_no_rows_give_no_tokens():
    assert len(_native.sample(torch.empty(0, 5))) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers_are_named(value, temperature):
    logits = torch.zeros(3, 8)
    logits[1, 5] = value
    with pytest.raises(ValueError, match="row 1 of the logits holds NaN or infinity"):
        _native.sample(logits, temperature, random=torch.rand(3))


def test_a_row_that_allows_nothing_is_named():
    logits = torch.zeros(3, 8)
    logits[2] = -math.inf
    with pytest.raises(ValueError, match="row 2 of the logits allows no token"):
        _native.sample(logits)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.5}, "temperature of row 0 must be at least 0"),
        ({"temperature": math.nan}, "temperature of row 0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k of row 0 must be at least 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p of row 0 must be above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p of row 0"),
        ({"temperature": torch.tensor([0.0, 1.0, -1.0])}, "temperature of row 2"),
        ({"temperature": torch.ones(2)}, "temperature must be one number, or one for each of the 3 rows"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p of row 0 must be from 0 to 1"),
        ({"random": 1.0}, r"random number of row 0 must be in"),
        ({"random": torch.ones(3)}, r"random number of row 0 must be in \[0, 1\)"),
        ({"random": torch.zeros(2)}, "random must have a number for each row"),
        ({"temperature": 1.0, "random": None}, "sampling needs a random number"),
    ],
)
def test_settings_that_cannot_be(how, message):
    with pytest.raises(ValueError, match=message):
        _native.sample(torch.zeros(3, 8), **{"random": torch.zeros(3), **how})


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [*SETTINGS, (30.0, 0, 0.5), (0.05, 20, 0.9)])
def test_a_seeds_tokens_are_the_first_whose_probabilities_exceed_its_numbers(temperature, top_k, top_p, min_p):
    how = Sampling(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=11)
    chooser, random = Chooser(how), np.random.Generator(np.random.Philox(11))
    for number in range(60):
        logits = normal(700, seed=number)
        sums = warped(logits, temperature, top_k, top_p, min_p).cumsum(0).numpy()
        expected = np.searchsorted(sums, random.random() * sums[-1], side="right")
        assert chooser.choose(logits.numpy(), [], []) == expected


def test_equals_on_the_edge_of_top_p_are_kept_as_in_transformers():
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 1.0])
    want = warped(logits, 1.0, 0, 0.75) > 0
    assert int(want.sum()) == 4
    assert torch.equal(drawn(logits, 3000, temperature=1.0, top_p=0.75) > 0, want)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-40, 1e-50, 5e-324])
@pytest.mark.parametrize("others", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_the_limit_of_a_small_temperature_is_greedy(temperature, others):
    chooser = Chooser(Sampling(do_sample=True, temperature=temperature, **others))
    for number in range(20):
        logits = normal(300, seed=number).numpy() * 1000
        assert chooser.choose(logits, [], []) == logits.argmax()


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_a_large_temperature_makes_all_alike_but_what_is_banned(temperature):
    chooser = Chooser(Sampling(do_sample=True, temperature=temperature))
    logits = normal(8).numpy()
    got = np.bincount([chooser.choose(logits, [], [2, 5]) for _ in range(1200)], minlength=8)
    assert not got[[2, 5]].any()
    assert stats.chisquare(got[got > 0]).pvalue > 1e-3


def test_temperatures_that_are_not_numbers_are_refused():
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="temperature"):
            Sampling(do_sample=True, temperature=temperature)


def test_a_choice_without_any_token_is_an_error():
    logits = normal(4).numpy()
    with pytest.raises(ModelError, match="no token can be drawn: row 0 of the logits allows no token"):
        Chooser(Sampling(do_sample=True)).choose(logits, [], range(4))
    logits[1] = math.nan
    for sampled in (True, False):
        with pytest.raises(ModelError, match="not finite"):
            Chooser(Sampling(do_sample=sampled)).choose(logits, [], [])


def test_banned_tokens_outside_the_vocabulary_change_nothing():
    logits = normal(6).numpy()
    assert np.array_equal(processed(logits, [], [-1, 6, 50256], Sampling()), logits)
    assert np.isneginf(processed(logits, [], [-1, 5, 6], Sampling())).tolist() == [False] * 5 + [True]

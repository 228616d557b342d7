from __future__ import annotations

from pareto_core import ConfigError, ParetoError, UnknownNameError
from pareto_core.errors import shown, suggest


def test_suggest_names_the_nearest_and_lists_the_rest() -> None:
    assert suggest("korna", ["lora", "krona"]) == "did you mean 'krona' or 'lora'? (known: krona, lora)"
    assert suggest("zzz", ["lora", "krona"]) == "known: krona, lora"
    assert suggest("zzz", []) == "known: none"


def test_messages() -> None:
    assert str(ConfigError("LoRA", "r", 0, "must be above 0")) == "LoRA.r = 0: must be above 0"
    error = UnknownNameError("method", "kronna", {"krona", "bitfit"})
    assert str(error) == "unknown method 'kronna'; did you mean 'krona'? (known: bitfit, krona)"
    assert error.known == ["bitfit", "krona"]
    assert isinstance(error, ParetoError)
    assert isinstance(error, LookupError)


def test_values_are_shown_in_a_line_whatever_they_are() -> None:
    assert shown("a\nb") == "'a\\nb'"
    assert shown([1.5] * 1000, limit=9) == "[1.5, 1.…"
    assert shown(16**5000) == "a value of type int that is too large to show"
    endless: list[object] = []
    for _ in range(100_000):
        endless = [endless]
    assert shown(endless) == "a value of type list that is too large to show"
    assert "too large to show" in str(ConfigError("LoRA", "r", 16**5000, "must be below 9"))

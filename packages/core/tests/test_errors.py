from __future__ import annotations

from pareto_core import ConfigError, ParetoError, UnknownNameError
from pareto_core.errors import suggest


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

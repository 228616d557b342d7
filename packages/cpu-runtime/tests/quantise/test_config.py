from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pareto_core.errors import ConfigError
from pareto_cpu_runtime.quantise.config import Override, Precision, QuantisationConfig


def test_round_trip() -> None:
    config = QuantisationConfig(method="gptq", leave_out=("lm_head",), mixed={"*.down_proj": Override(bits=8)})
    assert QuantisationConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits = 5: allowed: 3, 4 or 8"),
        ({"group_size": 48}, "group_size = 48: allowed: 32, 64"),
        ({"group_size": "row"}, "group_size = 'row'"),
        ({"method": "magic"}, "method = 'magic'"),
        ({"samples": 0}, "samples = 0: must be at least 1"),
        ({"leave_out": ("",)}, "must not be empty"),
        ({"mixed": {"*": {"bits": 7}}}, "bits = 7"),
        ({"gptq": {"damping": 0.0}}, "damping = 0.0"),
        ({"rounding": {"steps": 0}}, "steps = 0"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        QuantisationConfig(**fields)


def test_precision_by_name() -> None:
    config = QuantisationConfig(
        leave_out=("*.v_proj",), mixed={"*.down_proj": Override(bits=8), "layers.0.*": Override(group_size=32)}
    )
    assert config.precision("layers.1.v_proj") is None
    assert config.precision("layers.1.up_proj") == Precision()
    assert config.precision("layers.0.down_proj") == Precision(bits=8, group_size=32)


def test_patterns_without_a_match_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"matches none of the operators, such as a\.q_proj"):
        QuantisationConfig(leave_out=("lm_haed",)).check_patterns(["a.q_proj", "lm_head"])


def test_the_configuration_does_not_import_torch() -> None:
    code = "import sys, pareto_cpu_runtime.quantise.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

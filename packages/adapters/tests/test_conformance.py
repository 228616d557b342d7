from __future__ import annotations

import pytest

from pareto_core.testing import TinyTask, check_method, entry_point_methods, load_method

#: what a method's defaults need of the tiny task: KronA's (32, 24) divides a width of 96
TASK = TinyTask(hidden=96)
NAMES = entry_point_methods("pareto_adapters")


def test_the_package_provides_its_methods():
    assert {"bitfit", "full", "krona", "lora"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_conform(name):
    check_method(load_method(name)(), TASK)


@pytest.mark.parametrize("name", [name for name in NAMES if "train_layer_norms" in load_method(name).field_names()])
def test_with_layer_norms_conform(name):
    check_method(load_method(name)(train_layer_norms=True), TASK)

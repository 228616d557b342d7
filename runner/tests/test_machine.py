"""Machine, context, targets and discovery."""

from __future__ import annotations

import os
import platform
import shutil

import pytest

from pareto_core import Method, Task, UnknownNameError, UnsupportedError
from pareto_runner import discover
from pareto_runner.machine import code_hash, context, isa_flags, machine


def test_the_machine_says_what_decides_speed() -> None:
    found = machine()
    assert found["affinity"] == len(os.sched_getaffinity(0))
    assert found["python"] == platform.python_version()
    assert found["libraries"]["torch"]
    assert set(isa_flags()) <= {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}


def test_the_context_says_which_code() -> None:
    found = context()
    assert found["code"] == code_hash()
    assert len(found["code"]) == 12
    assert isinstance(found["dirty"], bool)


def test_targets_are_probed_without_an_error() -> None:
    assert discover.make_target("xeon").probe().available == (platform.machine() in ("x86_64", "AMD64"))
    tpu = discover.make_target("tpu")
    assert not tpu.probe().available
    with pytest.raises(UnsupportedError, match="JAX"):
        tpu.synchronize()
    if shutil.which("nvidia-smi") is None:
        gpu = discover.make_target("gpu").probe()
        assert (gpu.available, "NVIDIA" in gpu.reason) == (False, True)


def test_every_entry_point_is_what_it_says() -> None:
    for name in discover.available(discover.METHODS):
        assert issubclass(discover.method_class(name), Method)
    for name in discover.available(discover.TASKS):
        cls = discover.task_class(name)
        assert issubclass(cls, Task)
        assert cls.name == name
    with pytest.raises(UnknownNameError, match="'krona'"):
        discover.method_class("krone")

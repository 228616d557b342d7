"""Machine, context, targets and discovery."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import pareto_runner.machine as module
from pareto_core import (
    Method,
    MethodSpec,
    ParetoError,
    RunSpec,
    Stage,
    Task,
    TaskRef,
    UnknownNameError,
    UnsupportedError,
)
from pareto_runner import discover
from pareto_runner.isolate import binding, environment
from pareto_runner.machine import code_hash, context, isa_flags, lock_hash, machine, packages_of

CPUINFO = """processor\t: 0
model name\t: Imaginary Xeon
microcode\t: 0x2b
flags\t\t: fpu avx2 avx512f hypervisor amx_bf16

processor\t: 1
model name\t: Another
"""
#: a server of two nodes of which CPUs 0, 1 and 4 may be used; CPU 4 shares a core with CPU 0
SERVER = {
    "proc/cpuinfo": CPUINFO,
    "proc/meminfo": "MemFree: 7 kB\nMemTotal:       134217728 kB\n",
    "sys/devices/system/cpu/smt/active": "1\n",
    "sys/devices/system/cpu/intel_pstate/no_turbo": "1\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    **{
        f"sys/devices/system/cpu/cpu{cpu}/{name}": text
        for cpu, node, core in ((0, 0, 0), (1, 1, 1), (4, 0, 0))
        for name, text in {
            f"node{node}/x": "",
            "topology/physical_package_id": "0\n",
            "topology/core_id": f"{core}\n",
            "cpufreq/scaling_governor": "performance\n" if cpu else "powersave\n",
        }.items()
    },
}
VERSION_2 = {
    "proc/self/cgroup": "0::/jobs/one\n",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
    "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n",
    "sys/fs/cgroup/jobs/memory.max": "max\n",
    "sys/fs/cgroup/jobs/one/memory.max": f"{3 * 2**30}\n",
}
MOUNT_1 = "32 31 0:29 {root} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
VERSION_1 = {
    "proc/self/cgroup": "4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n0::/\n",
    "proc/self/mountinfo": MOUNT_1.format(root="/docker/ab", name="memory") + MOUNT_1.format(root="/", name="cpu"),
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_period_us": "100000\n",
}


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty system: nothing under /proc or /sys."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "USABLE", [0, 1, 4])
    module._cpuinfo.cache_clear()
    yield tmp_path
    module._cpuinfo.cache_clear()


def fill(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def spec(task: str, *methods: str) -> RunSpec:
    stages = tuple(Stage(methods=(MethodSpec(name=name),)) for name in methods)
    return RunSpec(question="q", variant="v", stages=stages, task=TaskRef(name=task), target="xeon")


def test_the_machine_says_what_decides_speed() -> None:
    found = machine()
    assert found["affinity"] == len(os.sched_getaffinity(0))
    assert found["threads"] == int(environment()["OMP_NUM_THREADS"])
    assert found["python"] == platform.python_version()
    assert found["libraries"]["torch"]
    assert 0 < found["physical_cores"] <= found["affinity"]
    assert set(isa_flags()) <= {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}


def test_a_worker_describes_the_same_machine() -> None:
    """Though OpenMP has bound its thread to one CPU: keys are made here, results there."""
    code = """
import json, pareto_runner.worker, torch
from pareto_runner.machine import code_hash, lock_hash, machine
torch.ones(999, 999).matmul(torch.eye(999))
print(json.dumps([machine(), lock_hash(), code_hash()]))
"""
    command, variables = [sys.executable, "-c", code], environment() | binding()
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=variables)
    assert json.loads(run.stdout.splitlines()[-1]) == json.loads(json.dumps([machine(), lock_hash(), code_hash()]))


def test_a_server_is_read_from_its_files(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(system, {**SERVER, **VERSION_2})
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    found = machine()
    expected = {
        "cpu": "Imaginary Xeon",
        "isa": ["avx2", "avx512f", "amx_bf16"],
        "microcode": "0x2b",
        "hypervisor": True,
        "physical_cores": 2,
        "smt": True,
        "numa_nodes": 2,
        "governor": "performance, powersave",
        "turbo": False,
        "memory_gib": 128.0,
        "huge_pages": "madvise",
        "cpu_limit": 1.5,
        "memory_limit_gib": 3.0,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["variables"]["MKL_NUM_THREADS"] == "3"


def test_limits_of_version_1_control_groups(system: Path) -> None:
    fill(system, VERSION_1)
    assert {key: machine()[key] for key in ("cpu_limit", "memory_limit_gib")} == {
        "cpu_limit": 0.5,
        "memory_limit_gib": 1.0,
    }
    unlimited = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    fill(system, {**unlimited, "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_quota_us": "-1\n"})
    assert (machine()["cpu_limit"], machine()["memory_limit_gib"]) == (None, None)


def test_turbo_of_processors_without_intel_s_driver(system: Path) -> None:
    fill(system, {"sys/devices/system/cpu/cpufreq/boost": "1\n"})
    assert machine()["turbo"] is True


def test_what_a_system_does_not_tell_is_none(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = machine()
    unknown = {
        "microcode",
        "hypervisor",
        "physical_cores",
        "smt",
        "numa_nodes",
        "governor",
        "turbo",
        "memory_gib",
        "huge_pages",
        "cpu_limit",
        "memory_limit_gib",
    }
    assert {key for key in found if found[key] is None} == unknown
    assert found["cpu"]
    assert (found["isa"], found["libraries"]["torch"]) == ([], machine()["libraries"]["torch"])
    around = context()
    assert (around["commit"], around["dirty"], around["load"]) == (None, None, None)


@pytest.mark.parametrize("text", ["", "\xff\xfe", ":::\n - \n::", "0::/../..\n", "max", "9" * 5000, "- - cgroup2\n"])
def test_files_that_hold_something_else_are_no_error(text: str, system: Path) -> None:
    mount = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    fill(system, {**dict.fromkeys([*SERVER, *VERSION_1, *VERSION_2], text), "sys/fs/cgroup/cpu.max": text})
    fill(system, {"proc/self/mountinfo": mount} if "cgroup" not in text else {})
    assert machine()["cpu_limit"] is None


def test_the_context_says_which_code() -> None:
    found = context()
    assert found["code"] == code_hash()
    assert found["lock"] == lock_hash()
    assert len(found["code"]) == len(found["lock"]) == 12
    assert found["load"] >= 0
    clone = Path(__file__).parents[2]
    if (clone / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert found["commit"] == head.stdout.strip()
        assert isinstance(found["dirty"], bool)


def test_the_commit_is_that_of_the_code_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@localhost"]
    if shutil.which("git") is None:
        pytest.skip("git is not here")
    monkeypatch.setattr(module, "CLONE", tmp_path)
    (tmp_path / "uv.lock").write_text("a")
    assert (context()["commit"], context()["dirty"]) == (None, None)  # no repository
    for command in (["init", "-q"], ["add", "uv.lock"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    clean = context()
    assert clean["commit"] is not None
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "uv.lock").write_text("b")
    assert (context()["commit"], context()["dirty"]) == (clean["commit"], True)


def test_the_lock_changes_with_the_file_and_with_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def now() -> str:
        lock_hash.cache_clear()
        return lock_hash()

    try:
        installed = tmp_path / "site-packages"
        monkeypatch.setattr(module, "CLONE", tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
        seen = [now()]
        (tmp_path / "uv.lock").write_text("torch 1")
        seen.append(now())
        (tmp_path / "uv.lock").write_text("torch 2")
        seen.append(now())
        (installed / "torch-1.dist-info").mkdir(parents=True)
        seen.append(now())
        (installed / "torch-1.dist-info").rename(installed / "torch-2.dist-info")
        seen.append(now())
        assert len(set(seen)) == 5
        (installed / "torch").mkdir()
        assert now() == seen[-1]
    finally:
        lock_hash.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that is importable, and nothing else."""
    root = tmp_path / "pareto_imaginary"
    fill(root, {"__init__.py": "", "maths.py": "x = 1\r\n", "native/kernel.cpp": "int x;"})
    monkeypatch.syspath_prepend(tmp_path)
    return root


def hash_now(name: str) -> str:
    module._package_hash.cache_clear()
    return code_hash([name])


def test_the_code_is_that_of_core_runner_and_the_packages_used(package: Path) -> None:
    base = hash_now("pareto_imaginary")
    assert base == hash_now("pareto_imaginary")
    assert base != code_hash()
    seen = {base, code_hash()}
    for name, text in (
        ("maths.py", "x = 1\n"),
        ("native/kernel.cpp", "int y;"),
        ("new.py", ""),
        ("data.bin", "\0\xff"),
    ):
        fill(package, {name: text})
        assert hash_now("pareto_imaginary") not in seen
        seen.add(hash_now("pareto_imaginary"))
    (package / "new.py").rename(package / "newer.py")
    assert hash_now("pareto_imaginary") not in seen
    last = hash_now("pareto_imaginary")
    fill(package, {"__pycache__/maths.pyc": "compiled"})
    assert hash_now("pareto_imaginary") == last


def test_a_module_that_is_one_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pareto_single.py").write_text("x = 1")
    before = hash_now("pareto_single")
    (tmp_path / "pareto_single.py").write_text("x = 2")
    assert hash_now("pareto_single") != before


def test_presentation_does_not_count_and_every_other_module_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "pareto_runner"
    shutil.copytree(Path(module.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    found = importlib.machinery.ModuleSpec("pareto_runner", None, is_package=True)
    found.submodule_search_locations = [str(copy)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "pareto_runner" else None)
    try:
        base = hash_now("pareto_core")
        for name in ("report.py", "cli.py", "tracking.py", "templates/report.html"):
            fill(copy, {name: "changed"})
        assert hash_now("pareto_core") == base
        seen = {base}
        for name in ("run.py", "turns.py", "targets/xeon.py", "brand_new.py"):
            fill(copy, {name: "changed"})
            assert hash_now("pareto_core") not in seen, name
            seen.add(hash_now("pareto_core"))
    finally:
        module._package_hash.cache_clear()


def test_the_modules_that_decide_no_result_exist() -> None:
    folder = Path(module.__file__).parent
    assert {path.stem for path in folder.iterdir()} >= module.UNDECIDING


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'H200, 550.1, 140 GiB'; echo 'H200, 550.1, 140 GiB'", ("H200", "550.1", "140 GiB")),
        ("echo 'No devices were found'", ()),
        ("exit 9", ()),
        ("true", ()),
    ],
)
def test_the_first_gpu_is_what_its_driver_says(
    script: str, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    try:
        module.gpu_description.cache_clear()
        assert tuple(module.gpu_description().values()) == expected
    finally:
        module.gpu_description.cache_clear()


def test_a_specification_names_the_packages_that_it_uses() -> None:
    assert packages_of(spec("core.tiny", "full", "krona")) == {"pareto_core", "pareto_adapters"}
    with pytest.raises(UnknownNameError, match="unknown method 'krone'; did you mean 'krona'"):
        packages_of(spec("core.tiny", "krone"))
    with pytest.raises(UnknownNameError, match=r"unknown task 'core\.tinny'; did you mean 'core\.tiny'"):
        packages_of(spec("core.tinny", "full"))


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


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("pareto_no_such:X", "cannot be imported: No module named 'pareto_no_such'"),
        ("pathlib:Nothing", "cannot be imported"),
        ("pathlib:Path", "is not a Method"),
        ("math:pi", "is not a Method"),
    ],
)
def test_entry_points_that_lead_nowhere_are_named(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(name="broken", value=value, group=discover.METHODS)
    monkeypatch.setattr(discover, "available", lambda group: {"broken": entry})
    with pytest.raises(ParetoError, match=f"the entry point broken .*{words}"):
        discover.method_class("broken")

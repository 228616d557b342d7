"""Which instruction sets are used where: the library must load and run on any x86-64."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pareto_cpu_runtime import _native

PACKAGE = Path(__file__).resolve().parents[1]
BUILDS = [*PACKAGE.glob("build/*/CMakeFiles/_native.dir"), PACKAGE.parents[1] / "build/cpu/CMakeFiles/_native.dir"]

# As the Linux kernel calls them in /proc/cpuinfo.
NEEDED = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512f": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx_vnni": {"avx2", "avx_vnni"},
    "avx512_vnni": {"avx512f", "avx512_vnni"},
    "avx512_bf16": {"avx512f", "avx512_bf16"},
    "avx512_fp16": {"avx512f", "avx512_fp16"},
    "amx_int8": {"amx_tile", "amx_int8"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
}


def processor_flags() -> set[str]:
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found.group(1).split())


def test_instruction_sets_are_those_that_the_system_reports():
    flags = processor_flags()
    assert set(_native.available()) == {"scalar"} | {name for name, needed in NEEDED.items() if needed <= flags}


def test_every_kernel_says_whether_it_runs_here():
    table = {name: (compute, here) for name, compute, here in _native.kernels()}
    assert {name for name, (_, here) in table.items() if here == "yes"} == set(_native.available()) & set(table)
    assert set(table) == {"scalar", *NEEDED}
    assert {compute for compute, _ in table.values()} == {"int8", "bf16", "fp16", "fp32"}


def run(*command: str | Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def objects() -> dict[str, Path]:
    """The library's object files by their source's name, of the newest build without a sanitizer."""
    builds = [folder for folder in BUILDS if (folder / "native").is_dir() and plain(folder)]
    if not builds:
        pytest.skip(
            "no build folder with object files: they are looked for in build/cpu and packages/cpu-runtime/build"
        )
    native = max(builds, key=lambda folder: folder.stat().st_mtime) / "native"
    return {str(path.relative_to(native)).removesuffix(".o"): path for path in native.rglob("*.cpp.o")}


def plain(folder: Path) -> bool:
    cache = (folder.parents[1] / "CMakeCache.txt").read_text()
    return not re.search(r"PARETO_SANITIZE:STRING=.|PARETO_EMULATE:BOOL=ON|CMAKE_BUILD_TYPE:\w+=Debug", cache)


def flagged() -> set[str]:
    """Sources that CMakeLists.txt compiles for an instruction set."""
    return set(re.findall(r"compiled_for\(([\w/]+\.cpp)", (PACKAGE / "CMakeLists.txt").read_text()))


def test_only_flagged_files_have_instructions_beyond_any_x86_64(objects):
    beyond = re.compile(r"\t(v\w+ [^\n]*%[xyz]mm\d+|[^\n]*%[yz]mm\d+|[^\n]*%k[0-7])")
    others = set(objects) - flagged()
    assert {"dispatch.cpp", "module.cpp", "pool.cpp", "kernels/scalar.cpp"} <= others
    for name in sorted(others):
        found = beyond.search(run("objdump", "-d", "--no-show-raw-insn", objects[name]))
        assert found is None, f"{name}: {found.group(1)}"
    assert beyond.search(run("objdump", "-d", "--no-show-raw-insn", objects["kernels/avx2.cpp"]))


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("avx2", "vfmadd"),
        ("avx512f", "%zmm"),
        ("avx_vnni", "{vex} vpdpbusd"),
        ("avx512_vnni", "vpdpbusd"),
        ("avx512_bf16", "vdpbf16ps"),
        ("avx512_fp16", "vfmadd[0-9]*ph"),
        ("amx_int8", "tdpbsud"),
        ("amx_bf16", "tdpbf16ps"),
    ],
)
def test_each_kernel_uses_the_instruction_that_it_is_named_for(objects, name, instruction):
    code = run("objdump", "-d", "--no-show-raw-insn", objects[f"kernels/{name}.cpp"])
    assert re.search(instruction, code)
    assert name in ("amx_int8", "amx_bf16") or "tmm" not in code
    assert name not in ("avx2", "avx_vnni") or "%zmm" not in code


def test_no_function_of_a_flagged_file_can_take_the_place_of_another(objects):
    """Of an inline function that several files define, the linker keeps any one, whatever it was compiled for."""
    weak, anywhere = {}, {}
    for name, path in objects.items():
        for kind, symbol in re.findall(r"^[0-9a-f]+ (\w) (\S+)$", run("nm", "--defined-only", path), re.MULTILINE):
            if kind.isupper() or kind == "u":
                anywhere.setdefault(symbol, []).append(name)
            if kind in "WVu" and name in flagged():
                weak[symbol] = name
    shared = {symbol: anywhere[symbol] for symbol in weak if len(anywhere[symbol]) > 1}
    assert not shared
    assert "_ZN6pareto7kScalarE" in anywhere

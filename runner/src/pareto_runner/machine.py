"""What a result ran on (the machine) and under which circumstances (the context).

The machine holds what stays the same from one run to the next, for it decides whether results may be compared and
whether one need be measured again; frequencies and loads are not among it. What a system does not tell is None.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pareto_core import RunSpec
from pareto_runner import discover

ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "numpy")
#: variables that change speed and reach the workers as they are; those that isolate.py sets are not among them
VARIABLES = ("MKL_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "LD_PRELOAD", "GLIBC_TUNABLES")
#: modules of the runner that decide no result, for they show results, store them elsewhere, or put the runner itself
#: to the test; a change of them makes no result out of date, and every module that is not named here counts
UNDECIDING = {
    "changes",
    "cli",
    "drawing",
    "faults",
    "plots",
    "report",
    "sections",
    "selftest",
    "tables",
    "templates",
    "terminal",
    "tracking",
    "upload",
    "wording",
}
#: above this a version 1 cgroup has no limit of memory: the kernel writes the largest number of whole pages
NO_LIMIT = 2**60
MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
#: the clone that this code stands in, where it is installed from one and not from a wheel
CLONE = Path(__file__).parents[3]
#: what files of the system are looked for under
ROOT = Path("/")


def _usable() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


#: numbers of the CPUs that this process may use, taken before OpenMP binds its first thread to one of them
USABLE = _usable()
CPUS = len(USABLE)


def _read(path: str) -> str | None:
    try:
        return (ROOT / path).read_text(errors="replace").strip()
    except OSError:
        return None


def _integer(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"-?[0-9]{1,20}", text) else None


def _switch(path: str) -> bool | None:
    number = _integer(_read(path))
    return None if number is None else number == 1


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """What the first processor's paragraph says; the others take a server's kernel long to write."""
    found: dict[str, str] = {}
    try:
        with (ROOT / "proc/cpuinfo").open(errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break
                key, _, value = line.partition(":")
                found[key.strip()] = value.strip()
    except OSError:
        return {}
    return found


def cpu_model() -> str:
    """Name of the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def isa_flags() -> list[str]:
    """Those instruction sets that decide which kernels run."""
    return [flag for flag in ISA if flag in _flags()]


def _flags() -> set[str]:
    return set(_cpuinfo().get("flags", "").split())


@functools.cache
def gpu_description() -> dict[str, str]:
    """Model and driver of the first GPU, empty where there is none; asks the driver, starts no CUDA context."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (subprocess.SubprocessError, OSError):
        return {}
    parts = [part.strip() for part in answer[0].split(",")] if answer else []
    return dict(zip(("gpu", "driver", "gpu_memory"), parts, strict=True)) if len(parts) == 3 else {}


def machine() -> dict[str, Any]:
    """Hardware, its settings and limits, and library versions: latencies over different machines are not compared."""
    return {
        "cpu": cpu_model(),
        "isa": isa_flags(),
        "microcode": _cpuinfo().get("microcode"),
        "hypervisor": "hypervisor" in _flags() if _flags() else None,
        "cores": os.cpu_count(),
        "affinity": CPUS,
        "physical_cores": _physical_cores(),
        "threads": CPUS,  # isolate.py gives a worker one for each
        "smt": _switch("sys/devices/system/cpu/smt/active"),
        "numa_nodes": _numa_nodes(),
        "governor": _governor(),
        "turbo": _turbo(),
        "memory_gib": _memory_gib(),
        "huge_pages": _huge_pages(),
        **_cgroup_limits(),
        "kernel": platform.release(),
        "glibc": _glibc(),
        "python": platform.python_version(),
        **gpu_description(),
        "libraries": dict(_versions()),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _physical_cores() -> int | None:
    """Cores that the usable CPUs lie on: two CPUs of one core share its arithmetic units."""
    cores = set()
    for cpu in USABLE:
        place = f"sys/devices/system/cpu/cpu{cpu}/topology"
        cores.add((_read(f"{place}/physical_package_id"), _read(f"{place}/core_id")))
    return None if (None, None) in cores else len(cores)


def _numa_nodes() -> int | None:
    """NUMA nodes that the usable CPUs lie on."""
    nodes = {path.name for cpu in USABLE for path in (ROOT / f"sys/devices/system/cpu/cpu{cpu}").glob("node[0-9]*")}
    return len(nodes) or None


def _governor() -> str | None:
    """Who sets the frequency of the usable CPUs; several where they differ."""
    found = {_read(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor") for cpu in USABLE} - {None}
    return ", ".join(sorted(name for name in found if name)) or None


def _turbo() -> bool | None:
    """Whether the processor may exceed its nominal frequency."""
    off = _switch("sys/devices/system/cpu/intel_pstate/no_turbo")
    return _switch("sys/devices/system/cpu/cpufreq/boost") if off is None else not off


def _memory_gib() -> float | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read("proc/meminfo") or "", re.MULTILINE)
    return round(int(found[1]) / 2**20, 1) if found else None


def _huge_pages() -> str | None:
    """When memory comes in transparent huge pages: ``always``, ``madvise`` or ``never``."""
    found = re.search(r"\[(\w+)\]", _read("sys/kernel/mm/transparent_hugepage/enabled") or "")
    return found[1] if found else None


def _glibc() -> str | None:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError, AttributeError):
        return None


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cgroup_limits() -> dict[str, float | None]:
    """CPU time in CPUs and memory in GiB that this process's control groups leave it; None where they set no limit."""
    quotas: list[tuple[str | None, str | None]] = []
    for group in _cgroups("cpu"):
        quota, _, period = (_read(f"{group}/cpu.max") or "").partition(" ")
        quotas.append((quota, period))
        quotas.append((_read(f"{group}/cpu.cfs_quota_us"), _read(f"{group}/cpu.cfs_period_us")))
    sizes = [_integer(_read(f"{group}/{name}")) for group in _cgroups("memory") for name in MEMORY_LIMITS]
    pairs = [(_integer(quota) or 0, _integer(period) or 0) for quota, period in quotas]
    shares = [quota / period for quota, period in pairs if quota > 0 and period > 0]
    memory = [size / 2**30 for size in sizes if size is not None and 0 <= size < NO_LIMIT]
    return {
        "cpu_limit": round(min(shares), 2) if shares else None,
        "memory_limit_gib": round(min(memory), 1) if memory else None,
    }


def _cgroups(controller: str) -> Iterator[str]:
    """Folders of the control groups that hold this process, of version 1 and 2, from its own up to the mount.

    Inside a container a process may see the path that its group has outside; the mount is then its group.
    """
    own = {}
    for line in (_read("proc/self/cgroup") or "").splitlines():
        names, _, path = line.partition(":")[2].partition(":")
        own.update(dict.fromkeys(names.split(","), path))
    for line in (_read("proc/self/mountinfo") or "").splitlines():
        mount, _, source = line.partition(" - ")
        fields, kind = mount.split(), source.split() or [""]
        version_1 = kind[0] == "cgroup" and controller in kind[-1].split(",")
        if len(fields) < 5 or not (version_1 or kind[0] == "cgroup2"):
            continue
        group, root = Path(own.get(controller if version_1 else "", "/")), fields[3]
        below = group.relative_to(root) if group.is_relative_to(root) and ".." not in group.parts else Path()
        for folder in (below, *below.parents):
            yield str(Path(fields[4].lstrip("/")) / folder)


def context(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Commit, code, environment, load and time: what may differ between two runs on the same machine.

    ``packages`` are those whose code the result depends on, besides core and runner (:func:`code_hash`).
    """
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "code": code_hash(packages),
        "lock": lock_hash(),
        "load": load(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def load() -> float | None:
    """Processes that ran or waited for a CPU, averaged over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the clone that this code was installed from, and whether files have changed since."""
    program = shutil.which("git")
    if program is None or not (CLONE / ".git").exists():  # a repository around an unpacked archive is another's
        return None, None
    command = [program, "--no-optional-locks", "-C", str(CLONE), "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError, UnicodeDecodeError):
        return None, None
    found = re.search(r"^# branch\.oid ([0-9a-f]+)$", answer, re.MULTILINE)
    return found[1] if found else None, any(not line.startswith("#") for line in answer.splitlines())


@functools.cache
def lock_hash() -> str:
    """Hash of what is installed: the clone's lock, and names and versions as they are; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    lock = CLONE / "uv.lock"
    if lock.is_file():
        digest.update(lock.read_bytes())
    folders = {Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    installed = {path.name for folder in folders for path in folder.glob("*-info")}
    digest.update("\n".join(sorted(installed)).encode())
    return digest.hexdigest()[:12]


def code_hash(packages: Iterable[str] = ()) -> str:
    """Hash of the sources that decide a result: core, runner and ``packages``, by import name; 12 hexadecimal digits.

    Those of the runner that decide none are left out, so that a better report makes no result out of date.
    Files are read once in a process: what they hold later does not run in it.
    """
    digest = hashlib.sha256()
    for package in sorted({"pareto_core", "pareto_runner", *packages}):
        digest.update(f"{package} {_package_hash(package)}\n".encode())
    return digest.hexdigest()[:12]


def packages_of(spec: RunSpec) -> set[str]:
    """Import names of the packages that the methods and the task of ``spec`` come from; nothing is imported.

    Raises UnknownNameError where a name has no entry point.
    """
    entries = [discover.entry_point(discover.TASKS, spec.task.name)]
    entries += [discover.entry_point(discover.METHODS, m.name) for stage in spec.stages for m in stage.methods]
    return {entry.module.partition(".")[0] for entry in entries}


@functools.cache
def _package_hash(package: str) -> str:
    digest = hashlib.sha256()
    for place, path in sorted(_sources(package)):
        content = path.read_bytes()
        digest.update(f"{place} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    """Every file of a package that decides what it computes, data and native code included, by its place in it."""
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations is None and spec.origin is not None:
        yield package, Path(spec.origin)
    for root in map(Path, (spec.submodule_search_locations or ()) if spec is not None else ()):
        for path in root.rglob("*"):
            place = path.relative_to(root)
            undeciding = package == "pareto_runner" and place.parts[0].removesuffix(".py") in UNDECIDING
            if path.is_file() and "__pycache__" not in place.parts and not undeciding:
                yield place.as_posix(), path

"""What a result ran on (the machine) and under which circumstances (the context)."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "numpy")
#: CPUs that this process may use, taken before OpenMP binds its first thread to one of them
CPUS = len(os.sched_getaffinity(0))
PACKAGES = ("pareto_core", "pareto_adapters", "pareto_runner")


@functools.cache
def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def cpu_model() -> str:
    """Name of the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def isa_flags() -> list[str]:
    """Those instruction sets that decide which kernels run."""
    have = set(_cpuinfo().get("flags", "").split())
    return [flag for flag in ISA if flag in have]


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
    if not answer:
        return {}
    name, driver, memory = (part.strip() for part in answer[0].split(","))
    return {"gpu": name, "driver": driver, "gpu_memory": memory}


def machine() -> dict[str, Any]:
    """Hardware and library versions: latencies over different machines are not compared."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name)}
    memory_kib = int(_meminfo().get("MemTotal", "0 kB").split()[0])
    return {
        "cpu": cpu_model(),
        "isa": isa_flags(),
        "cores": os.cpu_count(),
        "affinity": CPUS,
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **gpu_description(),
        "libraries": versions,
    }


def _meminfo() -> dict[str, str]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def context() -> dict[str, Any]:
    """Commit, load and time: what may differ between two runs of the same code on the same machine."""
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "code": code_hash(),
        "load": round(os.getloadavg()[0], 2),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    program = shutil.which("git")
    if program is None:
        return ""
    run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""


@functools.cache
def code_hash() -> str:
    """Hash over the sources of the installed Pareto packages, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]

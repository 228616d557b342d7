"""Peak host memory of this process, as the kernel counts it: exact, and unaffected by what the launcher used."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def reset_host_peak() -> None:
    """Set the high-water mark VmHWM to the memory that is resident now."""
    CLEAR.write_text("5")


def peak_host_bytes() -> int:
    """Bytes resident at the highest point since :func:`reset_host_peak`."""
    return _read("VmHWM")


def resident_host_bytes() -> int:
    """Bytes resident now."""
    return _read("VmRSS")


def _read(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")

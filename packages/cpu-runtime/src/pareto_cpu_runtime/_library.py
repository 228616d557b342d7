"""The native library, loaded when it is first needed."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from pareto_core.errors import UnsupportedError


@functools.cache
def native() -> Any:
    """The compiled module. Raises :class:`UnsupportedError` where the package was installed without it."""
    try:
        return importlib.import_module("pareto_cpu_runtime._native")
    except ImportError as error:
        raise UnsupportedError(
            f"the native library cannot be loaded ({error}): install the package on x86-64 Linux, not its sources"
        ) from error

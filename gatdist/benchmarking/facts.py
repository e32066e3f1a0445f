"""What a measurement was made on, so that it can be compared."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("gatdist", "torch", "lightning", "accelerate")


def environment(threads: int) -> dict[str, Any]:
    """Hardware and versions as JSON values. ``threads``: of each process that was measured."""
    packages = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        **machine(),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads,
        "packages": packages,
    }


def machine() -> dict[str, Any]:
    """The hardware, and what runs on it."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()

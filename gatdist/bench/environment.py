"""What a measurement was made on, so that it can be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("gatdist", "torch", "lightning", "accelerate")


def environment(threads: int) -> dict[str, Any]:
    """Hardware and versions as JSON values. ``threads``: of each process that was measured."""
    return {
        **machine(),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads,
        "packages": versions(_PACKAGES),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """The hardware, and what runs on it."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def commit() -> str | None:
    """Of this source, with ``+changes`` if files that it holds were changed.

    None where gatdist is installed as a package, or there is no git.
    """
    try:
        if not _git("ls-files", "facts.py"):
            return None  # some other repository, around the environment that gatdist is in
        return _git("rev-parse", "HEAD") + (
            "+changes" if _git("status", "-suno", "--", ":/") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def memory_bytes() -> int:
    """Of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()

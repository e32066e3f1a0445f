"""Hardware and versions that a measurement was made on."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any


def environment(*packages: str, **more: Any) -> dict[str, Any]:
    """Return commit, hardware, load and the versions of installed ``packages``, as JSON values."""
    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        **more,
        "packages": versions,
    }


def commit() -> str | None:
    """Return the commit, with ``+changes`` if modified; None without a git checkout."""
    try:
        if not _git("ls-files", Path(__file__).name):
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


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()

"""What a result was made on, so that it can be compared."""

from __future__ import annotations

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from gatdist.benchmarking.facts import machine

PACKAGES = ("torch", "ray", "numpy", "fsspec", "tensorboard")


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, as JSON values."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        **machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }

"""What a result was made on, so that it can be compared."""

from __future__ import annotations

from typing import Any

from gatdist.bench.environment import machine, memory_bytes, versions

PACKAGES = ("torch", "ray", "numpy", "fsspec", "tensorboard")


def environment() -> dict[str, Any]:
    """Commit, hardware and versions (of what is installed), as JSON values."""
    return {**machine(), "memory_bytes": memory_bytes(), "packages": versions(PACKAGES)}

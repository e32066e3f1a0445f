"""Shared helpers of packing tests: small sources, packing, and its results."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import gatdist

SIZE = (5, 7)


def image(seed: int, size: tuple[int, int] = SIZE, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def pack(source: Path, dest: Path, **options: Any) -> dict[str, Any]:
    return gatdist.pack(str(source), str(dest), **{"workers": 1, "shard_bytes": 9_000} | options)


def content(folder: Path) -> dict[str, str]:
    """Return a digest of every file, including hidden ones."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def samples(folder: Path) -> list[dict[str, bytes]]:
    """Return the files of each sample by extension, read by Python's own tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, component = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[component] = file.read()
    return list(found.values())

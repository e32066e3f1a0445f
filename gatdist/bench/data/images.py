"""Made-up photographs: JPEGs that compress as photographs do, each different, from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from gatdist.config import cache_folder
from gatdist.data import write_dataset
from gatdist.storage import Store

_POOL = 24
_OCTAVES = ((4, 60.0), (16, 30.0), (64, 14.0), (256, 9.0))
# So that 256 × 256 pixels take about 30 KB, as photographs do.
_QUALITY = 94


def images(num: int, size: int, seed: int = 0) -> Iterator[bytes]:
    """``num`` JPEGs of ``size`` × ``size`` in RGB."""
    draws = np.random.default_rng([seed, size])
    pool = [_texture(draws, size) for _ in range(_POOL)]
    for _ in range(num):
        first, second = draws.choice(_POOL, 2, replace=False)
        down, right = (int(n) for n in draws.integers(0, size, 2))
        mixed = pool[first] + np.roll(pool[second], (down, right), axis=(0, 1))
        levels = np.clip(mixed + 128 + draws.uniform(-30, 30, 3), 0, 255).astype(np.uint8)
        yield simplejpeg.encode_jpeg(levels, quality=_QUALITY)


def folder(num: int, size: int, num_shards: int, seed: int = 0) -> Path:
    """A data set of such pictures in the cache folder, written on first use."""
    path = cache_folder() / "benchmarks" / f"pictures-v1-{size}-{num}-{num_shards}-{seed}"
    if not (path / "manifest.json").exists():
        made = images(num, size, seed)
        bounds = [num * i // num_shards for i in range(num_shards + 1)]
        shards = (
            ((f"{i:08d}", {"jpg": next(made)}) for i in range(first, end))
            for first, end in pairwise(bounds)
        )
        write_dataset(Store(str(path)), shards, modality="image", sample_shape=(3, size, size))
    return path


def _texture(draws: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Noise with less of it the finer it is, [size, size, 3], about 0."""
    total = np.zeros((size, size, 3))
    for cells, strength in _OCTAVES:
        cells = min(cells, size)
        noise = draws.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        grown = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        total += (np.asarray(grown) / 127.5 - 1) * strength
    return total / 2

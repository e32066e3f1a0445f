"""Built-in data sets, written as shards to the cache folder on first use.

``builtin:digits``  scikit-learn's 1,797 handwritten digits, 8 × 8, gray, 10 classes
``builtin:ring``    20,000 points from 8 Gaussians on a circle; the class is the Gaussian
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gatdist.common.errors import DataError, StorageError, nearest
from gatdist.config import cache_folder
from gatdist.data.codecs.arrays import encode_array
from gatdist.data.codecs.images import encode_png
from gatdist.data.format.manifest import MANIFEST
from gatdist.data.format.shard_files import Components, write_dataset
from gatdist.storage import Store

PREFIX = "builtin:"

_NUM_SHARDS = 4
_RING_SAMPLES, _RING_MODES, _RING_RADIUS, _RING_DEVIATION = 20_000, 8, 1.0, 0.01


def prepare(url: str) -> str:
    """Return the folder of a ``builtin:`` data set, written if absent. Raises DataError."""
    name = url.removeprefix(PREFIX)
    if name not in _WRITERS:
        rule = f"no such built-in data set. {nearest(name, _WRITERS)}"
        raise DataError("data.url", rule, value=url)
    folder = cache_folder() / "datasets" / f"{name}-v2"
    if not (folder / MANIFEST).exists():
        _write_aside(folder, _WRITERS[name])
    return str(folder)


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the digits, uint8 [1797, 8, 8, 1] of 0 to 255, and which they are, int64 [1797].

    Raises DataError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        rule = f"needs scikit-learn ({error})"
        raise DataError("builtin:digits", rule, hint="pip install scikit-learn") from error
    found = load_digits()  # levels 0 to 16
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, found.target.astype(np.int64)


def write_digits(store: Store) -> None:
    """Write the digits; the class is the digit."""
    images, shown = digits()
    files = ({"png": encode_png(p), "cls": b"%d" % t} for p, t in zip(images, shown, strict=True))
    shards = _keyed(files, len(images))
    write_dataset(store, shards, modality="image", sample_shape=(1, 8, 8), num_classes=10)


def write_ring(store: Store) -> None:
    """Write the ring. A sample's class is its number modulo 8, with its mean at class · 45°."""
    # Only the raw bits of NumPy's generators are stable across versions.
    words = np.random.Philox(key=0).random_raw((2, _RING_SAMPLES))
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53  # in (0, 1)
    distance, direction = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]  # Box & Muller
    modes = np.arange(_RING_SAMPLES) % _RING_MODES
    angles = modes * (2 * np.pi / _RING_MODES)
    x = _RING_RADIUS * np.cos(angles) + _RING_DEVIATION * distance * np.cos(direction)
    y = _RING_RADIUS * np.sin(angles) + _RING_DEVIATION * distance * np.sin(direction)
    points = np.stack([x, y], axis=1).astype(np.float32)  # [20000, 2]
    files = ({"npy": encode_array(p), "cls": b"%d" % m} for p, m in zip(points, modes, strict=True))
    shards = _keyed(files, len(points))
    write_dataset(store, shards, modality="points", sample_shape=(2,), num_classes=_RING_MODES)


_WRITERS: dict[str, Callable[[Store], None]] = {"digits": write_digits, "ring": write_ring}


def _keyed(files: Iterator[Components], count: int) -> Iterator[Iterator[tuple[str, Components]]]:
    for numbers in np.array_split(np.arange(count), _NUM_SHARDS):
        yield ((f"{i:06d}", next(files)) for i in numbers)


def _write_aside(folder: Path, write: Callable[[Store], None]) -> None:
    """Write a data set to a temporary folder and rename it, unless another process was first."""
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    try:
        aside.mkdir(parents=True)
        write(Store(str(aside)))
        try:
            aside.rename(folder)
        except OSError as error:
            if not (folder / MANIFEST).exists():
                rule = f"is not a built-in data set ({error})"
                raise StorageError(str(folder), rule, hint="Remove it") from error
    except OSError as error:
        hint = "Set GATDIST_CACHE to a writable folder"
        raise StorageError(str(folder), f"can't be written ({error})", hint=hint) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)

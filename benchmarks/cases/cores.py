"""CPU time per sample that is read and decoded, and the cores that GPUs need.

One thread reads shards from memory, as a decoding thread does: checksums, decoding, resizing, and
the assembly of batches. CPU time, which other processes on the machine disturb less than wall time.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.case import parser, positive, progress, save
from benchmarks.readers import images
from gatdist.bench.rounds import interleave, settled, timed
from gatdist.config import DataConfig
from gatdist.data import dataset
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.format.shard_files import write_dataset
from gatdist.monitor.numbers import aligned
from gatdist.storage import Store

SIDES = (64, 256, 512)
RESIZED = 256  # the side of images that are resized
_RESIZED = f" → {RESIZED}²"
TURN_S = 0.5
CLIP, RATE = 16_384, 16_000
NEEDED = (1_000, 3_000)  # samples per second of a host with 8 GPUs


def _jpeg(content: bytes) -> bytes:
    return content


def _saved(content: bytes, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).save(file, **options)
    return file.getvalue()


# From a JPEG of quality 94.
FORMATS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "JPEG": ("jpg", _jpeg),
    "PNG": ("png", partial(_saved, format="png")),
    "WebP": ("webp", partial(_saved, format="webp", quality=90)),
}


def main() -> None:
    arguments = parser("cores", __doc__)
    arguments.add_argument("--rounds", type=positive, default=5)
    arguments.add_argument("--num", type=positive, default=64, help="samples of each kind")
    given = arguments.parse_args()
    dataset._DECODED_BYTES = 0  # or so few samples would be decoded once
    opened = {
        name: dataset.open_dataset(
            DataConfig(url=url, resolution=RESIZED if name.endswith(_RESIZED) else None)
        )
        for name, url in data_sets(given.num)
    }
    sizes = {name: data.num_bytes / given.num for name, data in opened.items()}
    numbers = np.arange(given.num)

    def turn(name: str) -> float:
        taken = timed(partial(opened[name].read, numbers)).cpu
        repeats = max(1, round(TURN_S / taken))
        repeated = timed(lambda: [opened[name].read(numbers) for _ in range(repeats)])
        return repeated.cpu / repeats / given.num

    with settled():
        seconds = interleave(list(opened), given.rounds, turn, progress)
    rows = [_row(name, sizes[name], taken) for name, taken in seconds.items()]
    save(given.out, {"cases": rows}, rounds=given.rounds)
    print(table(rows))


def data_sets(num: int) -> Iterator[tuple[str, str]]:
    """Write data sets to memory; yield their names and URLs."""
    for side in SIDES:
        made = list(images(num, side))
        for name, (extension, convert) in FORMATS.items():
            samples = [(f"{i:06d}", {extension: convert(one)}) for i, one in enumerate(made)]
            store = Store(f"memory://cores/{side}/{name}")
            write_dataset(store, [samples], modality="image", sample_shape=(3, side, side))
            yield f"{name}, {side}²", store.url
            if side == SIDES[-1] and name == "JPEG":
                yield f"{name}, {side}²{_RESIZED}", store.url
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (num, 1, CLIP)).astype(np.float32)
    samples = [(f"{i:06d}", {"wav": encode_wav(clip, RATE)}) for i, clip in enumerate(noise)]
    store = Store("memory://cores/wav")
    write_dataset(store, [samples], modality="audio", sample_shape=(1, CLIP), sample_rate=RATE)
    yield f"WAV, {CLIP:,} samples", store.url


def _row(name: str, num_bytes: float, taken: list[float]) -> dict[str, Any]:
    cpu_s = median(taken)
    return {
        "name": name,
        "bytes_per_sample": round(num_bytes),
        "cpu_ms_per_sample": 1000 * cpu_s,
        "low": 1000 * min(taken),
        "high": 1000 * max(taken),
        "samples_per_s_per_core": 1 / cpu_s,
        "cores": {str(rate): rate * cpu_s for rate in NEEDED},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of text."""
    head = [
        "data",
        "KB",
        "ms per sample",
        "samples/s per core",
        *(f"cores at {n}/s" for n in NEEDED),
    ]
    lines = [
        [
            row["name"],
            f"{row['bytes_per_sample'] / 1000:.0f}",
            f"{row['cpu_ms_per_sample']:.3f}",
            f"{row['samples_per_s_per_core']:,.0f}",
            *(f"{row['cores'][str(rate)]:.1f}" for rate in NEEDED),
        ]
        for row in rows
    ]
    return aligned([head, *lines])


if __name__ == "__main__":
    main()

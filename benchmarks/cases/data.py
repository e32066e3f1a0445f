"""Reading and packing images on this machine: gatdist, other libraries, and the upper bound.

The upper bound is the slower of sequential reads and of decoding from memory in the same round.
Packing (with one core) is compared with webdataset's ``ShardWriter``; gatdist also makes an index
and digests, and flushes its files to the disk.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.case import parser, positive, progress, save
from benchmarks.readers import (
    BATCH,
    LIMITS,
    READERS,
    Reader,
    image_folder,
    loose_files,
    open_loader,
)
from gatdist.api import pack
from gatdist.bench.processes import Report, together
from gatdist.bench.rounds import compare as ratio_of
from gatdist.bench.rounds import interleave, settled, timed
from gatdist.config import DataConfig
from gatdist.data.dataset import open_dataset
from gatdist.data.order import SampleOrder, ShardLayout, fitting_block_bytes, fitting_window
from gatdist.monitor.numbers import aligned, number, size
from gatdist.parallel.communicator import Communicator

TURN_S = 2.0
_EPOCHS = 10
_LIMIT_BYTES = 128 * 2**20  # of a worker's memory; less than the images take
_HUGE_SHARDS, _HUGE_SAMPLES, _HUGE_BYTES = 10_000, 10_000, 300_000_000


def main(argv: Sequence[str] | None = None) -> None:
    add = (arguments := parser("data", __doc__)).add_argument
    add("--size", type=positive, action="append", help="pixels of a side (default: 64 and 256)")
    add("--case", choices=READERS, action="append", help="default: all that are installed")
    add("--num", type=positive, default=10_000, help="images of each size (default: 10,000)")
    add("--rounds", type=positive, default=5)
    add("--threads", type=positive, default=2, help="decoding threads or processes (default: 2)")
    given = arguments.parse_args(argv)
    names = [name for name in READERS if not given.case or name in given.case or name in LIMITS]
    skipped = [n for n in names if n in ("webdataset", "litdata", "grain")]
    skipped = [name for name in skipped if not importlib.util.find_spec(name)]
    readers = {name: READERS[name] for name in names if name not in skipped}
    rows = []
    for resolution in given.size or (64, 256):
        progress(f"images of {resolution} × {resolution}")
        folder = image_folder(given.num, resolution, max(1, given.num // 1000))
        rows += compare(folder, resolution, readers, given.rounds, given.threads)
    run = partial(together, 1, report=progress, silence_s=1800)
    result = {
        "cases": rows,
        "first_batch_s": first_batches(folder, given.rounds, given.threads),
        "memory": run(memory, str(folder), given.num)[0],
        "order": run(order)[0],
        "packing": packing(folder, resolution, given.rounds),
        "num_images": given.num,
        "skipped": skipped,
    }
    save(given.out, result, threads=given.threads)
    print(table(result))


def compare(
    folder: Path, resolution: int, readers: Mapping[str, Reader], rounds: int, threads: int
) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        batches = {name: reader(folder, threads, stack) for name, reader in readers.items()}
        counts = {name: _batches_in_a_turn(iterator) for name, iterator in batches.items()}

        def turn(name: str) -> float:
            _take(batches[name], max(8, counts[name] // 8))  # what was read ahead
            return timed(partial(_take, batches[name], counts[name])).wall

        with settled():
            seconds = interleave(list(batches), rounds, turn, progress)
        batches.clear()
        gc.collect()  # ends the processes of other readers
    rates = {
        name: np.array([counts[name] * BATCH / s for s in taken]) for name, taken in seconds.items()
    }
    limit = np.minimum.reduce([rates[name] for name in LIMITS])
    return [
        {
            "reader": name,
            "resolution": resolution,
            "samples_per_s": float(median(rate)),
            "ratio_to_limit": float(median(rate / limit)),
            "ratio_low": float(min(rate / limit)),
            "ratio_high": float(max(rate / limit)),
        }
        for name, rate in rates.items()
    ]


def _batches_in_a_turn(iterator: Iterator[Any]) -> int:
    _take(iterator, 8)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < TURN_S / 2:
        _take(iterator, 4)
        count += 4
    return max(4, round(count * TURN_S / (time.perf_counter() - began)))


def _take(iterator: Iterator[Any], count: int) -> None:
    for _ in islice(iterator, count):
        pass


def first_batches(folder: Path, rounds: int, threads: int) -> dict[str, float]:
    num = open_dataset(DataConfig(url=str(folder))).num_samples
    places = {"early": 0, "late": round(0.9 * num)}

    def turn(name: str) -> float:
        began = time.perf_counter()
        with open_loader(str(folder), threads, position=places[name]) as loader:
            next(loader)
            return time.perf_counter() - began

    seconds = interleave(list(places), rounds, turn)
    found = {name: median(taken) for name, taken in seconds.items()}
    ratios = [late / early for late, early in zip(seconds["late"], seconds["early"], strict=True)]
    return found | {"late_to_early": median(ratios)}


def memory(comm: Communicator, report: Report, folder: str, num: int) -> dict[str, Any]:
    before = _resident_bytes()
    epochs = []
    with open_loader(
        folder, 1, memory_bytes=_LIMIT_BYTES, shuffle_window_samples=8, interleave=16
    ) as loader:
        for epoch in range(_EPOCHS):
            highest = 0
            for i in range(num // BATCH):
                next(loader)
                if i % 16 == 0:
                    highest = max(highest, _resident_bytes())
            epochs.append(highest - before)
            report(f"epoch {epoch + 1}")
    return {
        "ceiling_bytes": _LIMIT_BYTES,
        "bytes_by_epoch": epochs,
        "growth": max(epochs[1:]) / epochs[1] - 1,
    }


def order(comm: Communicator, report: Report) -> dict[str, Any]:
    before = _resident_bytes()
    layout = ShardLayout([(_HUGE_SAMPLES, _HUGE_BYTES)] * _HUGE_SHARDS)
    interleave = 1024
    window = fitting_window(layout, interleave)
    blocks = layout.cut_blocks(fitting_block_bytes(layout, 4 * 2**20, interleave))
    made = SampleOrder(blocks, seed=0, interleave=interleave, window=window)
    first_s = timed(lambda: made.indices(np.arange(10**7, 10**7 + 4096))).wall
    return {
        "num_samples": made.num_samples,
        "resident_bytes": _resident_bytes() - before,
        "first_4096_s": first_s,
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def packing(folder: Path, resolution: int, rounds: int, count: int = 300) -> list[dict[str, Any]]:
    """Pack some images, resized to 3/4; ``gatdist_to_this`` is the ratio of speeds."""
    size = resolution * 3 // 4
    paths = [Path(path) for path in loose_files(folder)[:count]]
    with tempfile.TemporaryDirectory() as name:
        source, turns = Path(name, "in"), iter(range(10**6))
        source.mkdir()
        for path in paths:
            (source / path.name).symlink_to(path)

        def turn(case: str) -> float:
            kind, _, library = case.partition(", ")
            write = _gatdist_pack if library == "gatdist" else _shard_writer
            return timed(partial(write, source, Path(name, f"out{next(turns)}"), kind, size)).wall

        libraries = ["gatdist"] + ["webdataset"] * bool(importlib.util.find_spec("webdataset"))
        cases = [f"{kind}, {name}" for kind in ("copy", "png", "jpeg") for name in libraries]
        seconds = interleave(cases, rounds, turn, progress)
    rows = []
    for case, taken in seconds.items():
        rows.append({"name": case, "samples_per_s": len(paths) / median(taken)})
        if not case.endswith("gatdist"):
            ratio = ratio_of(seconds[case.replace("webdataset", "gatdist")], taken)
            rows[-1] |= ratio.named("gatdist_to_this")
    return rows


def _gatdist_pack(source: Path, dest: Path, kind: str, size: int) -> None:
    options: dict[str, Any] = {} if kind == "copy" else {"size": size, "format": kind}
    pack(str(source), str(dest), workers=1, **options)


def _shard_writer(source: Path, dest: Path, kind: str, size: int) -> None:
    """Pack as in webdataset's manual, with gatdist's settings of JPEG and PNG."""
    import webdataset

    options = {"png": {"compress_level": 1, "compress_type": zlib.Z_RLE}}
    options |= {"jpeg": {"quality": 95, "subsampling": 0}}
    dest.mkdir()
    with webdataset.ShardWriter(str(dest / "%06d.tar"), maxsize=256e6, verbose=0) as writer:
        for number, path in enumerate(sorted(source.iterdir())):
            content = path.read_bytes()
            if kind != "copy":
                file = io.BytesIO()
                with Image.open(path) as image:
                    made = image.resize((size, size), Image.Resampling.LANCZOS)
                    made.save(file, kind, **options[kind])
                content = file.getvalue()
            writer.write({"__key__": f"{number:08d}", "png" if kind == "png" else "jpg": content})


def table(found: Mapping[str, Any]) -> str:
    blocks = []
    for resolution, rows in groupby(found["cases"], key=lambda row: row["resolution"]):
        head = (f"{resolution} × {resolution}", "samples/s", "× limit", "")
        lines = [
            (
                row["reader"],
                number(row["samples_per_s"]),
                f"{row['ratio_to_limit']:.3f}",
                f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
            )
            for row in rows
        ]
        blocks.append(aligned([head, *lines]))
    first, used, huge = found["first_batch_s"], found["memory"], found["order"]
    notes = [
        f"first batch: {first['early']:.3f} s at the start of an epoch, {first['late']:.3f} s "
        f"late in it ({first['late_to_early']:.2f} ×)",
        f"memory: {size(max(used['bytes_by_epoch']))} in ten epochs under a limit of "
        f"{size(used['ceiling_bytes'])}, growth {used['growth']:+.1%}",
        f"order of {huge['num_samples']:,} samples: {size(huge['resident_bytes'])}",
    ]
    packed = [
        f"{row['name']} {row['samples_per_s']:.0f} images/s"
        + (f" (gatdist {row['gatdist_to_this']:.2f} ×)" if "gatdist_to_this" in row else "")
        for row in found["packing"]
    ]
    notes.append(f"packing: {'; '.join(packed)}")
    if found["skipped"]:
        notes.append(f"not installed: {', '.join(found['skipped'])}")
    return "\n\n".join([*blocks, "\n".join(notes)])


if __name__ == "__main__":
    main()

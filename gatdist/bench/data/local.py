"""``gatdist bench data``: reading from this machine, beside other readers and what is possible."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gatdist.bench.data import images
from gatdist.bench.data.readers import BATCH, LIMITS, OURS, PEERS, Reader, open_loader
from gatdist.bench.environment import environment
from gatdist.bench.processes import Report, together
from gatdist.bench.rounds import interleave, settled
from gatdist.common.errors import ConfigError, nearest
from gatdist.data import SampleOrder
from gatdist.data.order import cut_blocks, fitting_block_bytes, fitting_window
from gatdist.parallel.communicator import Communicator

RESOLUTIONS = (64, 256)
_LATE = 0.9
_EPOCHS = 10
# Each worker's ceiling in the measurement of memory: less than the pictures take.
_CEILING_BYTES = 128 * 2**20
_HUGE_SHARDS, _HUGE_SAMPLES, _HUGE_BYTES = 10_000, 10_000, 300_000_000


def measure(
    resolutions: Sequence[int] = RESOLUTIONS,
    cases: Sequence[str] = (),
    *,
    num_images: int = 10_000,
    rounds: int = 5,
    threads: int = 2,
    turn_s: float = 2.0,
    report: Report = lambda text: None,
) -> dict[str, Any]:
    """Read made-up pictures with every reader in turn.

    Args:
        resolutions: height = width of the pictures.
        cases: names of readers; none: all that are installed. The limits are measured in any case.
        num_images: at each resolution; they are made on first use, and kept.
        rounds: that count (≥ 1).
        threads: that decode, or processes, of each reader.
        turn_s: what a reader's turn in a round should take.
        report: gets lines of progress.

    Returns:
        JSON values. ``cases``: for each reader and resolution ``samples_per_s`` and
        ``ratio_to_limit`` (the median round, the lowest and the highest), the limit being the
        slower of reading alone and decoding alone in the same round. ``first_batch_s``: of ours, at
        the beginning of an epoch and late in it. ``memory``: of a process that reads ten epochs.
        ``order``: what the order of 100 million samples takes. ``skipped``: what is not installed.

    Raises:
        ConfigError: an unknown name, or a number that is not above 0.
    """
    for option, value in (("--rounds", rounds), ("--threads", threads), ("--num", num_images)):
        if value < 1:
            raise ConfigError(option, "must be above 0", value=value)
    known = [*LIMITS, *OURS, *PEERS]
    for name in cases:
        if name not in known:
            raise ConfigError("--case", f"not known{nearest(name, known)}", value=name)
    chosen = [name for name in known if not cases or name in cases or name in LIMITS]
    skipped = [n for n in chosen if n in PEERS and not importlib.util.find_spec(PEERS[n][0])]
    readers = {name: _reader(name) for name in chosen if name not in skipped}
    rows = []
    for resolution in resolutions:
        report(f"pictures of {resolution} × {resolution}")
        folder = images.folder(num_images, resolution, max(1, num_images // 1000))
        rows += _compare(folder, resolution, readers, rounds, threads, turn_s, report)
    folder = images.folder(num_images, resolutions[-1], max(1, num_images // 1000))
    report("the first batch, early and late in an epoch")
    first = _first_batches(folder, rounds, threads)
    report("ten epochs")
    (memory,) = together(1, _memory, str(folder), num_images, report=report, silence_s=1800)
    report("the order of 100 million samples")
    (order,) = together(1, _order, report=report)
    return {
        "cases": rows,
        "first_batch_s": first,
        "memory": memory,
        "order": order,
        "num_pictures": num_images,
        "skipped": skipped,
        "environment": environment(threads),
    }


def _reader(name: str) -> Reader:
    return LIMITS.get(name) or OURS.get(name) or PEERS[name][1]


def _compare(
    folder: Path,
    resolution: int,
    readers: Mapping[str, Reader],
    rounds: int,
    threads: int,
    turn_s: float,
    report: Report,
) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        batches = {name: reader(folder, threads, stack) for name, reader in readers.items()}
        counts = {name: _batches_in(iterator, turn_s) for name, iterator in batches.items()}

        def turn(name: str) -> float:
            # What was read ahead while others had their turn is not counted.
            _take(batches[name], max(8, counts[name] // 8))
            began = time.perf_counter()
            _take(batches[name], counts[name])
            return time.perf_counter() - began

        with settled():
            seconds = interleave(list(batches), rounds, turn, report)
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


def _batches_in(iterator: Iterator[Any], turn_s: float) -> int:
    """How many batches take about so long."""
    _take(iterator, 8)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < turn_s / 2:
        _take(iterator, 4)
        count += 4
    return max(4, round(count * turn_s / (time.perf_counter() - began)))


def _take(iterator: Iterator[Any], count: int) -> None:
    for _ in itertools.islice(iterator, count):
        pass


def _first_batches(folder: Path, rounds: int, threads: int) -> dict[str, float]:
    num = sum(n for n, _ in open_loader_sizes(folder))
    places = {"early": 0, "late": round(_LATE * num)}

    def turn(name: str) -> float:
        began = time.perf_counter()
        with open_loader(str(folder), threads, position=places[name]) as loader:
            next(loader)
            return time.perf_counter() - began

    seconds = interleave(list(places), rounds, turn, lambda text: None)
    found = {name: median(taken) for name, taken in seconds.items()}
    ratios = [late / early for late, early in zip(seconds["late"], seconds["early"], strict=True)]
    return found | {"late_to_early": median(ratios)}


def open_loader_sizes(folder: Path) -> list[tuple[int, int]]:
    """Samples and bytes of each shard."""
    from gatdist.config import DataConfig
    from gatdist.data import open_dataset

    return open_dataset(DataConfig(url=str(folder))).shard_sizes


def _memory(comm: Communicator, report: Report, folder: str, num: int) -> dict[str, Any]:
    """What a process takes that reads ten epochs, sampled at the end of each."""
    before = _resident_bytes()
    epochs = []
    with open_loader(
        folder, 1, memory_bytes=_CEILING_BYTES, shuffle_window_samples=8, interleave=16
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
        "ceiling_bytes": _CEILING_BYTES,
        "bytes_by_epoch": epochs,
        "growth": max(epochs[1:]) / epochs[1] - 1,
    }


def _order(comm: Communicator, report: Report) -> dict[str, Any]:
    """What the order of a hundred million samples takes in a worker."""
    before = _resident_bytes()
    shards = [(_HUGE_SAMPLES, _HUGE_BYTES)] * _HUGE_SHARDS
    lanes = 1024
    window = fitting_window(shards, lanes)
    block_bytes = fitting_block_bytes(shards, 4 * 2**20, lanes)
    order = SampleOrder(cut_blocks(shards, block_bytes), seed=0, lanes=lanes, window=window)
    began = time.perf_counter()
    order.indices(np.arange(10**7, 10**7 + 4096))
    return {
        "num_samples": order.num_samples,
        "resident_bytes": _resident_bytes() - before,
        "first_4096_s": time.perf_counter() - began,
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

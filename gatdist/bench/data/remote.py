"""``gatdist bench storage``: reading from object storage far away, on good days and bad ones."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

from gatdist.bench.data import images
from gatdist.bench.data.readers import BATCH, bare_decode, open_loader
from gatdist.bench.data.servers import moto, nginx, nginx_program
from gatdist.bench.environment import environment
from gatdist.bench.processes import Report, together
from gatdist.bench.proxy import Fault, proxy_process
from gatdist.bench.rounds import compare, interleave
from gatdist.common.errors import ConfigError
from gatdist.parallel.communicator import Communicator
from gatdist.storage import Store

# Object storage in the same region, as one connection sees it.
LATENCY_S, BYTES_PER_S = 0.03, 100e6
_RESOLUTION, _FEWEST_SHARDS, _SHARD_IMAGES = 256, 8, 1_000
_RANGE_BYTES, _MOST_RANGES = 4 * 2**20, 64
_CONCURRENCY = (1, 4, 16)
# One request in a hundred fails, the first time, in one of these ways.
FAULTS = [
    Fault("refuse", path="*.tar", rate=0.0025),
    Fault("reset", path="*.tar", rate=0.005),
    Fault("short", path="*.tar", rate=0.0075),
    Fault("flip_bit", path="*.tar", rate=0.01),
]


def measure(
    url: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    num_images: int = 2_000,
    rounds: int = 5,
    threads: int = 1,
    report: Report = lambda text: None,
) -> dict[str, Any]:
    """Read made-up pictures from storage.

    Args:
        url: a folder to write them to; None: a server of S3 objects on this machine, 30 ms away and
            with 100 MB/s a connection: nginx where it is installed, which takes next to no time
            from what is measured, else moto.
        options: of the storage.
        num_images: of 256 × 256, about 30 KB each. Of few, much of the time is the first fetch.
        rounds: that count (≥ 1).
        threads: that decode (≥ 1). A server on this machine needs a core that is left over.
        report: gets lines of progress.

    Returns:
        JSON values. ``ranges``: bytes a second of (64) ranges of 4 MiB by concurrency, and
        ``first_byte_s``. ``cases``: ``samples_per_s`` and ``ratio_to_limit`` of a first epoch, the
        limit being the slower of the fastest of these ranges and of decoding alone, with the lowest
        and the highest round; with ``bytes_ratio``, what was fetched over what there is. With the
        server of this machine also ``faults``: one request in a hundred fails. ``cache``: two and
        four processes that share a cache.

    Raises:
        ConfigError: a number is not above 0.
        UserError: there is no server to start.
        StorageError: the URL can't be used.
    """
    for option, value in (("--rounds", rounds), ("--num", num_images), ("--threads", threads)):
        if value < 1:
            raise ConfigError(option, "must be above 0", value=value)
    report("pictures")
    num_shards = max(_FEWEST_SHARDS, num_images // _SHARD_IMAGES)
    folder = images.folder(num_images, _RESOLUTION, num_shards)
    if url is not None:
        _upload(folder, Store(url, options), report)
        place = _Place(url, dict(options or {}), None, folder, num_images)
        return _measure(place, rounds, threads, report)
    with (nginx if nginx_program() else moto)(folder.parent) as address:
        url = f"s3://{folder.parent.name}/{folder.name}"
        _upload(folder, Store(url, _s3(address)), report)
        slow = partial(proxy_process, address, latency_s=LATENCY_S, bytes_per_s=BYTES_PER_S)
        with slow() as clean, slow(faults=FAULTS) as faulty:
            place = _Place(url, _s3(clean.url), _s3(faulty.url), folder, num_images)
            return _measure(place, rounds, threads, report)


@dataclass(frozen=True)
class _Place:
    """Where pictures are read from.

    Attributes:
        url: of their shards.
        options: of the storage.
        faulty: of the same storage where requests fail, if there is such a thing.
        folder: the same shards on this machine.
        num: of pictures.
    """

    url: str
    options: dict[str, Any]
    faulty: dict[str, Any] | None
    folder: Path
    num: int

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each shard."""
        return {path.name: path.stat().st_size for path in self.folder.glob("*.tar")}

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(self.sizes.values())

    @cached_property
    def ranges(self) -> list[tuple[str, int, int]]:
        """Name, begin and end of the shards' first ranges."""
        every = (
            (name, begin, min(begin + _RANGE_BYTES, size))
            for name, size in sorted(self.sizes.items())
            for begin in range(0, size, _RANGE_BYTES)
        )
        return list(itertools.islice(every, _MOST_RANGES))

    @property
    def epochs(self) -> dict[str, dict[str, Any]]:
        """The cases whose turn is an epoch, and the options that each reads with."""
        return {"cold": self.options} | ({"faults": self.faulty} if self.faulty else {})


def _measure(place: _Place, rounds: int, threads: int, report: Report) -> dict[str, Any]:
    seconds, epochs = _take_turns(place, rounds, threads, report)
    counted = {name: found[1:] for name, found in epochs.items()}  # without the first round
    share = sum(end - begin for _, begin, end in place.ranges) / place.num_bytes
    reads = [min(s) for s in zip(*(seconds[f"ranges {n}"] for n in _CONCURRENCY), strict=True)]
    limits = [max(r / share, d) for r, d in zip(reads, seconds["decode"], strict=True)]
    found: dict[str, Any] = {
        "url": place.url,
        "first_byte_s": median(seconds["first byte"]),
        "ranges": [
            {
                "concurrency": n,
                "bytes_per_s": share * place.num_bytes / median(seconds[f"ranges {n}"]),
            }
            for n in _CONCURRENCY
        ],
        "decode_samples_per_s": place.num / median(seconds["decode"]),
        "cases": [_row(name, counted[name], limits, place.num_bytes) for name in place.epochs],
    }
    if place.faulty:
        clean = compare(*([e["seconds"] for e in counted[n]] for n in ("faults", "cold")))
        digests = {epoch["digest"] for name in epochs for epoch in epochs[name]}
        found["cases"][1] |= {
            "ratio_to_clean": clean.median,
            "clean_low": clean.low,
            "clean_high": clean.high,
        }
        found["same_sequence"] = len(digests) == 1
    found["cache"] = [_shared_cache(place, ranks, report) for ranks in (2, 4)]
    return found | {"num_pictures": place.num, "environment": environment(threads)}


def _take_turns(
    place: _Place, rounds: int, threads: int, report: Report
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, Any]]]]:
    """Seconds of each case and round that counts, and what all epochs delivered."""
    store = Store(place.url, place.options)
    epochs: dict[str, list[dict[str, Any]]] = {name: [] for name in place.epochs}

    def turn(name: str) -> float:
        began = time.perf_counter()
        if name.startswith("ranges"):
            store.read_ranges(place.ranges, concurrency=int(name.split()[1]))
        elif name == "first byte":
            store.read_ranges([(place.ranges[0][0], 0, 1)])
        elif name == "decode":
            for _ in itertools.islice(decoded, place.num // BATCH):
                pass
        else:
            epochs[name].append(_epoch(place.url, place.epochs[name], place.num, threads))
        return time.perf_counter() - began

    names = ["first byte", *(f"ranges {n}" for n in _CONCURRENCY), "decode", *place.epochs]
    with ExitStack() as stack:
        decoded = bare_decode(place.folder, threads, stack)
        next(decoded)
        seconds = interleave(names, rounds, turn, report)
    return seconds, epochs


def _row(
    name: str, epochs: Sequence[Mapping[str, Any]], limits: Sequence[float], num_bytes: int
) -> dict[str, Any]:
    ratio = compare([epoch["seconds"] for epoch in epochs], limits)
    return {
        "reader": "gatdist",
        "case": name,
        "resolution": _RESOLUTION,
        "samples_per_s": median(epoch["samples"] / epoch["seconds"] for epoch in epochs),
        "ratio_to_limit": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "bytes_ratio": median(epoch["bytes"] / num_bytes for epoch in epochs),
    }


def _epoch(url: str, options: Mapping[str, Any], num: int, threads: int) -> dict[str, Any]:
    """Read one epoch from its beginning: how long it took, and what came."""
    began = time.perf_counter()
    digest, samples = hashlib.sha256(), 0
    with open_loader(
        url, threads, storage_options=dict(options), memory_bytes=_memory(num)
    ) as loader:
        for batch in itertools.islice(loader, num // BATCH):
            # Enough to know the pictures by; all of it would take as long as a tenth of an epoch.
            digest.update(batch.samples[:, ::8, ::8].numpy().tobytes())
            samples += len(batch.samples)
        seconds = time.perf_counter() - began
        fetched = loader.take_counts()["data/bytes_fetched"]
    return {
        "seconds": seconds,
        "samples": samples,
        "bytes": fetched,
        "digest": digest.hexdigest(),
    }


def _memory(num: int) -> int:
    """Enough for the windows, and for all of a small data set."""
    return max(2**28, 64_000 * num)


def _shared_cache(place: _Place, ranks: int, report: Report) -> dict[str, Any]:
    """Bytes that several processes with one cache fetch in an epoch, over those that there are."""
    report(f"{ranks} processes with one cache")
    with tempfile.TemporaryDirectory() as folder:
        work = place.url, place.options, place.num, folder
        message = together(ranks, _reads_its_share, *work, report=report)
    seconds = max(one["seconds"] for one in message)
    return {
        "ranks": ranks,
        "bytes_ratio": sum(one["bytes"] for one in message) / place.num_bytes,
        "samples_per_s": sum(one["samples"] for one in message) / seconds,
    }


def _reads_its_share(
    comm: Communicator, report: Report, url: str, options: dict[str, Any], num: int, folder: str
) -> dict[str, Any]:
    began, samples = time.perf_counter(), 0
    with open_loader(
        url,
        1,
        rank=comm.rank,
        world_size=comm.world_size,
        storage_options=options,
        cache_dir=folder,
        memory_bytes=_memory(num),
    ) as loader:
        for batch in itertools.islice(loader, num // (BATCH * comm.world_size)):
            samples += len(batch.samples)
        counts = loader.take_counts()
    seconds = time.perf_counter() - began
    return {"samples": samples, "seconds": seconds, "bytes": counts["data/bytes_fetched"]}


def _upload(folder: Path, store: Store, report: Report) -> None:
    if store.exists("manifest.json"):
        return
    report(f"uploading to {store.url}")
    for path in sorted(folder.iterdir(), key=lambda p: p.name == "manifest.json"):
        if path.is_file():
            store.publish_file(path.name, path)


def _s3(address: str) -> dict[str, Any]:
    return {"key": "bench", "secret": "bench", "client_kwargs": {"endpoint_url": address}}

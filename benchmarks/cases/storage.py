"""Reading images from object storage with latency and faults: epochs, ranges, a shared cache.

The upper bound of an epoch is the slower of the fastest range reads and of decoding alone.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import parser, positive, progress, save
from benchmarks.proxy import Fault, proxy_process
from benchmarks.readers import BATCH, bare_decode, image_folder, open_loader
from benchmarks.servers import nginx
from gatdist.bench.processes import Report, together
from gatdist.bench.rounds import compare, interleave
from gatdist.cli import common
from gatdist.monitor.numbers import aligned, number, size
from gatdist.parallel.communicator import Communicator
from gatdist.storage import Store

# Object storage in the same region, per connection.
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


def main(argv: Sequence[str] | None = None) -> None:
    add = (arguments := parser("storage", __doc__)).add_argument
    add("--url", help="a folder to write to (default: a slow S3 server on this machine)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="storage option of --url")
    add("--num", type=positive, default=2_000, help="images of 256 × 256 (default: 2,000)")
    add("--rounds", type=positive, default=5)
    add("--threads", type=positive, default=1, help="decoding threads; the server needs a core")
    given = arguments.parse_args(argv)
    shards = max(_FEWEST_SHARDS, given.num // _SHARD_IMAGES)
    folder = image_folder(given.num, _RESOLUTION, shards)
    with ExitStack() as stack:
        if given.url:
            place = Place(
                given.url, common.storage_options(given, "--set"), None, folder, given.num
            )
            _upload(folder, Store(place.url, place.options))
        else:
            address = stack.enter_context(nginx(folder.parent))
            url = f"s3://{folder.parent.name}/{folder.name}"
            slow = partial(proxy_process, address, latency_s=LATENCY_S, bytes_per_s=BYTES_PER_S)
            clean, faulty = (stack.enter_context(slow(faults=f)) for f in ([], FAULTS))
            place = Place(url, _s3(clean.url), _s3(faulty.url), folder, given.num)
        result = measure(place, given.rounds, given.threads)
    save(given.out, result, threads=given.threads)
    print(table(result))


@dataclass(frozen=True)
class Place:
    """Where images are read from; ``folder`` has the same shards on this machine."""

    url: str
    options: dict[str, Any]
    faulty: dict[str, Any] | None
    folder: Path
    num: int

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.folder.glob("*.tar")}

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    @cached_property
    def ranges(self) -> list[tuple[str, int, int]]:
        every = (
            (name, begin, min(begin + _RANGE_BYTES, length))
            for name, length in sorted(self.sizes.items())
            for begin in range(0, length, _RANGE_BYTES)
        )
        return list(islice(every, _MOST_RANGES))

    @property
    def epochs(self) -> dict[str, dict[str, Any]]:
        return {"cold": self.options} | ({"faults": self.faulty} if self.faulty else {})


def measure(place: Place, rounds: int, threads: int) -> dict[str, Any]:
    seconds, epochs = take_turns(place, rounds, threads)
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
        found["cases"][1] |= clean.named("ratio_to_clean", "clean")
        digests = {epoch["digest"] for name in epochs for epoch in epochs[name]}
        found["same_sequence"] = len(digests) == 1
    found["cache"] = [_shared_cache(place, ranks) for ranks in (2, 4)]
    return found | {"num_images": place.num}


def take_turns(
    place: Place, rounds: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, Any]]]]:
    store = Store(place.url, place.options)
    epochs: dict[str, list[dict[str, Any]]] = {name: [] for name in place.epochs}

    def turn(name: str) -> float:
        began = time.perf_counter()
        if name.startswith("ranges"):
            store.read_ranges(place.ranges, concurrency=int(name.split()[1]))
        elif name == "first byte":
            store.read_ranges([(place.ranges[0][0], 0, 1)])
        elif name == "decode":
            for _ in islice(decoded, place.num // BATCH):
                pass
        else:
            options = {"storage_options": place.epochs[name]}
            epochs[name].append(_read(place, place.num, threads, **options))
        return time.perf_counter() - began

    names = ["first byte", *(f"ranges {n}" for n in _CONCURRENCY), "decode", *place.epochs]
    with ExitStack() as stack:
        decoded = bare_decode(place.folder, threads, stack)
        next(decoded)
        seconds = interleave(names, rounds, turn, progress)
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
        **ratio.named("ratio_to_limit", "ratio"),
        "bytes_ratio": median(epoch["bytes"] / num_bytes for epoch in epochs),
    }


def _read(place: Place, num: int, threads: int, **data: Any) -> dict[str, Any]:
    began = time.perf_counter()
    digest, samples = hashlib.sha256(), 0
    # Enough memory for the windows, and for all of a small data set.
    memory_bytes = max(2**28, 64_000 * place.num)
    with open_loader(place.url, threads, memory_bytes=memory_bytes, **data) as loader:
        for batch in islice(loader, num // BATCH):
            # A part of the pixels: hashing all of them would take a tenth of an epoch.
            digest.update(batch.samples[:, ::8, ::8].numpy().tobytes())
            samples += len(batch.samples)
        seconds = time.perf_counter() - began
        fetched = loader.take_counts()["data/bytes_fetched"]
    found = {"seconds": seconds, "samples": samples, "bytes": fetched}
    return found | {"digest": digest.hexdigest()}


def _shared_cache(place: Place, ranks: int) -> dict[str, Any]:
    """Bytes that processes with one cache fetch in an epoch, relative to the data set."""
    progress(f"{ranks} processes with one cache")
    with tempfile.TemporaryDirectory() as folder:
        found = together(ranks, _member, place, folder, report=progress)
    return {
        "ranks": ranks,
        "bytes_ratio": sum(one["bytes"] for one in found) / place.num_bytes,
        "samples_per_s": sum(one["samples"] for one in found) / max(o["seconds"] for o in found),
    }


def _member(comm: Communicator, report: Report, place: Place, folder: str) -> dict[str, Any]:
    workers = {"rank": comm.rank, "world_size": comm.world_size}
    options = {"storage_options": place.options, "cache_dir": folder}
    return _read(place, place.num // comm.world_size, 1, **workers, **options)


def _upload(folder: Path, store: Store) -> None:
    if store.exists("manifest.json"):
        return
    progress(f"uploading to {store.url}")
    for path in sorted(folder.iterdir(), key=lambda p: p.name == "manifest.json"):
        if path.is_file():
            store.publish_file(path.name, path)


def _s3(address: str) -> dict[str, Any]:
    return {"key": "bench", "secret": "bench", "client_kwargs": {"endpoint_url": address}}


def table(found: Mapping[str, Any]) -> str:
    ranges = [
        (f"{row['concurrency']} concurrent ranges", f"{size(row['bytes_per_s'])}/s")
        for row in found["ranges"]
    ]
    rows = [
        (
            row.get("case") or f"{row['ranks']} ranks, one cache",
            number(row["samples_per_s"]),
            f"{row['ratio_to_limit']:.3f}" if "case" in row else "",
            f"{row['bytes_ratio']:.3f}",
        )
        for row in (*found["cases"], *found["cache"])
    ]
    notes = [
        f"first byte after {found['first_byte_s'] * 1e3:.0f} ms; decoding alone "
        f"{number(found['decode_samples_per_s'])} samples/s"
    ]
    for row in found["cases"]:
        if "ratio_to_clean" in row:
            same = "the same samples" if found["same_sequence"] else "OTHER SAMPLES"
            notes.append(f"with 1 % faults: {row['ratio_to_clean']:.2f} × the speed, {same}")
    return "\n\n".join(
        [
            aligned([(found["url"], ""), *ranges]),
            aligned([("first epoch", "samples/s", "× limit", "× bytes"), *rows]),
            "\n".join(notes),
        ]
    )


if __name__ == "__main__":
    main()

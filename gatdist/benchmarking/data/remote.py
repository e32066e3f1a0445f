"""``gatdist bench storage``: reading from object storage far away, on good days and bad ones."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import HTTPError

from gatdist.benchmarking.data import pictures
from gatdist.benchmarking.data.readers import BATCH, bare_decode, open_loader
from gatdist.benchmarking.facts import environment
from gatdist.benchmarking.processes import Tell, together
from gatdist.benchmarking.proxy import Fault, proxy_process
from gatdist.benchmarking.rounds import compare, interleave
from gatdist.errors import ConfigError, UserError
from gatdist.parallel.communicator import Communicator
from gatdist.storage import Store

# Object storage in the same region, as one connection sees it.
LATENCY_S, BYTES_PER_S = 0.03, 100e6
_RESOLUTION, _FEWEST_SHARDS, _SHARD_PICTURES = 256, 8, 1_000
_RANGE_BYTES, _MOST_RANGES = 4 * 2**20, 64
_CONCURRENCY = (1, 4, 16)
_START_S = 30.0
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
    num_pictures: int = 2_000,
    rounds: int = 5,
    threads: int = 1,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Read made-up pictures from storage.

    Args:
        url: a folder to write them to; None: a server of S3 objects on this machine, 30 ms away and
            with 100 MB/s a connection: nginx where it is installed, which takes next to no time
            from what is measured, else moto.
        options: of the storage.
        num_pictures: of 256 × 256, about 30 KB each. Of few, much of the time is the first fetch.
        rounds: that count (≥ 1).
        threads: that decode (≥ 1). A server on this machine needs a core that is left over.
        tell: gets lines of progress.

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
    for option, value in (("--rounds", rounds), ("--num", num_pictures), ("--threads", threads)):
        if value < 1:
            raise ConfigError(option, "must be above 0", value=value)
    tell("pictures")
    num_shards = max(_FEWEST_SHARDS, num_pictures // _SHARD_PICTURES)
    folder = pictures.folder(num_pictures, _RESOLUTION, num_shards)
    if url is not None:
        _upload(folder, Store(url, options), tell)
        there = dict(options or {})
        return _measure(url, there, None, folder, num_pictures, rounds, threads, tell)
    with (nginx if nginx_program() else moto)(folder.parent) as address:
        url = f"s3://{folder.parent.name}/{folder.name}"
        _upload(folder, Store(url, _s3(address)), tell)
        slow = partial(proxy_process, address, latency_s=LATENCY_S, bytes_per_s=BYTES_PER_S)
        with slow() as clean, slow(faults=FAULTS) as faulty:
            both = _s3(clean.url), _s3(faulty.url)
            return _measure(url, *both, folder, num_pictures, rounds, threads, tell)


def _measure(
    url: str,
    options: dict[str, Any],
    faulty: dict[str, Any] | None,
    folder: Path,
    num: int,
    rounds: int,
    threads: int,
    tell: Tell,
) -> dict[str, Any]:
    store = Store(url, options)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
    num_bytes = sum(sizes.values())
    ranges = _ranges(sizes)
    share = sum(end - begin for _, begin, end in ranges) / num_bytes
    epochs: dict[str, list[dict[str, Any]]] = {"cold": [], "faults": []}

    def turn(name: str) -> float:
        began = time.perf_counter()
        if name.startswith("ranges"):
            store.read_ranges(ranges, concurrency=int(name.split()[1]))
        elif name == "first byte":
            store.read_ranges([(ranges[0][0], 0, 1)])
        elif name == "decode":
            for _ in itertools.islice(decoded, num // BATCH):
                pass
        else:
            there = options if name == "cold" or faulty is None else faulty
            epochs[name].append(_epoch(url, there, num, threads))
        return time.perf_counter() - began

    names = ["first byte", *(f"ranges {n}" for n in _CONCURRENCY), "cold"]
    names += ["decode", "faults"] if faulty else ["decode"]
    with ExitStack() as stack:
        decoded = bare_decode(folder, threads, stack)
        next(decoded)
        seconds = interleave(names, rounds, turn, tell)
    reads = [min(s) for s in zip(*(seconds[f"ranges {n}"] for n in _CONCURRENCY), strict=True)]
    limits = [max(r / share, d) for r, d in zip(reads, seconds["decode"], strict=True)]

    def row(name: str) -> dict[str, Any]:
        counted = epochs[name][1:]  # without the first round
        ratio = compare([epoch["seconds"] for epoch in counted], limits)
        return {
            "reader": "gatdist",
            "case": name,
            "resolution": _RESOLUTION,
            "samples_per_s": median(epoch["samples"] / epoch["seconds"] for epoch in counted),
            "ratio_to_limit": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "bytes_ratio": median(epoch["bytes"] / num_bytes for epoch in counted),
        }

    found: dict[str, Any] = {
        "url": url,
        "first_byte_s": median(seconds["first byte"]),
        "ranges": [
            {"concurrency": n, "bytes_per_s": share * num_bytes / median(seconds[f"ranges {n}"])}
            for n in _CONCURRENCY
        ],
        "decode_samples_per_s": num / median(seconds["decode"]),
        "cases": [row("cold")],
    }
    if faulty:
        bad = row("faults")
        clean = compare(*([e["seconds"] for e in epochs[n][1:]] for n in ("faults", "cold")))
        digests = {epoch["digest"] for name in epochs for epoch in epochs[name]}
        bad |= {"ratio_to_clean": clean.median, "clean_low": clean.low, "clean_high": clean.high}
        found["cases"].append(bad)
        found["same_sequence"] = len(digests) == 1
    found["cache"] = [_shared_cache(url, options, num, n, num_bytes, tell) for n in (2, 4)]
    return found | {"num_pictures": num, "environment": environment(threads)}


def _ranges(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Name, begin and end of the first ranges of shards, whose sizes are given."""
    every = (
        (name, begin, min(begin + _RANGE_BYTES, size))
        for name, size in sorted(sizes.items())
        for begin in range(0, size, _RANGE_BYTES)
    )
    return list(itertools.islice(every, _MOST_RANGES))


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


def _shared_cache(
    url: str, options: dict[str, Any], num: int, ranks: int, num_bytes: int, tell: Tell
) -> dict[str, Any]:
    """Bytes that several processes with one cache fetch in an epoch, over those that there are."""
    tell(f"{ranks} processes with one cache")
    with tempfile.TemporaryDirectory() as folder:
        told = together(ranks, _reads_its_share, url, options, num, folder, tell=tell)
    seconds = max(one["seconds"] for one in told)
    return {
        "ranks": ranks,
        "bytes_ratio": sum(one["bytes"] for one in told) / num_bytes,
        "samples_per_s": sum(one["samples"] for one in told) / seconds,
    }


def _reads_its_share(
    comm: Communicator, tell: Tell, url: str, options: dict[str, Any], num: int, folder: str
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


def _upload(folder: Path, store: Store, tell: Tell) -> None:
    if store.exists("manifest.json"):
        return
    tell(f"uploading to {store.url}")
    for path in sorted(folder.iterdir(), key=lambda p: p.name == "manifest.json"):
        if path.is_file():
            store.publish_file(path.name, path)


def _s3(address: str) -> dict[str, Any]:
    return {"key": "bench", "secret": "bench", "client_kwargs": {"endpoint_url": address}}


@contextmanager
def moto(root: Path) -> Iterator[str]:
    """Moto's S3 in a process of its own, with an empty bucket of the folder's name; its address.

    Raises:
        UserError: it is not installed, or does not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _server(command, port, "/moto-api/") as address:
        request = urllib.request.Request(f"{address}/{root.name}", method="PUT")
        urllib.request.urlopen(request).close()
        yield address


@contextmanager
def nginx(root: Path) -> Iterator[str]:
    """What is in the folder, as a bucket of its name that can only be read; the address.

    To read an object is to ask for a file, with or without a range: nginx needs to know no more of
    S3 than that, and what it takes of this machine's time is hardly to be seen.

    Raises:
        UserError: it does not start.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as name:
        own = Path(name)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        (own / "conf").write_text(
            # Where root runs it, its workers would be of a user who may not read the folder.
            f"{'user root;' * (os.geteuid() == 0)} daemon off; pid {own}/pid; events {{}} http {{ "
            + "".join(f"{kind}_temp_path {own}/temporary; " for kind in kinds)
            + f"access_log off; sendfile on; keepalive_requests 1000000; server {{ "
            f"listen 127.0.0.1:{port}; location /{root.name}/ {{ alias {root}/; }} }} }}"
        )
        program = nginx_program()
        assert program
        command = [program, "-e", f"{own}/errors", "-p", name, "-c", f"{own}/conf"]
        with _server(command, port) as address:
            yield address


def nginx_program() -> str | None:
    """Where nginx is, if it is; Debian keeps it where only root looks."""
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _server(command: Sequence[str], port: int, path: str = "/") -> Iterator[str]:
    """A server in a process of its own, once it answers at ``path``; its address."""
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + _START_S
            while not _answers(address + path):
                if process.poll() is not None or time.monotonic() > deadline:
                    rule = "there is no S3 server to start"
                    mend = "Name a folder, such as s3://bucket/bench, or install moto[server]"
                    raise UserError("--url", rule, mend=mend)
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True

"""``gatdist bench`` and ``gatdist simulate``."""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gatdist.cli import common
from gatdist.common.errors import (
    ClusterError,
    ConfigError,
    GatdistError,
    InterruptedRunError,
    StorageError,
)

if TYPE_CHECKING:
    from gatdist.config import Config
    from gatdist.storage import Store


def add(commands: Any) -> None:
    """Add the commands."""
    text = "measure how fast this machine is"
    bench = commands.add_parser("bench", help=text, description=f"{text[0].upper()}{text[1:]}.")
    what = bench.add_subparsers(title="what to measure", required=True, metavar="WHAT")

    text = "compare a training step with reference implementations"
    sub = common.add_command(what, "step", _step, text)
    text = "such as dcgan64_w32 or r3gan32 (default: the usual ones)"
    common.add_repeated(sub, "--size", "NAME", text)
    _add_rounds(sub, 7)
    common.add_repeated(sub, "--case", "NAME", "such as one_stage or lightning (default: all)")
    sub.add_argument(
        "--two-processes", action="store_true", help="also measure two communicating processes"
    )
    sub.add_argument("--threads", type=int, default=1, metavar="N", help="per process (default: 1)")

    _add_scaling(what)

    text = "predict time, failures and cost of training on many workers"
    sub = common.add_command(commands, "simulate", _simulate, text)
    text = "a .toml file, or the name of a scenario that comes with gatdist"
    sub.add_argument("scenario", metavar="SCENARIO", help=text)
    common.add_overrides(sub, "override a key, such as predict.workers=[8,16]")
    text = "a folder for result.json and, with matplotlib, simulation.svg and simulation.png"
    sub.add_argument("--out", metavar="URL", help=text)


def _add_scaling(what: Any) -> None:
    text = "measure training on increasing numbers of workers"
    sub = common.add_command(what, "scaling", _scaling, text)
    sub.add_argument(
        "--workers", required=True, metavar="N,N,…", help="numbers of workers, such as 1,2,4"
    )
    sub.add_argument(
        "--address",
        default="",
        metavar="RAY",
        help="a running Ray cluster, such as auto or HOST:PORT (default: this machine)",
    )
    common.add_repeated(sub, "--size", "NAME", "as in bench step (default: dcgan64_w32)")
    _add_rounds(sub, 5)
    sub.add_argument(
        "--rule", default="alternating", metavar="NAME", help="such as one_stage, as in bench step"
    )
    sub.add_argument(
        "--mode",
        default="strong,weak",
        metavar="MODES",
        help="strong: the workers share one batch; weak: each has its own (default: both)",
    )
    text = "samples of that batch (default: the size's)"
    sub.add_argument("--batch", type=int, metavar="N", help=text)
    sub.add_argument(
        "--quality",
        metavar="PRESET_OR_FILE",
        help="also train it on each number of workers, and report its metrics",
    )
    sub.add_argument(
        "--run-dir",
        metavar="URL",
        help="a folder that all hosts reach, for runs on several hosts (they are kept there)",
    )
    sub.add_argument("--out", metavar="FOLDER", help="write result.json, scaling.svg, scaling.png")


def _add_rounds(sub: common.Parser, default: int) -> None:
    text = f"turns of each case (default: {default}); more make the median more accurate"
    sub.add_argument("--rounds", type=int, default=default, metavar="N", help=text)


def _step(arguments: argparse.Namespace) -> None:
    from gatdist.bench.step import measure, table

    found = measure(
        arguments.size,
        arguments.case,
        rounds=arguments.rounds,
        threads=arguments.threads,
        two_processes=arguments.two_processes,
        report=common.log,
    )
    common.print_result(arguments, found, table)


def _simulate(arguments: argparse.Namespace) -> None:
    from gatdist.bench.simulate.report import draw, table
    from gatdist.bench.simulate.study import simulate

    out = _writable(arguments.out)
    found = simulate(arguments.scenario, arguments.set)
    if out:
        publish(found, draw, out)
    common.print_result(arguments, found, table)


def _scaling(arguments: argparse.Namespace) -> None:
    from gatdist.bench.scaling.measure import measure, plan
    from gatdist.bench.scaling.report import draw, table
    from gatdist.bench.scaling.runs import quality_config
    from gatdist.cluster.groups import groups, require_room_here

    counts = _counts(arguments.workers)
    if not arguments.address:
        require_room_here(max(counts))
    made = plan(
        counts,
        sizes=arguments.size,
        modes=arguments.mode.split(","),
        rule=arguments.rule,
        batch=arguments.batch,
        rounds=arguments.rounds,
    )
    configs = [
        quality_config(arguments.quality, workers, arguments.address)
        for workers in made.counts
        if arguments.quality
    ]
    out = _writable(arguments.out)
    with groups(arguments.address, made.counts[-1]) as group:
        found = measure(made, group.together)
    found |= {"recovery": None, "skipped": [], "rounds": made.rounds}
    _add_runs(found, made.counts[-1], configs, arguments)
    if out:
        publish(found, draw, out)
    common.print_result(arguments, found, table)


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError("--workers", "must be whole numbers above 0, such as 1,2,4", value=text)
    return [int(word) for word in words]


def _add_runs(
    found: dict[str, Any], workers: int, configs: list[Config], arguments: argparse.Namespace
) -> None:
    from gatdist.api import train
    from gatdist.bench.scaling.runs import measure_quality

    one_host = [host["host"] for host in found["hosts"]] == [socket.gethostname()]
    with _folder(arguments.run_dir, one_host) as url:
        if workers > 1:
            with _skipping(found, "recovery"):
                found["recovery"] = _recovery(url, workers, arguments.address)
        if configs:
            with _skipping(found, "quality"):
                quality = measure_quality(configs, _required(url), train, common.log)
                for point in found["points"]:
                    point["quality"] = quality[point["workers"]]


@contextmanager
def _skipping(found: dict[str, Any], what: str) -> Iterator[None]:
    """Note an error instead of raising it, so that earlier results are kept."""
    try:
        yield
    except InterruptedRunError:
        raise
    except GatdistError as error:
        found["skipped"].append({"what": what, "reason": str(error)})


def _recovery(url: str | None, workers: int, address: str) -> dict[str, Any]:
    from gatdist.api import train
    from gatdist.bench.scaling.runs import time_to_recover
    from gatdist.storage import Store

    store = Store(_required(url)).child("recovery")
    if not store.is_local:
        rule = "must be a path for the recovery time, which is measured by files on all hosts"
        raise ClusterError("--run-dir", rule, value=url)
    folder = store.local_path()
    folder.mkdir(parents=True)
    common.log(f"recovery: a run of {workers} workers, one of which is killed")
    return time_to_recover(workers, address, folder, train)


def _required(url: str | None) -> str:
    if url is None:
        hint = "Name a folder that all hosts reach"
        raise ClusterError("--run-dir", "is required on several hosts", hint=hint)
    return url


@contextmanager
def _folder(run_dir: str | None, one_host: bool) -> Iterator[str | None]:
    from gatdist.storage.urls import absolute

    if run_dir is not None:
        yield f"{absolute(run_dir).rstrip('/')}/scaling-{uuid.uuid4().hex[:8]}"
    elif one_host:
        with tempfile.TemporaryDirectory(prefix="gatdist-scaling-") as folder:
            yield folder
    else:
        yield None


def _writable(folder: str | None) -> Store | None:
    """Check that files can be written to ``--out``, before any work is done."""
    if folder is None:
        return None
    from gatdist.storage import Store
    from gatdist.storage.urls import absolute

    store, name = Store(absolute(folder)), f".{uuid.uuid4().hex}"
    try:
        store.publish(name, b"")
        store.delete_files([name])
    except GatdistError as error:
        raise StorageError("--out", f"can't be written ({error})", value=folder) from None
    return store


def publish(
    found: dict[str, Any], draw: Callable[[Mapping[str, Any]], dict[str, bytes]], out: Store
) -> None:
    """Write ``result.json``, and the figures if matplotlib is installed."""
    files = {"result.json": (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()}
    try:
        files |= draw(found)
    except ImportError as error:
        common.log(f"no plot ({error}): pip install 'gatdist[bench]', or matplotlib alone")
    for name, content in files.items():
        out.publish(name, content)
        common.log(f"wrote {out.url}/{name}")

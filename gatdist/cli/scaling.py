"""``gatdist bench scaling``: brings together who measures and who launches."""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gatdist.cli.files import publish, writable
from gatdist.common.errors import (
    ClusterError,
    ConfigError,
    GatdistError,
    InterruptedRunError,
)

if TYPE_CHECKING:
    from gatdist.bench.scaling.measure import Plan
    from gatdist.config import Config
    from gatdist.storage import Store


def add(what: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to those of ``gatdist bench``."""
    sub = command(what, "scaling", scaling, "time training on more and more workers")
    sub.add_argument(
        "--workers", required=True, metavar="N,N,…", help="how many, such as 1,2,4: each in turn"
    )
    sub.add_argument(
        "--address",
        default="",
        metavar="RAY",
        help="a Ray cluster that runs already, such as auto or HOST:PORT (default: this machine)",
    )
    sub.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="NAME",
        help="as in bench step (default: dcgan64_w32); may be given often",
    )
    sub.add_argument(
        "--rule", default="alternating", metavar="NAME", help="such as one_stage, as in bench step"
    )
    sub.add_argument(
        "--mode",
        default="strong,weak",
        metavar="MODES",
        help="strong: the workers share one batch; weak: each has its own (default: both)",
    )
    sub.add_argument(
        "--batch", type=int, metavar="N", help="samples of that batch (default: the size's)"
    )
    sub.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="how often each case has its turn (default: 5); more give a truer median",
    )
    sub.add_argument(
        "--quality",
        metavar="PRESET_OR_FILE",
        help="train it on each number of workers too, and tell its metrics",
    )
    sub.add_argument(
        "--run-dir",
        metavar="URL",
        help="a folder that all hosts reach, for runs on several hosts (they are kept there)",
    )
    sub.add_argument("--out", metavar="FOLDER", help="write result.json, scaling.svg, scaling.png")


def scaling(arguments: argparse.Namespace) -> None:
    """``gatdist bench scaling``."""
    from gatdist.bench.scaling.measure import measure, plan
    from gatdist.bench.scaling.runs import quality_config
    from gatdist.bench.scaling.table import table
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
    out = writable(arguments.out)
    with groups(arguments.address, made.counts[-1]) as group:
        found = measure(made, group.together)
    found |= {"recovery": None, "skipped": [], "rounds": made.rounds}
    _add_runs(found, made, configs, arguments)
    if out:
        write(found, out)
    print(json.dumps(found) if arguments.json else table(found))


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError("--workers", "must be whole numbers above 0, such as 1,2,4", value=text)
    return [int(word) for word in words]


def _add_runs(
    found: dict[str, Any], made: Plan, configs: list[Config], arguments: argparse.Namespace
) -> None:
    """Add what real runs tell, or why there are none."""
    from gatdist.bench.scaling.runs import measure_quality

    one_host = [host["host"] for host in found["hosts"]] == [socket.gethostname()]
    with _folder(arguments.run_dir, one_host) as url:
        if made.counts[-1] > 1:
            with _skipping(found, "recovery"):
                found["recovery"] = _recovery(url, made.counts[-1], arguments.address)
        if configs:
            with _skipping(found, "quality"):
                quality = measure_quality(configs, _required(url), _train, _report)
                for point in found["points"]:
                    point["quality"] = quality[point["workers"]]


@contextmanager
def _skipping(found: dict[str, Any], what: str) -> Iterator[None]:
    """What goes wrong in here is told, and what was measured before is kept."""
    try:
        yield
    except InterruptedRunError:
        raise
    except GatdistError as error:
        found["skipped"].append({"what": what, "reason": str(error)})


def _recovery(url: str | None, workers: int, address: str) -> dict[str, Any]:
    from gatdist.bench.scaling.runs import time_to_recover
    from gatdist.storage import Store

    store = Store(_required(url)).child("recovery")
    if not store.is_local:
        raise ClusterError(
            "--run-dir",
            "recovery is timed by files that all hosts see",
            value=url,
            hint="Use a path",
        )
    folder = store.local_path()
    folder.mkdir(parents=True)
    _report(f"recovery: a run of {workers} workers, one of which is killed")
    return time_to_recover(workers, address, folder, _train)


def _required(url: str | None) -> str:
    if url is None:
        raise ClusterError(
            "--run-dir",
            "is needed on several hosts",
            hint="Name a folder that all hosts reach",
        )
    return url


@contextmanager
def _folder(run_dir: str | None, one_host: bool) -> Iterator[str | None]:
    """A new folder for runs that all hosts reach; None where nobody knows one."""
    from gatdist.storage import absolute

    if run_dir is not None:
        yield f"{absolute(run_dir).rstrip('/')}/scaling-{uuid.uuid4().hex[:8]}"
    elif one_host:
        with tempfile.TemporaryDirectory(prefix="gatdist-scaling-") as folder:
            yield folder
    else:
        yield None


def _train(config: Config, run_dir: str) -> dict[str, Any]:
    from gatdist.api import train

    return train(config, run_dir)


def write(found: dict[str, Any], out: Store) -> None:
    """Write what was found, and the plots where they can be drawn."""
    from gatdist.bench.scaling.plot import draw

    publish(found, draw, out)


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""``gatdist bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from gatdist.cli import scaling, values


def add(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands."""
    text = "measure how fast this machine is"
    bench = commands.add_parser("bench", help=text, description=f"{text[0].upper()}{text[1:]}.")
    what = bench.add_subparsers(title="what to measure", required=True, metavar="WHAT")

    sub = command(what, "step", step, "time a training step beside the same step written by others")
    _add_rounds(sub, 7)
    sub.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="NAME",
        help="such as dcgan64_w32 or r3gan32 (default: the usual ones); may be given often",
    )
    _add_case(sub, "one_stage or lightning")
    sub.add_argument(
        "--two-processes", action="store_true", help="measure two processes that communicate too"
    )
    sub.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of each process (default: 1)"
    )

    scaling.add(what, command)

    sub = command(what, "data", data, "time the reading of data beside other readers")
    _add_rounds(sub, 5)
    sub.add_argument(
        "--size",
        type=int,
        action="append",
        default=[],
        metavar="H",
        help="of the pictures, in pixels (default: 64 and 256); may be given often",
    )
    _add_case(sub, "gatdist or litdata")
    sub.add_argument(
        "--num", type=int, default=10_000, metavar="N", help="of pictures (default: 10,000)"
    )
    sub.add_argument(
        "--threads", type=int, default=2, metavar="N", help="or processes that decode (default: 2)"
    )

    sub = command(what, "storage", storage, "time the reading of data from object storage")
    _add_rounds(sub, 5)
    sub.add_argument(
        "--url", metavar="URL", help="a folder to write to (default: a slow S3 on this machine)"
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="storage option of --url; may be given often",
    )
    sub.add_argument(
        "--num", type=int, default=2_000, metavar="N", help="of pictures (default: 2,000)"
    )
    sub.add_argument("--threads", type=int, default=1, metavar="N", help="that decode (default: 1)")


def step(arguments: argparse.Namespace) -> None:
    """``gatdist bench step``."""
    from gatdist.bench.step import measure
    from gatdist.bench.table import table

    found = measure(
        arguments.size,
        arguments.case,
        rounds=arguments.rounds,
        threads=arguments.threads,
        two_processes=arguments.two_processes,
        report=_report,
    )
    print(json.dumps(found) if arguments.json else table(found))


def data(arguments: argparse.Namespace) -> None:
    """``gatdist bench data``."""
    from gatdist.bench.data.local import RESOLUTIONS, measure
    from gatdist.bench.data.table import table_of_data

    found = measure(
        arguments.size or RESOLUTIONS,
        arguments.case,
        num_images=arguments.num,
        rounds=arguments.rounds,
        threads=arguments.threads,
        report=_report,
    )
    print(json.dumps(found) if arguments.json else table_of_data(found))


def storage(arguments: argparse.Namespace) -> None:
    """``gatdist bench storage``."""
    from gatdist.bench.data.remote import measure
    from gatdist.bench.data.table import table_of_storage

    found = measure(
        arguments.url,
        values.options("--set", arguments.set),
        num_images=arguments.num,
        rounds=arguments.rounds,
        threads=arguments.threads,
        report=_report,
    )
    print(json.dumps(found) if arguments.json else table_of_storage(found))


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _add_rounds(sub: argparse.ArgumentParser, default: int) -> None:
    sub.add_argument(
        "--rounds",
        type=int,
        default=default,
        metavar="N",
        help=f"how often each case has its turn (default: {default}); more give a truer median",
    )


def _add_case(sub: argparse.ArgumentParser, examples: str) -> None:
    sub.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help=f"such as {examples} (default: all); may be given often",
    )

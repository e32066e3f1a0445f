"""``gatdist index`` and ``gatdist verify``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from gatdist.cli import values


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands."""
    sub = command("index", index, "make a data set of shards that others wrote")
    sub.add_argument("source", metavar="SHARDS", help="their folder, at any URL")
    sub.add_argument(
        "--out", metavar="URL", help="where the index goes (default: beside the shards)"
    )
    sub.add_argument(
        "--extension",
        metavar="ENDING",
        help="of each sample's file, such as jpg (default: recognized)",
    )
    sub.add_argument(
        "--labels",
        metavar="WHERE",
        help="cls, txt, json:FIELD or none (default: cls, where it is there)",
    )
    sub.add_argument(
        "--tokens", type=int, metavar="N", help=".npy files hold tokens of a vocabulary of N"
    )
    sub.add_argument(
        "--bits", type=int, default=8, metavar="N", help="read images with 8 (default) or 16 bits"
    )
    sub.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME",
        help="also write the index of another reader: dali or energon",
    )
    _add_common(sub, "SHARDS")
    _add_options(sub, "--out-option", "--out, where it is on another server or bucket")
    sub.add_argument(
        "--strict", action="store_true", help="fail if any sample can't be used, and name them"
    )

    sub = command("verify", verify, "check every digest of a data set, a checkpoint or a run")
    sub.add_argument("url", metavar="URL")
    sub.add_argument("--decode", action="store_true", help="decode every sample, too")
    sub.add_argument(
        "--shards-url", default="", metavar="URL", help="the tars, where another server has them"
    )
    _add_common(sub, "URL")
    _add_options(sub, "--shards-option", "--shards-url")


def _add_common(sub: argparse.ArgumentParser, place: str) -> None:
    sub.add_argument("--workers", metavar="N", help="processes (default: one a core)")
    _add_options(sub, "--set", place)


def _add_options(sub: argparse.ArgumentParser, option: str, place: str) -> None:
    sub.add_argument(
        option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"storage option of {place}, such as anon=true; may be given often",
    )


def index(arguments: argparse.Namespace) -> None:
    """Index as the arguments say, and print what came of it."""
    from gatdist.api import index
    from gatdist.monitor.console import Console

    outcome = index(
        arguments.source,
        arguments.out,
        extension=arguments.extension,
        labels=arguments.labels,
        tokens=arguments.tokens,
        bits=arguments.bits,
        export=arguments.export,
        workers=values.workers(arguments.workers) if arguments.workers else None,
        strict=arguments.strict,
        options=values.options("--set", arguments.set),
        out_options=values.options("--out-option", arguments.out_option),
        console=Console(sys.stderr),
    )
    if arguments.json:
        print(json.dumps(outcome))


def verify(arguments: argparse.Namespace) -> None:
    """Verify, print what is damaged, and end with status 2 if anything is."""
    from gatdist.api import verify
    from gatdist.common.errors import DataError
    from gatdist.monitor.console import Console

    outcome = verify(
        arguments.url,
        decode=arguments.decode,
        workers=values.workers(arguments.workers) if arguments.workers else None,
        options=values.options("--set", arguments.set),
        shards_url=arguments.shards_url,
        shards_options=values.options("--shards-option", arguments.shards_option),
        console=Console(sys.stderr),
    )
    if arguments.json:
        print(json.dumps(outcome))
    if not outcome["whole"]:
        raise DataError(outcome["url"], "is damaged", hint="Restore it from a copy")

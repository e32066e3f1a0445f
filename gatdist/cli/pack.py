"""``gatdist pack``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from gatdist.cli import values


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    sub = command("pack", run, "pack pictures, sounds, texts or arrays into shards")
    sub.add_argument(
        "source", metavar="SOURCE", help="a folder, zip, tar, table or text, at any URL"
    )
    sub.add_argument("dest", metavar="DEST", help="the folder for the shards, at any URL")
    images = sub.add_argument_group("pictures")
    images.add_argument("--size", metavar="H[xW]", help="make all of this size, in pixels")
    images.add_argument(
        "--transform",
        metavar="NAME",
        help="center-crop (default), center-crop-wide, center-crop-dhariwal or stretch",
    )
    images.add_argument(
        "--filter",
        metavar="NAME",
        help="lanczos (default), bicubic, hamming, bilinear or box",
    )
    images.add_argument(
        "--format",
        default="keep",
        metavar="NAME",
        help="keep (default: as they are where nothing changes, else png), png, jpeg or webp",
    )
    images.add_argument(
        "--quality", type=int, metavar="N", help="of jpeg (default: 95) or webp (lossless)"
    )
    images.add_argument(
        "--color", default="auto", metavar="NAME", help="rgb, gray or auto (default)"
    )
    images.add_argument(
        "--background",
        metavar="COLOR",
        help="what transparent images are composited on: white (default), another name or #rrggbb",
    )
    images.add_argument(
        "--bits", type=int, metavar="N", help="of each channel: 8 (default) or 16, stored as png"
    )
    others = sub.add_argument_group("sounds and texts")
    others.add_argument(
        "--length", type=int, metavar="N", help="make all of this length: samples, or bytes"
    )
    others.add_argument(
        "--sample-rate", type=int, metavar="HZ", help="of sounds (default: that of most)"
    )
    source = sub.add_argument_group("source")
    source.add_argument(
        "--kind",
        metavar="NAME",
        help="folder, zip, tar, webdataset, parquet, csv, jsonl or text (default: recognized)",
    )
    source.add_argument(
        "--labels",
        metavar="WHERE",
        help="folders, a column, a CSV or JSON list of files and labels, or none",
    )
    source.add_argument("--column", metavar="NAME", help="of a table: where the samples are")
    source.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a server, bucket or local folder that a list may name beside its own, such as "
        "https://images.example or /data/images; may be given often",
    )
    sub.add_argument(
        "--shard-bytes",
        default="256MB",
        metavar="N",
        help="what a shard should have (default: 256MB)",
    )
    sub.add_argument("--workers", metavar="N", help="processes (default: one a core)")
    sub.add_argument(
        "--address",
        default="",
        metavar="RAY",
        help="work on a Ray cluster, such as auto or HOST:PORT; local starts one here",
    )
    for end in ("source", "dest"):
        sub.add_argument(
            f"--{end}-option",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"storage option of {end.upper()}, such as anon=true; may be given often",
        )
    sub.add_argument(
        "--strict", action="store_true", help="fail if any sample can't be packed, and name them"
    )
    sub.add_argument("--dry-run", action="store_true", help="say what would be written, and stop")


def run(arguments: argparse.Namespace) -> None:
    """Pack as the arguments say, and print what came of it."""
    from gatdist.api import pack
    from gatdist.monitor.console import Console
    from gatdist.monitor.packing import described

    names = (
        *("transform", "filter", "format", "quality", "color", "background", "bits"),
        *("length", "sample_rate"),
        *("kind", "labels", "column"),
    )
    outcome = pack(
        arguments.source,
        arguments.dest,
        size=values.size(arguments.size),
        shard_bytes=values.num_bytes(arguments.shard_bytes),
        workers=values.workers(arguments.workers) if arguments.workers else None,
        address=arguments.address,
        strict=arguments.strict,
        dry_run=arguments.dry_run,
        allowed_origins=arguments.allow_origin,
        source_options=values.options("--source-option", arguments.source_option),
        dest_options=values.options("--dest-option", arguments.dest_option),
        console=None if arguments.dry_run else Console(sys.stderr),
        **{name: getattr(arguments, name) for name in names},
    )
    if arguments.json:
        print(json.dumps(outcome))
    elif arguments.dry_run:
        print(described(outcome))

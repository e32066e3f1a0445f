"""``gatdist apply``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gatdist.cli import common


def add(commands: Any) -> None:
    """Add the command."""
    text = "generate from files with a run that takes them, such as a vocoder"
    sub = common.add_command(commands, "apply", _apply, text)
    sub.add_argument("run", metavar="RUN")
    text = "a folder, zip, tar or table of files, or a data set, at any URL"
    sub.add_argument("source", metavar="INPUT", help=text)
    sub.add_argument("out", metavar="OUT", help="the folder for the outputs, at any URL")
    texts = {
        "--checkpoint N": "its name, or a number of samples seen (default: the newest)",
        "--device NAME": "such as cuda:0 (default: the first GPU, or the CPU)",
        "--label K": "class of all outputs, by number or name, of a class-conditional run",
    }
    common.add_options(sub, texts, default="")
    text = "cut larger inputs into tiles of this side, in pixels, samples or frames"
    common.add_options(sub, {"--tile N": text}, type=int)
    text = "inputs of equal size, or tiles, at a time (default: 1)"
    common.add_options(sub, {"--batch N": text}, type=int, default=1)
    source = sub.add_argument_group("input")
    texts = {
        "--kind NAME": "folder, zip, tar, webdataset, parquet, csv or jsonl (default: detected)",
        "--column NAME": "of a table: where the files are",
    }
    common.add_options(source, texts)
    common.add_allowed_origins(source)
    text = "processes on Ray (default: this process, or with --address one per core)"
    sub.add_argument("--workers", metavar="N", help=text)
    common.add_address(sub)
    common.add_storage_options(sub, "--source-option", "INPUT")
    common.add_storage_options(sub, "--out-option", "OUT")
    common.add_strict(sub)


def _apply(arguments: argparse.Namespace) -> None:
    from gatdist.api import apply
    from gatdist.monitor.console import Console

    names = (
        "checkpoint",
        "device",
        "label",
        "tile",
        "batch",
        "kind",
        "column",
        "address",
        "strict",
    )
    outcome = apply(
        arguments.run,
        arguments.source,
        arguments.out,
        workers=common.processes(arguments),
        allowed_origins=arguments.allow_origin,
        source_options=common.storage_options(arguments, "--source-option"),
        out_options=common.storage_options(arguments, "--out-option"),
        console=Console(sys.stderr),
        **{name: getattr(arguments, name) for name in names},
    )
    common.print_result(arguments, outcome)

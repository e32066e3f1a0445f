"""``gatdist pack``, ``index`` and ``verify``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from gatdist.cli import common


def add(commands: Any) -> None:
    """Add the commands."""
    _add_pack(commands)
    sub = common.add_command(commands, "index", _index, "make a data set of existing shards")
    sub.add_argument("source", metavar="SHARDS", help="their folder, at any URL")
    texts = {
        "--out URL": "folder of the index (default: SHARDS)",
        "--extension EXT": "of each sample's file, such as jpg (default: detected)",
        "--labels SOURCE": "cls, txt, json:FIELD or none (default: cls, if present)",
    }
    common.add_options(sub, texts)
    text = "for samples with several fields: an extension, such as input.png, or input.* for any"
    common.add_repeated(sub, "--field", "NAME=EXT", text)
    sub.add_argument(
        "--tokens", type=int, metavar="N", help=".npy files hold tokens of a vocabulary of N"
    )
    sub.add_argument(
        "--bits", type=int, default=8, metavar="N", help="read images with 8 (default) or 16 bits"
    )
    text = "also write the index of another reader: dali or energon"
    common.add_repeated(sub, "--export", "NAME", text)
    common.add_processes(sub)
    common.add_storage_options(sub, "--set", "SHARDS")
    common.add_storage_options(sub, "--out-option", "--out, if on another server or bucket")
    common.add_strict(sub)

    text = "check every digest of a data set, a checkpoint or a run"
    sub = common.add_command(commands, "verify", _verify, text)
    sub.add_argument("url", metavar="URL")
    sub.add_argument("--decode", action="store_true", help="decode every sample, too")
    sub.add_argument(
        "--shards-url", default="", metavar="URL", help="the tars, if on another server or bucket"
    )
    common.add_processes(sub)
    common.add_storage_options(sub, "--set", "URL")
    common.add_storage_options(sub, "--shards-option", "--shards-url")


def _add_pack(commands: Any) -> None:
    text = "pack images, audio, texts or arrays into shards"
    sub = common.add_command(commands, "pack", _pack, text)
    sub.add_argument(
        "source", metavar="SOURCE", help="a folder, zip, tar, table or text, at any URL"
    )
    sub.add_argument("dest", metavar="DEST", help="the folder for the shards, at any URL")
    _add_conversion(sub)
    source = sub.add_argument_group("source")
    texts = {
        "--kind NAME": "folder, zip, tar, webdataset, parquet, csv, jsonl or text "
        "(default: detected)",
        "--labels SOURCE": "folders, a column, a CSV or JSON list of files and labels, or none",
        "--column NAME": "of a table: where the samples are",
    }
    common.add_options(source, texts)
    text = "for samples with several fields: a folder inside SOURCE, a path with * for the name of "
    text += "the sample such as *_input.png, a column, or an extension in WebDataset shards"
    common.add_repeated(source, "--field", "NAME=WHERE", text)
    common.add_allowed_origins(source)
    text = "approximate size of a shard (default: 256MB)"
    sub.add_argument("--shard-bytes", default="256MB", metavar="N", help=text)
    common.add_processes(sub)
    common.add_address(sub)
    common.add_storage_options(sub, "--source-option", "SOURCE")
    common.add_storage_options(sub, "--dest-option", "DEST")
    common.add_strict(sub)
    text = "print what would be written, and stop"
    sub.add_argument("--dry-run", action="store_true", help=text)


def _add_conversion(sub: common.Parser) -> None:
    images = sub.add_argument_group("images")
    texts = {
        "--size H[xW]": "resize all to this size, in pixels",
        "--transform NAME": "center-crop (default), center-crop-wide, center-crop-dhariwal "
        "or stretch",
        "--filter NAME": "lanczos (default), bicubic, hamming, bilinear or box",
        "--background COLOR": "behind transparent images: white (default), another name or #rrggbb",
    }
    common.add_options(images, texts)
    text = "keep (default: unchanged files as they are, others png), png, jpeg or webp"
    common.add_options(images, {"--format NAME": text}, default="keep")
    common.add_options(images, {"--color NAME": "rgb, gray or auto (default)"}, default="auto")
    numbers = {
        "--quality N": "of jpeg (default: 95) or webp (default: lossless)",
        "--bits N": "per channel: 8 (default) or 16, stored as png",
    }
    common.add_options(images, numbers, type=int)
    numbers = {
        "--length N": "same length for all: samples, or bytes",
        "--sample-rate HZ": "of audio (default: the commonest)",
    }
    audio = sub.add_argument_group("audio and texts")
    common.add_options(audio, numbers, type=int)
    text = "cut recordings into clips of this many samples"
    common.add_options(audio, {"--clip-length N": text}, type=int)
    text = "samples that successive clips share, at least (default: 0)"
    common.add_options(audio, {"--clip-overlap N": text}, type=int, default=0)


def _pack(arguments: argparse.Namespace) -> None:
    from gatdist.api import pack
    from gatdist.monitor.console import Console
    from gatdist.monitor.packing import described

    names = (
        *("transform", "filter", "format", "quality", "color", "background", "bits"),
        *("length", "sample_rate", "clip_length", "clip_overlap", "kind", "labels", "column"),
        *("address", "strict", "dry_run"),
    )
    outcome = pack(
        arguments.source,
        arguments.dest,
        size=common.image_size(arguments.size),
        fields=common.pairs(arguments.field, "--field"),
        shard_bytes=common.num_bytes(arguments.shard_bytes),
        workers=common.processes(arguments),
        allowed_origins=arguments.allow_origin,
        source_options=common.storage_options(arguments, "--source-option"),
        dest_options=common.storage_options(arguments, "--dest-option"),
        console=None if arguments.dry_run else Console(sys.stderr),
        **{name: getattr(arguments, name) for name in names},
    )
    common.print_result(arguments, outcome, described if arguments.dry_run else None)


def _index(arguments: argparse.Namespace) -> None:
    from gatdist.api import index
    from gatdist.monitor.console import Console

    names = ("extension", "labels", "tokens", "bits", "export", "strict")
    outcome = index(
        arguments.source,
        arguments.out,
        fields=common.pairs(arguments.field, "--field"),
        workers=common.processes(arguments),
        options=common.storage_options(arguments, "--set"),
        out_options=common.storage_options(arguments, "--out-option"),
        console=Console(sys.stderr),
        **{name: getattr(arguments, name) for name in names},
    )
    common.print_result(arguments, outcome)


def _verify(arguments: argparse.Namespace) -> None:
    from gatdist.api import verify
    from gatdist.common.errors import DataError
    from gatdist.monitor.console import Console

    outcome = verify(
        arguments.url,
        decode=arguments.decode,
        workers=common.processes(arguments),
        options=common.storage_options(arguments, "--set"),
        shards_url=arguments.shards_url,
        shards_options=common.storage_options(arguments, "--shards-option"),
        console=Console(sys.stderr),
    )
    common.print_result(arguments, outcome)
    if not outcome["whole"]:
        raise DataError(outcome["url"], "is damaged", hint="Restore it from a copy")

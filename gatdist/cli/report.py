"""``gatdist report``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from gatdist.cli import values


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    sub = command("report", run, "show a run as one HTML page that opens without a server")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument(
        "--out",
        default="report.html",
        metavar="URL",
        help="the file (default: report.html in this folder)",
    )
    sub.add_argument(
        "--storage-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="storage option of RUN, such as anon=true; may be given often",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page, and tell where it is and what the run lacks."""
    from gatdist.runs.report import report
    from gatdist.storage import absolute, at_file

    options = values.options("--storage-option", arguments.storage_option)
    page, lacks = report(absolute(arguments.run), options)
    out = absolute(arguments.out)
    store, name = at_file(out)
    store.publish(name, page.encode())
    if arguments.json:
        print(json.dumps({"file": out, "missing": lacks}))
        return
    for lack in lacks:
        print(f"missing: {lack}", file=sys.stderr)
    print(arguments.out)

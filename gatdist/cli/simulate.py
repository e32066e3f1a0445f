"""``gatdist simulate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from gatdist.cli.files import publish, writable


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    sub = command("simulate", run, "predict time, failures and cost of training on many workers")
    sub.add_argument(
        "scenario",
        metavar="SCENARIO",
        help="a .toml file, or the name of a scenario that comes with gatdist",
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key, such as predict.workers=[8,16]; may be given often",
    )
    sub.add_argument(
        "--out",
        metavar="URL",
        help="a folder for result.json and, with matplotlib, simulation.svg and simulation.png",
    )


def run(arguments: argparse.Namespace) -> None:
    """Simulate, and print the answer."""
    from gatdist.bench.simulate.report import table
    from gatdist.bench.simulate.study import simulate

    out = writable(arguments.out)
    found = simulate(arguments.scenario, arguments.set)
    if out:
        from gatdist.bench.simulate.report import draw

        publish(found, draw, out)
    print(json.dumps(found) if arguments.json else table(found))

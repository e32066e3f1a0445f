"""``gatdist doctor``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from gatdist.cli import values
from gatdist.common.errors import ConfigError, UserError

_ANSWER_S = 60.0


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command."""
    sub = command("doctor", run, "check this machine, or a cluster, before training on it")
    sub.add_argument(
        "--address",
        default="",
        metavar="RAY",
        help="check every host of a Ray cluster, such as auto or HOST:PORT, and what is between "
        "them",
    )
    sub.add_argument(
        "--storage",
        default="",
        metavar="URL",
        help="a folder that must be reached, such as that of a run: small files are written, read "
        "and deleted there",
    )
    sub.add_argument(
        "--storage-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="storage option of --storage, such as anon=true; may be given often",
    )
    sub.add_argument(
        "--timeout",
        type=float,
        default=_ANSWER_S,
        metavar="S",
        help=f"seconds to wait for a host's answer (default: {_ANSWER_S:.0f})",
    )


def run(arguments: argparse.Namespace) -> None:
    """Examine, and print what was found.

    Raises:
        UserError: something must be fixed.
    """
    from gatdist.cluster.doctor.report import described

    options = values.options("--storage-option", arguments.storage_option)
    if not arguments.timeout > 0:
        raise ConfigError("--timeout", "must be above 0, in seconds", value=arguments.timeout)
    if arguments.address:
        from gatdist.cluster.doctor import cluster

        report = cluster.examine(
            arguments.address, arguments.storage, options, answer_s=arguments.timeout
        )
    else:
        from gatdist.cluster.doctor import local

        report = local.examine(arguments.storage, options)
    print(json.dumps(report.to_json()) if arguments.json else described(report))
    if report.bad:
        total = len(report.all_findings)
        raise UserError(
            "doctor", f"{len(report.bad)} of {total} checks failed: {', '.join(report.bad)}"
        )

"""``gatdist doctor``."""

from __future__ import annotations

import argparse
from typing import Any

from gatdist.cli import common
from gatdist.common.errors import ConfigError, UserError

_ANSWER_S = 60.0


def add(commands: Any) -> None:
    """Add the command."""
    text = "check this machine, or a cluster, before training on it"
    sub = common.add_command(commands, "doctor", _doctor, text)
    sub.add_argument(
        "--address",
        default="",
        metavar="RAY",
        help="check every host of a Ray cluster, such as auto or HOST:PORT, and their network",
    )
    sub.add_argument(
        "--storage",
        default="",
        metavar="URL",
        help="a folder to check, such as that of a run: small files are written, read and deleted",
    )
    common.add_storage_options(sub, "--storage-option", "--storage")
    text = f"seconds to wait for a host's answer (default: {_ANSWER_S:.0f})"
    sub.add_argument("--timeout", type=float, default=_ANSWER_S, metavar="S", help=text)


def _doctor(arguments: argparse.Namespace) -> None:
    from gatdist.cluster.doctor.report import described

    options = common.storage_options(arguments, "--storage-option")
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
    common.print_result(arguments, report.to_json(), lambda _: described(report))
    if report.bad:
        total = len(report.all_findings)
        raise UserError(
            "doctor", f"{len(report.bad)} of {total} checks failed: {', '.join(report.bad)}"
        )

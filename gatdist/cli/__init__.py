"""The commands. Each parses its arguments, calls one function and prints what it returned."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from gatdist.cli import apply, bench, data, doctor, runs
from gatdist.common.errors import GatdistError, InterruptedRunError, for_terminal

_PATIENCE_S = 5.0  # with threads that still run when a command is done


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Return the exit status: 0 done, 2 bad input, 75 try again, 1 else."""
    status = _status(argv)
    if argv is None:
        _end_threads(status)
    return status


def _status(argv: Sequence[str] | None) -> int:
    for name in ("stdout", "stderr"):  # closed by who started the command
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    arguments = parser().parse_args(argv)
    try:
        os.getcwd()
    except OSError as error:  # libraries would fail with messages that lead nowhere
        _complain(f"current folder: can't be used ({error.strerror}). Change to another one.")
        return 2
    try:
        arguments.command(arguments)
    except GatdistError as error:
        if getattr(arguments, "debug", False):
            from gatdist.config import redact_url

            # Libraries name URLs in full.
            print(redact_url(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        if not error.reported:
            _complain(str(error))
        if isinstance(error, InterruptedRunError) and argv is None:
            # There may be seconds left to live, and Python would wait for threads and libraries.
            os._exit(error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        _complain("interrupted")
        return 75
    except BrokenPipeError:
        _give_up(sys.stdout)  # its reader has gone (`gatdist … | head`)
        return 1
    return 0


def _end_threads(status: int) -> None:
    """Python would wait forever for a thread that a user's code has left running."""
    deadline = time.monotonic() + _PATIENCE_S
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _complain(f"thread {thread.name!r} still runs; it is ended with the command")
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(status)


def _complain(message: str) -> None:
    try:
        print(f"gatdist: {for_terminal(message)}", file=sys.stderr, flush=True)
    except OSError:  # the terminal was closed
        _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    """Python must not fail again when it flushes what nobody takes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; the reference is made of it too."""
    parser = argparse.ArgumentParser(
        prog="gatdist",
        description="Train generative adversarial networks on one machine or many.",
        epilog="Exit status: 0 done; 2 bad input; 75 trying again may help; 1 anything else.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    runs.add_train(commands)
    data.add(commands)
    runs.add(commands)
    apply.add(commands)
    doctor.add(commands)
    bench.add(commands)
    return parser

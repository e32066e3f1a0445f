"""The commands. Each parses its arguments, calls one function and prints what it returned."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TextIO

from gatdist.cli import bench, doctor, pack, report, shards
from gatdist.cli.values import profiled_steps, workers_range
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
            traceback.print_exc()
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


def _train(arguments: argparse.Namespace) -> None:
    from gatdist.config import load_config, silence_profiler

    overrides = list(arguments.set)
    if arguments.workers is not None:
        overrides.append(f"cluster.workers={workers_range(arguments.workers)}")
    if arguments.address is not None:
        overrides.append(f"cluster.address={json.dumps(arguments.address)}")
    if arguments.profile is not None:
        overrides.append(f"monitor.profile_steps={profiled_steps(arguments.profile)}")
    config = load_config(arguments.preset, overrides)
    if config.monitor.profile_steps:
        silence_profiler()
    from gatdist.api import train
    from gatdist.monitor.console import Console

    run_dir = arguments.run_dir
    if run_dir is None:
        run_dir = f"runs/{os.path.basename(arguments.preset).removesuffix('.toml')}"
    if arguments.dry_run:
        from gatdist.storage import absolute
        from gatdist.training.plan import describe, plan

        found = plan(config, absolute(run_dir))
        print(json.dumps(found) if arguments.json else describe(found))
        return
    console = Console(sys.stderr)
    if run_dir.startswith("memory://"):
        message = f"--run-dir {run_dir}: what is kept there is gone when this command ends"
        console.event("warning", {"message": message})
    outcome = train(config, run_dir, local=arguments.local, console=console)
    if arguments.json:
        print(json.dumps(outcome))


def _inspect(arguments: argparse.Namespace) -> None:
    from gatdist.runs.inspection import describe, digest, inspect
    from gatdist.storage import absolute

    if arguments.digest:
        value = digest(absolute(arguments.url))
        print(json.dumps({"digest": value}) if arguments.json else value)
        return
    found = inspect(absolute(arguments.url))
    print(json.dumps(found) if arguments.json else describe(found))


def _evaluate(arguments: argparse.Namespace) -> None:
    from gatdist.api import evaluate

    found = evaluate(
        arguments.run, arguments.metric or None, arguments.num, overrides=arguments.set
    )
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found["metrics"].items():
        print(f"{name:<20} {value:.5g}")
    print(f"{found['num_samples']:,} fakes of the generator at {found['samples_seen']:,} samples")
    print(
        "protocol: "
        + ", ".join(f"{key} {_brief(value)}" for key, value in found["protocol"].items())
    )


def _brief(value: Any) -> str:
    return " ".join(map(_brief, value)) if isinstance(value, list) else str(value)


def _sample(arguments: argparse.Namespace) -> None:
    from gatdist.api import sample

    written = sample(
        arguments.run,
        arguments.num,
        seed=arguments.seed,
        out=arguments.out,
        grid=arguments.grid,
        labels=arguments.labels.split(",") if arguments.labels else (),
        truncation=arguments.truncation,
        interpolate=arguments.interpolate,
        shards=arguments.shards,
        workers=arguments.workers,
    )
    if arguments.json:
        print(json.dumps({"files": written}))
    else:
        print(
            written[0]
            if len(written) == 1
            else f"{len(written)} files, {written[0]} to {written[-1]}"
        )


def _export(arguments: argparse.Namespace) -> None:
    from gatdist.api import export

    written = export(arguments.run, arguments.format, out=arguments.out)
    print(json.dumps({"file": written}) if arguments.json else written)


def parser() -> argparse.ArgumentParser:
    """What takes the command line apart; the reference is made of it too."""
    parser = argparse.ArgumentParser(
        prog="gatdist",
        description="Train generative adversarial networks on one machine or many.",
        epilog="Exit status: 0 done; 2 bad input; 75 trying again may help; 1 anything else.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = partial(_command, commands)

    _add_train(command)

    pack.add(command)
    shards.add(command)

    sub = command("inspect", _inspect, "tell what a run, checkpoint or data set is")
    sub.add_argument("url", metavar="URL")
    sub.add_argument(
        "--digest", action="store_true", help="print one SHA-256 over all trained state"
    )

    sub = command("evaluate", _evaluate, "measure a run's generator against its data")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="such as fid; may be given often",
    )
    sub.add_argument("--num", type=int, metavar="N", help="how many fakes")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of the run's configuration, such as data.url=…; may be given often",
    )

    _add_sample(command)

    sub = command("export", _export, "write a run's generator for use elsewhere")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--format", required=True, metavar="NAME", help="onnx, torch or safetensors")
    sub.add_argument("--out", required=True, metavar="URL", help="the file")

    report.add(command)
    doctor.add(command)
    bench.add(commands, _command)
    bench.add_simulate(command)
    return parser


def _add_sample(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("sample", _sample, "write samples of a run's generator")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--num", type=int, required=True, metavar="N", help="how many")
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise (default: 0)")
    sub.add_argument("--out", required=True, metavar="URL", help="a folder; with --grid a file")
    sub.add_argument("--grid", action="store_true", help="one picture, sound or text of all")
    sub.add_argument("--labels", metavar="K,…", help="classes in turn, by number or name")
    sub.add_argument(
        "--truncation", type=float, metavar="T", help="less diverse and better, such as 0.7"
    )
    sub.add_argument(
        "--interpolate",
        type=int,
        default=0,
        metavar="N",
        help="N samples on the way from each to the next; --out walk.gif animates them",
    )
    sub.add_argument(
        "--shards", action="store_true", help="a data set that trains, in the folder --out"
    )
    sub.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that write shards (default: 1)",
    )


def _add_train(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("train", _train, "train a preset or a TOML file; again resumes the same run")
    sub.add_argument(
        "preset", metavar="PRESET_OR_FILE", help="a preset's name (such as digits) or a .toml file"
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key; the value is TOML, a bare word is a string; may be given often",
    )
    sub.add_argument(
        "--run-dir", metavar="URL", help="where the run is kept (default: runs/PRESET)"
    )
    sub.add_argument(
        "--workers",
        metavar="N or MIN:MAX",
        help="how many workers, or the fewest and the most (default: cluster.workers, 1)",
    )
    sub.add_argument("--local", action="store_true", help="train in this process, without Ray")
    sub.add_argument(
        "--address",
        metavar="RAY",
        help="a Ray cluster that runs already, such as auto or HOST:PORT",
    )
    sub.add_argument(
        "--profile",
        metavar="steps=FIRST:STOP",
        help="show where time and memory of these steps go, such as steps=100:110; traces are "
        "written to profiles/ of the run",
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="say what would be done and what it needs, and stop"
    )
    sub.add_argument(
        "--debug", action="store_true", help="print the full traceback of an error before it"
    )


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    """A command that calls ``function``."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=_sentence(text))
    sub.set_defaults(command=function)
    sub.add_argument(
        "--json", action="store_true", help="print exactly one JSON document on standard output"
    )
    return sub


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."

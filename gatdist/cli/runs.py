"""``gatdist train`` and the commands that read a run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from gatdist.cli import common

_MAX_SHOWN = 100  # values of a list, such as the histogram of classes


def add(commands: Any) -> None:
    """Add the commands that read a run."""
    text = "show what a run, checkpoint or data set contains"
    sub = common.add_command(commands, "inspect", _inspect, text)
    sub.add_argument("url", metavar="URL")
    sub.add_argument(
        "--digest", action="store_true", help="print one SHA-256 over all trained state"
    )

    text = "measure a run's generator, or samples generated elsewhere, against real data"
    sub = common.add_command(commands, "evaluate", _evaluate, text)
    text = "a run; with --against also a folder, zip or data set of generated samples"
    sub.add_argument("run", metavar="RUN", help=text)
    sub.add_argument(
        "--against",
        metavar="URL",
        help="real data: a folder, zip, data set, or a file of statistics (.npz); default: the "
        "run's own data",
    )
    common.add_repeated(sub, "--metric", "NAME", "such as fid")
    sub.add_argument("--num", type=int, metavar="N", help="number of generated samples")
    text = "override a key of the configuration, such as evaluate.features=…"
    common.add_overrides(sub, text)

    text = "write mean and covariance of the features of real data, for evaluate --against"
    sub = common.add_command(commands, "statistics", _statistics, text)
    sub.add_argument("data", metavar="DATA", help="a folder, zip or data set")
    sub.add_argument("--out", required=True, metavar="URL", help="the file, .npz")
    text = "set a key of the configuration, such as evaluate.features=…"
    common.add_overrides(sub, text)

    _add_sample(commands)

    text = "write a run's generator for use elsewhere"
    sub = common.add_command(commands, "export", _export, text)
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--format", required=True, metavar="NAME", help="onnx, torch or safetensors")
    sub.add_argument("--out", required=True, metavar="URL", help="the file")

    text = "make a run of published weights"
    sub = common.add_command(commands, "import", _import, text)
    sub.add_argument("family", metavar="FAMILY", help="r3gan, stylegan2-ada or biggan")
    sub.add_argument(
        "--generator", required=True, metavar="URL", help="safetensors of the averaged generator"
    )
    sub.add_argument("--discriminator", metavar="URL", help="safetensors of the discriminator")
    sub.add_argument("--run-dir", required=True, metavar="URL", help="the run directory")
    text = "the files are pickles; read them with weights_only=True"
    sub.add_argument("--pickle", action="store_true", help=text)
    common.add_overrides(sub, "set what shapes do not say, such as model.discriminator.…")

    text = "show a run as one HTML page that opens without a server"
    sub = common.add_command(commands, "report", _report, text)
    sub.add_argument("run", metavar="RUN")
    sub.add_argument(
        "--out", default="report.html", metavar="URL", help="the file (default: report.html)"
    )
    common.add_storage_options(sub, "--storage-option", "RUN")


def _add_sample(commands: Any) -> None:
    sub = common.add_command(commands, "sample", _sample, "write samples of a run's generator")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--num", type=int, required=True, metavar="N", help="number of samples")
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="of the latents (default: 0)")
    sub.add_argument("--out", required=True, metavar="URL", help="a folder; with --grid a file")
    sub.add_argument("--grid", action="store_true", help="one image, audio clip or text of all")
    sub.add_argument("--labels", metavar="K,…", help="classes, used cyclically, by number or name")
    sub.add_argument(
        "--truncation", type=float, metavar="T", help="less diversity, more quality, such as 0.7"
    )
    sub.add_argument(
        "--interpolate",
        type=int,
        default=0,
        metavar="N",
        help="N samples from each to the next; --out walk.gif animates them",
    )
    sub.add_argument(
        "--shards", action="store_true", help="write a data set for training into the folder --out"
    )
    text = "processes that write shards (default: 1)"
    sub.add_argument("--workers", type=int, default=1, metavar="N", help=text)


def add_train(commands: Any) -> None:
    """Add ``gatdist train``."""
    text = "train a preset or a TOML file; run it again to resume"
    sub = common.add_command(commands, "train", _train, text)
    sub.add_argument(
        "preset", metavar="PRESET_OR_FILE", help="a preset's name (such as digits) or a .toml file"
    )
    text = "override a key; the value is TOML, a bare word is a string"
    common.add_overrides(sub, text)
    sub.add_argument("--run-dir", metavar="URL", help="the run directory (default: runs/PRESET)")
    sub.add_argument(
        "--workers",
        metavar="N or MIN:MAX",
        help="number of workers, or the fewest and the most (default: cluster.workers, 1)",
    )
    sub.add_argument("--local", action="store_true", help="train in this process, without Ray")
    sub.add_argument(
        "--address", metavar="RAY", help="an existing Ray cluster, such as auto or HOST:PORT"
    )
    sub.add_argument(
        "--profile",
        metavar="steps=FIRST:STOP",
        help="profile time and memory of these steps, such as steps=100:110; traces are written to "
        "profiles/ of the run",
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="print the plan and its requirements, and stop"
    )
    sub.add_argument(
        "--device",
        choices=["cuda"],
        help="with --dry-run: also what a step costs on a GPU, and the least time it takes on "
        "several models, computed without one",
    )
    sub.add_argument(
        "--debug", action="store_true", help="print the full traceback of an error before it"
    )


def _train(arguments: argparse.Namespace) -> None:
    from gatdist.config import load_config, silence_profiler

    overrides = list(arguments.set)
    if arguments.workers is not None:
        overrides.append(f"cluster.workers={common.workers_range(arguments.workers)}")
    if arguments.address is not None:
        overrides.append(f"cluster.address={json.dumps(arguments.address)}")
    if arguments.profile is not None:
        overrides.append(f"monitor.profile_steps={common.profiled_steps(arguments.profile)}")
    config = load_config(arguments.preset, overrides)
    if config.monitor.profile_steps:
        silence_profiler()
    from gatdist.api import train
    from gatdist.cluster.torchrun import is_main
    from gatdist.monitor.console import Console

    run_dir = arguments.run_dir
    if run_dir is None:
        run_dir = f"runs/{os.path.basename(arguments.preset).removesuffix('.toml')}"
    if arguments.dry_run:
        from gatdist.storage.urls import absolute
        from gatdist.training.plan import describe, plan

        found = plan(config, absolute(run_dir))
        if arguments.device:
            from gatdist.bench import roofline

            found["gpu"] = roofline.estimate(config)
            text = describe(found) + "\n\n" + roofline.describe(found["gpu"])
            common.print_result(arguments, found, lambda _: text)
        else:
            common.print_result(arguments, found, describe)
        return
    if arguments.device:
        from gatdist.common.errors import ConfigError

        raise ConfigError("--device", "needs --dry-run", value=arguments.device)
    console = Console(sys.stderr)
    if run_dir.startswith("memory://"):
        message = f"--run-dir = {run_dir}: is deleted when this command ends"
        console.event("warning", {"message": message})
    outcome = train(config, run_dir, local=arguments.local, console=console)
    if is_main():
        common.print_result(arguments, outcome)


def _inspect(arguments: argparse.Namespace) -> None:
    from gatdist.runs.inspection import describe, digest, inspect
    from gatdist.storage.urls import absolute

    url = absolute(arguments.url)
    if arguments.digest:
        common.print_result(arguments, {"digest": digest(url)}, lambda found: str(found["digest"]))
    else:
        common.print_result(arguments, inspect(url), describe)


def _evaluate(arguments: argparse.Namespace) -> None:
    from gatdist.api import evaluate

    metrics, overrides = arguments.metric or None, arguments.set
    found = evaluate(
        arguments.run, metrics, arguments.num, against=arguments.against, overrides=overrides
    )
    common.print_result(arguments, found, _described)


def _statistics(arguments: argparse.Namespace) -> None:
    from gatdist.api import statistics

    found = statistics(arguments.data, arguments.out, overrides=arguments.set)
    common.print_result(arguments, found, _described_statistics)


def _described(found: dict[str, Any]) -> str:
    metrics = (f"{name:<20} {value:.5g}" for name, value in found["metrics"].items())
    samples = f"{found['num_samples']:,} generated samples"
    if "samples_seen" in found:
        samples = (
            f"{found['num_samples']:,} fakes of the generator at {found['samples_seen']:,} samples"
        )
    if "against" in found:
        samples += f", compared with {found['against']}"
    return "\n".join([*metrics, samples, _described_protocol(found)])


def _described_statistics(found: dict[str, Any]) -> str:
    what = f"{found['num_features']:,} features of {found['num_samples']:,} samples"
    return f"{found['file']}: {what}\n{_described_protocol(found)}"


def _described_protocol(found: dict[str, Any]) -> str:
    def brief(value: Any) -> str:
        if isinstance(value, list) and len(value) > _MAX_SHOWN:
            return f"({len(value):,} values)"
        return " ".join(map(brief, value)) if isinstance(value, list) else str(value)

    rows = (f"  {key:<18} {brief(value)}" for key, value in found["protocol"].items())
    return "\n".join(["protocol:", *rows])


def _sample(arguments: argparse.Namespace) -> None:
    from gatdist.api import sample

    names = ("seed", "out", "grid", "truncation", "interpolate", "shards", "workers")
    written = sample(
        arguments.run,
        arguments.num,
        labels=arguments.labels.split(",") if arguments.labels else (),
        **{name: getattr(arguments, name) for name in names},
    )
    first, last = written[0], written[-1]
    text = first if len(written) == 1 else f"{len(written)} files, {first} to {last}"
    common.print_result(arguments, {"files": written}, lambda found: text)


def _export(arguments: argparse.Namespace) -> None:
    from gatdist.api import export

    written = export(arguments.run, arguments.format, out=arguments.out)
    common.print_result(arguments, {"file": written}, lambda found: str(found["file"]))


def _import(arguments: argparse.Namespace) -> None:
    from gatdist.api import import_weights

    found = import_weights(
        arguments.family,
        arguments.generator,
        arguments.run_dir,
        discriminator=arguments.discriminator,
        allow_pickle=arguments.pickle,
        overrides=arguments.set,
    )
    networks, shape = " and ".join(found["imported"]), "x".join(map(str, found["sample_shape"]))
    text = f"imported {networks} for samples of {shape} into {found['run_dir']}"
    common.print_result(arguments, found, lambda found: text)


def _report(arguments: argparse.Namespace) -> None:
    from gatdist.runs.report import report
    from gatdist.storage.store import at_file
    from gatdist.storage.urls import absolute

    options = common.storage_options(arguments, "--storage-option")
    page, missing = report(absolute(arguments.run), options)
    out = absolute(arguments.out)
    store, name = at_file(out)
    store.publish(name, page.encode())
    if not arguments.json:
        for what in missing:
            common.log(f"missing: {what}")
    found = {"file": out, "missing": missing}
    common.print_result(arguments, found, lambda found: str(arguments.out))

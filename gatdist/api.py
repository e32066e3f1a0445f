"""The functions behind the commands, for Python: each takes what its command takes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from gatdist.common.errors import CheckpointError, ClusterError, ConfigError, InterruptedRunError
from gatdist.config import Config, redact_url
from gatdist.storage import absolute

if TYPE_CHECKING:
    from torch import nn

    from gatdist.monitor.console import Console
    from gatdist.training.interrupts import Interrupts


def train(
    config: Config,
    run_dir: str | PathLike[str],
    *,
    local: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, or resume the run in ``run_dir``.

    Args:
        config: from :func:`gatdist.load_config`.
        run_dir: any fsspec URL or path.
        local: in this process, without Ray; else ``cluster.workers`` workers under Ray Train.
        console: shows progress; None shows nothing.

    Returns:
        ``status`` ("finished" or "converged"), ``reason``, ``samples_seen``, ``metrics`` of the
        last evaluation.

    Raises:
        InterruptedRunError: asked to stop; a checkpoint was written and the same call resumes.
        GatdistError: see :mod:`gatdist.common.errors`.
    """
    from gatdist.training.interrupts import Interrupts

    emit = console.event if console else lambda kind, fields: None
    with Interrupts(emit) as interrupts:
        outcome = _train(config, run_dir, local, console, interrupts)
    if outcome["status"] == "interrupted":
        raise InterruptedRunError(
            f"interrupted at {outcome['samples_seen']:,} samples; everything is saved in "
            f"{redact_url(absolute(run_dir))} "
            "and the same command goes on from there"
        )
    return outcome


def _train(
    config: Config,
    run_dir: str | PathLike[str],
    local: bool,
    console: Console | None,
    interrupts: Interrupts,
) -> dict[str, Any]:
    """See :func:`train`; returns also where the run was interrupted."""
    from gatdist.runs import remember
    from gatdist.training.plan import check
    from gatdist.training.profiling import require_ahead

    url, config = absolute(run_dir), _anchored(config)
    remember(config)
    require_ahead(config, url)
    if local and config.cluster.max_workers > 1:
        raise ClusterError(
            "--local", "runs one process", value=True, hint="Leave out --workers, or --local"
        )
    # Here, since Ray takes a while to start.
    for message in check(config, url, default_device() if local else None).warnings:
        if console:
            console.event("warning", {"message": message})
    if local:
        from gatdist.training.local import run_here

        return run_here(config, url, console, interrupts)
    from gatdist.cluster.launch import fit

    return fit(config, url, console, interrupts)


def sample(
    run: str | PathLike[str],
    num: int,
    *,
    out: str | PathLike[str],
    seed: int = 0,
    grid: bool = False,
    labels: Sequence[str | int] = (),
    truncation: float | None = None,
    interpolate: int = 0,
    shards: bool = False,
    workers: int = 1,
) -> list[str]:
    """Write ``num`` fakes of the run's averaged generator into the folder ``out``.

    Args:
        run: a run directory.
        num: how many (> 0).
        out: a folder (``000000.png`` …), or with ``grid`` one file, or an animation (``.gif``).
        seed: of the noise; the same seed gives the same fakes, whatever ``num`` is.
        grid: one picture, sound or text of all.
        labels: classes that the fakes have in turn, by number or name; none: drawn.
        truncation: trades diversity for quality; see :class:`gatdist.runs.trained.Sampler`.
        interpolate: above 0, so many fakes on the way from each to the next.
        shards: as a data set that trains, in the folder ``out``.
        workers: processes that write shards.

    Returns:
        The URLs of the files written.

    Raises:
        CheckpointError: ``run`` is no run, or has no whole checkpoint.
        ConfigError: there are no such fakes.
    """
    from gatdist.runs import load_run
    from gatdist.runs.sampling import SampleRequest, write_samples, write_shards
    from gatdist.storage import Store

    requested = SampleRequest(num, seed, [str(label) for label in labels], truncation, interpolate)
    if grid and shards:
        raise ConfigError("--grid", "does not go with --shards", hint="Choose one")
    url, out = absolute(run), absolute(out)
    trained = load_run(Store(url), default_device())
    if shards:
        return write_shards(trained, url, requested, out=out, workers=workers)
    return write_samples(trained, requested, out=out, grid=grid)


def export(run: str | PathLike[str], kind: str, *, out: str | PathLike[str]) -> str:
    """Write the run's averaged generator for use elsewhere.

    Args:
        run: a run directory.
        kind: ``onnx``, ``torch`` (a program of ``torch.export``) or ``safetensors``.
        out: URL of the file; the format's ending is added where it lacks.

    Returns:
        The URL written.

    Raises:
        CheckpointError: ``run`` is no run, or has no whole checkpoint.
        ConfigError: no such format, or a package that it needs is not installed.
    """
    run, url = absolute(run), absolute(out)  # first: torch does not load in a folder that is gone
    import torch

    from gatdist.runs import load_run
    from gatdist.runs.export import ENDINGS, formats
    from gatdist.storage import Store, at_file

    make = formats[kind]
    url = url if url.endswith(ENDINGS[kind]) else url + ENDINGS[kind]
    content = make(load_run(Store(run), torch.device("cpu")))
    store, name = at_file(url)
    store.publish(name, content)
    return url


def load(
    run: str | PathLike[str], player: Literal["generator", "discriminator"] = "generator"
) -> nn.Module:
    """A trained network as a plain module, on the CPU, in evaluation mode.

    Args:
        run: a run directory, or a ``.safetensors`` file that :func:`export` made.
        player: ``generator`` gives the averaged generator, latents [n, latent_size] and labels
            int64 [n] or None → samples as networks see them; ``discriminator`` its opponent,
            samples → logits [n].

    Raises:
        CheckpointError: no run there, or no whole checkpoint.
    """
    url = absolute(run)
    import torch

    from gatdist.runs import load_run
    from gatdist.runs.export import load_exported
    from gatdist.storage import Store, at_file

    if url.endswith(".safetensors"):
        if player != "generator":
            raise CheckpointError(
                redact_url(url), "holds a generator alone", hint="Load the run directory"
            )
        store, name = at_file(url)
        return load_exported(store.read(name), url)
    trained = load_run(Store(url), torch.device("cpu"))
    return trained.generator if player == "generator" else trained.discriminator


def evaluate(
    run: str | PathLike[str],
    metrics: list[str] | None = None,
    num: int | None = None,
    *,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the averaged generator of a run against its data.

    The run's own configuration says where the data is if you trained the run on this machine. Of a
    run that others made, only data beside the run (on the same server or bucket) is used; name
    everything else in ``overrides``.

    Args:
        run: a run directory.
        overrides: ``section.key=value``, such as ``data.url=…``, ``data.storage_options={…}``.
        metrics: names; None takes the run's ``evaluate.metrics``.
        num: fakes to generate; None takes the run's ``evaluate.num_samples``.

    Returns:
        ``metrics``, ``num_samples``, ``samples_seen`` and the ``protocol`` that the numbers were
        made by.

    Raises:
        CheckpointError: ``run`` is no run, has no whole checkpoint, or its data has changed.
        ConfigError: no metric, one that is not known, or the run is not yours and names a URL that
            only you may name.
    """
    from gatdist.data import open_dataset
    from gatdist.evaluation import Evaluator
    from gatdist.parallel.communicator import LocalCommunicator
    from gatdist.runs import adopted, load_run
    from gatdist.runs.sampling.request import require_num
    from gatdist.storage import Store

    if num is not None:
        require_num(num)
    comm, store = LocalCommunicator(default_device()), Store(absolute(run))
    trained = load_run(store, comm.device)
    config = _anchored(adopted(trained.config, overrides, store))
    asked = {k: v for k, v in {"metrics": metrics, "num_samples": num}.items() if v is not None}
    requested = config.evaluate.model_copy(update=asked)
    if not requested.metrics:
        rule, hint = "names nothing to measure", "Name a metric: gatdist evaluate RUN --metric NAME"
        raise ConfigError("evaluate.metrics", rule, value=[], hint=hint)
    dataset = open_dataset(config.data)
    state = trained.checkpoint.state
    if dataset.fingerprint != state["order"]["fingerprint"]:
        raise CheckpointError(
            f"{store.url}: fingerprint",
            f"the run was trained on other data ({state['order']['fingerprint'][:16]}…)",
            value=dataset.fingerprint[:16] + "…",
            hint="Restore the data at data.url",
        )
    evaluator = Evaluator(
        requested,
        dataset,
        comm,
        comm.device,
        conditional=trained.config.model.conditional,
    )
    sampler = trained.sampler(trained.config.run.seed, "evaluation")
    evaluation = evaluator(sampler, trained.discriminator)
    return {
        "metrics": evaluation.metrics,
        "num_samples": evaluation.protocol["num_generated"],
        "samples_seen": state["samples_seen"],
        "protocol": evaluation.protocol,
    }


def _anchored(config: Config) -> Config:
    """The same with absolute paths: workers, and those who use the run later, stand elsewhere."""

    def anchor(url: str) -> str:
        is_path = url and not url.startswith("builtin:") and not url.startswith("${env:")
        return absolute(url) if is_path else url

    urls = {key: anchor(getattr(config.data, key)) for key in ("url", "shards_url")}
    data = config.data.model_copy(update=urls)
    model = config.model.model_copy(update={"init_from": anchor(config.model.init_from)})
    return config.model_copy(update={"data": data, "model": model})


def default_device() -> Any:
    """The first CUDA device if there is one, else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

"""The functions behind the commands; each takes what its command takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from gatdist.common.cores import usable_cores
from gatdist.common.devices import default_device, device_named
from gatdist.common.errors import CheckpointError, ClusterError, ConfigError, InterruptedRunError
from gatdist.config import Config, TermConfig, cuda_variables, redact_url
from gatdist.storage import Store
from gatdist.storage.store import at_file
from gatdist.storage.urls import absolute, options_for

if TYPE_CHECKING:
    from torch import nn

    from gatdist.monitor.console import Console
    from gatdist.packing import Packing
    from gatdist.runs.generator import Generator
    from gatdist.training.interrupts import Interrupts


def train(
    config: Config,
    run_dir: str | PathLike[str],
    *,
    local: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, or resume the run in ``run_dir``.

    In a process that torchrun or srun has started (RANK, WORLD_SIZE and MASTER_ADDR are set), the
    process is one of WORLD_SIZE workers; all of them make this call. Otherwise Ray Train launches
    ``cluster.workers`` workers.

    Args:
        config: from :func:`gatdist.load_config`.
        run_dir: any fsspec URL or path.
        local: train in this process alone.
        console: shows progress; None shows nothing.

    Returns:
        ``status`` ("finished" or "converged"), ``reason``, ``samples_seen``, ``metrics`` of the
        last evaluation.

    Raises:
        InterruptedRunError: stopped by a signal; a checkpoint was written, the same call resumes.
        GatdistError: see :mod:`gatdist.common.errors`.
    """
    from gatdist.cluster.torchrun import is_main
    from gatdist.training.interrupts import Interrupts

    if not is_main():
        console = None
    emit = console.event if console else lambda kind, fields: None
    canonical = config.run.reduction == "canonical"
    with Interrupts(emit) as interrupts, cuda_variables(deterministic=canonical):
        outcome = _train(config, run_dir, local, console, interrupts)
    if outcome["status"] == "interrupted":
        error = InterruptedRunError(
            f"interrupted at {outcome['samples_seen']:,} samples; everything is saved in "
            f"{redact_url(absolute(run_dir))}. Run the same command to resume."
        )
        error.reported = not is_main()
        raise error
    return outcome


def _train(
    config: Config,
    run_dir: str | PathLike[str],
    local: bool,
    console: Console | None,
    interrupts: Interrupts,
) -> dict[str, Any]:
    from gatdist.cluster import torchrun
    from gatdist.runs import remember
    from gatdist.training.plan import Checked, check
    from gatdist.training.profiling import require_ahead

    url, config = absolute(run_dir), _anchored(config)
    remember(config)
    launch = torchrun.launched()
    if local and max(config.cluster.max_workers, launch.world_size if launch else 1) > 1:
        hint = "Omit --workers, or --local" if launch is None else "Omit it"
        raise ClusterError("--local", "runs one process", value=True, hint=hint)

    def checked(config: Config) -> Checked:
        require_ahead(config, url)
        return check(config, url, default_device() if local else None)

    if launch is not None and not local:
        return torchrun.train(
            config, url, launch, lambda config: checked(config).warnings, console, interrupts
        )
    found = checked(config)  # here, since Ray takes a while to start
    for message in found.warnings:
        if console:
            console.event("warning", {"message": message})
    if local:
        from gatdist.parallel.communicator import LocalCommunicator
        from gatdist.training.local import run_in_process

        canonical = config.run.reduction == "canonical"
        threads = config.cluster.cpus_per_worker if canonical else None
        comm = LocalCommunicator(default_device())
        return run_in_process(config, url, comm, console, interrupts, threads=threads)
    from gatdist.cluster.launch import fit

    return fit(config, found.sizes, url, console, interrupts)


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
        out: a folder (``000000.png`` …); with ``grid`` one file, or an animation (``.gif``).
        seed: of the latents; the same seed gives the same fakes, whatever ``num`` is.
        grid: one image, audio clip or text of all.
        labels: classes by number or name, used cyclically; none: random classes.
        truncation: trades diversity for quality; see :class:`gatdist.runs.trained.Sampler`.
        interpolate: number of interpolated fakes from each to the next.
        shards: write a data set for training into the folder ``out``.
        workers: processes that write shards.

    Returns:
        The URLs of the files written.

    Raises:
        CheckpointError: ``run`` is no run, or has no complete checkpoint.
        ConfigError: an argument is out of range.
    """
    from gatdist.runs import load_run
    from gatdist.runs.sampling import SampleRequest, write_samples, write_shards

    requested = SampleRequest(num, seed, [str(label) for label in labels], truncation, interpolate)
    if grid and shards:
        raise ConfigError("--grid", "does not go with --shards", hint="Choose one")
    url, out = absolute(run), absolute(out)
    trained = load_run(Store(url), default_device())
    if shards:
        return write_shards(trained, url, requested, out=out, workers=workers)
    return write_samples(trained, requested, out=out, grid=grid)


def apply(
    run: str | PathLike[str],
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    checkpoint: str | int = "",
    tile: int | None = None,
    batch: int = 1,
    device: str = "",
    label: str | int = "",
    workers: int | None = None,
    address: str = "",
    strict: bool = False,
    kind: str | None = None,
    column: str | None = None,
    source_options: Mapping[str, Any] | None = None,
    allowed_origins: Sequence[str] = (),
    out_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Generate from files with the averaged generator of a task with inputs, or resume.

    Recordings are resampled to the rate of the run's data, and images get its channels. Outputs
    keep the names of the inputs below ``source``, with the extension of what is generated (``.png``
    or ``.wav``). Outputs that are there are kept; each is written atomically. Files that can't be
    used are skipped and listed in ``report.jsonl``.

    Args:
        run: a run directory.
        source: files of the field that the generator takes, at any fsspec URL: a folder, zip, tar
            or table of them, or a data set. A vocoder also takes ``.npy`` files of its log-mel
            spectrogram, float [bands, frames].
        out: URL of the folder for the outputs: empty, or of the same checkpoint.
        checkpoint: name or ``samples_seen`` of one; by default the newest.
        tile: larger inputs are cut into overlapping tiles of this side, in pixels, samples or
            frames, which does not change the result beyond rounding; None chooses it. Networks
            whose outputs depend on the whole input, such as by instance normalization, get it
            whole.
        batch: inputs of equal size, or tiles, at a time.
        device: such as ``cuda:0``; by default the first GPU, or the CPU.
        label: class of all outputs by number or name, of a class-conditional generator.
        workers: processes on Ray; None: this process, or with ``address`` one per core.
        address: of a Ray cluster; by default Ray is started here for more than one worker.
        strict: raise an error that names the first file that can't be used.
        kind: of the source; None detects it.
        column: of a table, the one that holds the files; None detects it.
        allowed_origins: servers, buckets and folders that a table may name besides its own.

    Returns:
        ``url, run, samples_seen, field, files, written, found`` (by an earlier start), ``skipped,
        skipped_examples, ignored, report, seconds, files_per_s``.

    Raises:
        CheckpointError: ``run`` is no run, or has no such checkpoint.
        ConfigError: its generator takes no such input, or an option is out of range.
        DataError: the source holds nothing usable, or ``out`` something else.
        InterruptedRunError: Ctrl-C; the same call resumes.
    """
    from gatdist.monitor import applying as events
    from gatdist.runs import applying

    for name, value in (("--tile", tile), ("--batch", batch), ("--workers", workers)):
        if value is not None and value < 1:
            raise ConfigError(name, "must be at least 1", value=value)
    on_ray = bool(address) or (workers or 1) > 1
    if not on_ray:
        device_named(device)
    request = applying.Request(
        run=absolute(run),
        source=absolute(source),
        dest=absolute(out),
        checkpoint=str(checkpoint),
        kind=kind,
        column=column,
        tile=tile,
        batch=batch,
        device=device,
        label=str(label),
        strict=strict,
        source_options=dict(source_options or {}),
        dest_options=dict(out_options or {}),
        allowed_origins=tuple(allowed_origins),
    )
    with _Work(console, f"the outputs that are complete stay in {out}") as work:
        plan = applying.prepare(request)
        work.show(events.applying(applying.summary(plan)))
        if plan.tasks and on_ray:
            from gatdist.cluster.work import do_all

            records = do_all(
                applying.Worker,
                plan.job,
                plan.tasks,
                address or "local",
                workers,
                work.report,
                console,
                keeps_worker=True,
            )
        else:
            records = work.do_all(applying.Worker, plan.job, plan.tasks, 1)
        outcome = applying.finish(plan, records) | work.speed("files_per_s")
        work.show(events.applied(outcome))
    return outcome


def export(run: str | PathLike[str], kind: str, *, out: str | PathLike[str]) -> str:
    """Write the run's averaged generator for use elsewhere; return the URL written.

    Args:
        kind: ``onnx``, ``torch`` (a program of ``torch.export``) or ``safetensors``.
        out: URL of the file; the format's extension is appended if missing.

    Raises:
        CheckpointError: ``run`` is no run, or has no complete checkpoint.
        ConfigError: no such format, or a package that it needs is not installed.
    """
    run, url = absolute(run), absolute(out)  # first: torch does not load in a deleted folder
    import torch

    from gatdist.runs import load_run
    from gatdist.runs.export import ENDINGS, formats

    make = formats[kind]
    url = url if url.endswith(ENDINGS[kind]) else url + ENDINGS[kind]
    content = make(load_run(Store(run), torch.device("cpu")))
    store, name = at_file(url)
    store.publish(name, content)
    return url


def import_weights(
    family: str,
    generator: str | PathLike[str],
    run_dir: str | PathLike[str],
    *,
    discriminator: str | PathLike[str] | None = None,
    allow_pickle: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Make a run of published weights, to sample, evaluate, export, and train from it.

    To train from it, set ``model.init_from`` to its folder and the section ``model`` as returned.

    Args:
        family: ``r3gan``, ``stylegan2-ada`` or ``biggan``.
        generator: a state dict of the averaged generator with the names of its authors' code:
            safetensors, of this network or of several under ``G_ema.``, ``G.`` and ``D.``.
        run_dir: the run directory, which must hold no run.
        discriminator: likewise; None keeps initial weights.
        allow_pickle: the files are pickles, and read with ``weights_only=True``.
        overrides: ``section.key=value``, for what shapes do not say.

    Returns:
        ``run_dir``, ``family``, ``model`` (the section), ``sample_shape``, ``num_classes``,
        ``imported`` (the networks with imported weights).

    Raises:
        CheckpointError: a file can't be read, or its tensors are not those of the family.
        ConfigError: an unknown family or key.
    """
    from gatdist.runs.importing import import_weights

    files: dict[Any, str] = {"generator": absolute(generator)}
    if discriminator is not None:
        files["discriminator"] = absolute(discriminator)
    url = absolute(run_dir)
    return import_weights(family, url, files, allow_pickle=allow_pickle, overrides=overrides)


@overload
def load(
    run: str | PathLike[str],
    player: Literal["generator"] = "generator",
    *,
    device: str = "cpu",
    checkpoint: str | int = "",
) -> Generator: ...
@overload
def load(
    run: str | PathLike[str],
    player: Literal["discriminator"],
    *,
    device: str = "cpu",
    checkpoint: str | int = "",
) -> nn.Module: ...
def load(
    run: str | PathLike[str],
    player: Literal["generator", "discriminator"] = "generator",
    *,
    device: str = "cpu",
    checkpoint: str | int = "",
) -> nn.Module:
    """Return a trained network in evaluation mode.

    Args:
        run: a run directory, or a ``.safetensors`` file that :func:`export` made.
        player: ``generator`` is the averaged generator, a
            :class:`~gatdist.runs.generator.Generator`: call it with latents [n, latent_size] and
            labels int64 [n], or with fields by name, such as ``vocoder(wave=…)``,
            ``vocoder(mel=…)`` or ``model(input=…)``; its ``network`` is the plain module.
            ``discriminator`` is a plain module: samples → logits [n].
        device: such as ``cuda:0``.
        checkpoint: name or ``samples_seen`` of one; by default the newest.

    Raises:
        CheckpointError: no run there, or no complete checkpoint, or none of this name.
        ConfigError: no such device.
    """
    url = absolute(run)
    place = device_named(device)
    from gatdist.runs import load_run
    from gatdist.runs.export import load_exported
    from gatdist.runs.generator import Generator

    if url.endswith(".safetensors"):
        if player != "generator" or checkpoint:
            rule = "holds one generator alone"
            raise CheckpointError(redact_url(url), rule, hint="Load the run directory")
        store, name = at_file(url)
        return load_exported(store.read(name), url).to(place)
    trained = load_run(Store(url), place, str(checkpoint))
    return Generator.of(trained) if player == "generator" else trained.discriminator


def evaluate(
    run: str | PathLike[str],
    metrics: list[str] | None = None,
    num: int | None = None,
    *,
    against: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the averaged generator of a run, or samples generated elsewhere.

    If you trained the run on this machine, its own configuration locates the data. For a run of
    somebody else, only data next to the run (same server or bucket) is used; name everything else
    in ``overrides``.

    Args:
        run: a run directory; with ``against``, also generated samples: a folder or zip of files, or
            a data set of shards.
        metrics: names; None takes ``evaluate.metrics`` (``fid`` and ``kid`` without a run), with
            statistics only those that need no real samples.
        num: samples to generate, or the number of the given ones to use; None takes
            ``evaluate.num_samples``, without a run all.
        against: real data instead of the run's own: a data set of shards, a folder or zip of files,
            or a file of statistics (``.npz``), see :func:`gatdist.statistics`.
        overrides: ``section.key=value``, such as ``evaluate.features=…``, ``data.resolution=…``.

    Returns:
        ``metrics``, ``num_samples``, ``samples_seen`` of a run, and the measurement ``protocol``.

    Raises:
        CheckpointError: ``run`` is no run, has no complete checkpoint, or its data has changed.
        ConfigError: no metric, an unknown one, one that needs more than there is, or a URL that
            only you may name.
        DataError: samples or statistics are damaged, or do not fit together.
    """
    url, other = _location(run), None if against is None else _location(against)
    from gatdist.runs import evaluation

    requested = evaluation.Requested(metrics, num, tuple(overrides))
    return evaluation.evaluate(url, requested, other, default_device())


def statistics(
    data: str | PathLike[str],
    out: str | PathLike[str],
    *,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Write mean and covariance of the features of real data, for :func:`gatdist.evaluate`.

    The file has the format of TTUR and pytorch-fid: an ``.npz`` with ``mu`` and ``sigma``.

    Args:
        data: a data set of shards, or a folder or zip of files.
        out: URL of the file; ``.npz`` is appended if missing.
        overrides: ``section.key=value``, such as ``evaluate.features=…``, ``data.resolution=…``.

    Returns:
        ``file``, ``num_samples``, ``num_features`` and the ``protocol``, which is in the file too.

    Raises:
        ConfigError: the features can't be used without the data.
        DataError: the data is damaged, or features do not fit it.
    """
    url, file = _location(data), absolute(out)
    from gatdist.evaluation.statistics import ENDING
    from gatdist.runs import evaluation

    file = file if file.endswith(ENDING) else file + ENDING
    return evaluation.save_statistics(url, file, overrides, default_device())


def _location(url: str | PathLike[str]) -> str:
    is_builtin = isinstance(url, str) and url.startswith("builtin:")
    return str(url) if is_builtin else absolute(url)


def _anchored(config: Config) -> Config:
    """The configuration with absolute paths: workers run in other folders."""

    def anchor(url: str) -> str:
        is_path = url and not url.startswith("builtin:") and not url.startswith("${env:")
        return absolute(url) if is_path else url

    def anchored(data: Any) -> Any:
        urls = {key: anchor(getattr(data, key)) for key in ("url", "shards_url")}
        return data.model_copy(update=urls)

    unpaired = {name: anchored(each) for name, each in config.data.unpaired.items()}
    data = anchored(config.data).model_copy(update={"unpaired": unpaired})
    model = config.model.model_copy(update={"init_from": anchor(config.model.init_from)})
    urls = {key: anchor(getattr(config.evaluate, key)) for key in ("url", "features_file")}
    evaluate = config.evaluate.model_copy(update=urls)
    terms = {name: _with_anchored_file(term, anchor) for name, term in config.game.terms.items()}
    game = config.game.model_copy(update={"terms": terms})
    return config.model_copy(
        update={"data": data, "model": model, "game": game, "evaluate": evaluate}
    )


def _with_anchored_file(term: TermConfig, anchor: Callable[[str], str]) -> TermConfig:
    """Return a term whose option ``file``, if it has one with a digest, is absolute."""
    file = term.options.get("file")
    if not isinstance(file, str) or "sha256" not in term.options:
        return term
    return term.model_copy(update={"file": anchor(file)})


def pack(
    source: str | PathLike[str],
    dest: str | PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    transform: str | None = None,
    filter: str | None = None,
    format: str = "keep",
    quality: int | None = None,
    color: str = "auto",
    background: str | None = None,
    bits: int | None = None,
    length: int | None = None,
    sample_rate: int | None = None,
    clip_length: int | None = None,
    clip_overlap: int = 0,
    shard_bytes: int = 256_000_000,
    kind: str | None = None,
    labels: str | None = None,
    column: str | None = None,
    fields: Mapping[str, str] | None = None,
    workers: int | None = None,
    address: str = "",
    strict: bool = False,
    dry_run: bool = False,
    source_options: Mapping[str, Any] | None = None,
    allowed_origins: Sequence[str] = (),
    dest_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Pack a source into shards, or resume after an interruption.

    Args:
        source: a folder, zip, tar, table or text, at any fsspec URL.
        dest: URL of the folder for the shards; empty, or holding the same interrupted packing.
        size: of images, (height, width) or one number for both; None keeps theirs.
        transform: ``center-crop`` (default), ``center-crop-wide``, ``center-crop-dhariwal`` or
            ``stretch``; see :mod:`gatdist.packing.images`.
        filter: ``lanczos`` (default), ``bicubic``, ``hamming``, ``bilinear`` or ``box``.
        format: of images: ``keep`` stores those that need no change as they are, others as PNG;
            ``png``, ``jpeg`` and ``webp`` apply to all.
        quality: 1 to 100, of JPEG (default 95) and WebP (default lossless).
        color: ``rgb``, ``gray``, or ``auto``: gray if all images are.
        background: color behind transparent images: a name or ``#rrggbb``; None is white.
        bits: per channel of images: 8 (default) or 16, stored as PNG.
        length: of audio, in samples: cut, or padded with silence. Of texts, in bytes read of each.
            None: the one that they share.
        sample_rate: of audio, in hertz; None: the commonest.
        clip_length: of audio, in samples: cut each file into clips of this length; the last one
            ends where the file ends. Shorter files are padded with silence.
        clip_overlap: samples that successive clips share, at least: every window of this length
            lies within a clip.
        shard_bytes: approximate.
        kind: of the source; None detects it.
        labels: ``none``, ``folders``, a column of a table, or a list of files and labels; None
            detects them.
        column: of a table, the one that holds the samples; None detects it.
        fields: for samples with several fields, where the files of each are: a folder inside the
            source, a path with ``*`` for the name of the sample, a column of a table, or the
            extension in WebDataset shards. ``target``, or else the first, is the generated field.
        workers: processes, or concurrent tasks on Ray; None: one per core.
        address: of a Ray cluster; ``local`` starts one here; "" works without Ray.
        strict: raise an error that names the samples that can't be packed.
        dry_run: plan only; write nothing.
        allowed_origins: servers, buckets and folders that a list may name besides its own, such as
            ``https://images.example`` or ``/data/images``. Nothing else is read, and servers get
            no credentials.

    Returns:
        ``url, kind, modality, sample_shape, num_classes, shards, samples, bytes, skipped,
        seconds, samples_per_s`` and more; of a dry run, the part that is known.

    Raises:
        ConfigError: an option is out of range, or does not go with another.
        DataError: the source holds nothing usable, or the destination something else.
        InterruptedRunError: Ctrl-C; the same call resumes.
    """
    from gatdist import packing

    given = {
        "size": (size, size) if isinstance(size, int) else size,
        **{"transform": transform, "filter": filter, "format": format},
        **{"quality": quality, "color": color, "background": background, "bits": bits},
        **{"shard_bytes": shard_bytes, "length": length, "sample_rate": sample_rate},
        **{"clip_length": clip_length, "clip_overlap": clip_overlap},
    }
    if labels and packing.is_list(labels):
        labels = absolute(labels)
    request = packing.Request(
        source=absolute(source),
        dest=absolute(dest),
        recipe=packing.read_recipe(given),
        selection=packing.Selection(kind, labels, column, packing.read_fields(fields or {})),
        strict=strict,
        source_options=dict(source_options or {}),
        allowed_origins=packing.read_origins(allowed_origins),
        dest_options=dict(dest_options or {}),
    )
    with _Work(console, f"the shards that are complete stay in {dest}") as work:
        plan = packing.prepare(request, dry_run=dry_run)
        return packing.preview(plan) if dry_run else _packed(work, plan, workers, address, console)


def _packed(
    work: _Work, plan: Packing, workers: int | None, address: str, console: Console | None
) -> dict[str, Any]:
    from gatdist import packing
    from gatdist.monitor import packing as events

    work.show(events.packing(packing.preview(plan)))
    if address:
        from gatdist.cluster.work import do_all

        worker = packing.Worker
        records = do_all(worker, plan.job, plan.tasks, address, workers, work.report, console)
    else:
        records = work.do_all(packing.Worker, plan.job, plan.tasks, workers)
    outcome = packing.finish(plan, records) | work.speed("samples_per_s")
    if plan.job.recipe.clip_length:  # recordings were counted
        clips = outcome["samples"] / sum(len(task.entries) for task in plan.tasks)
        outcome["samples_per_s"] = round(clips * outcome["samples_per_s"], 1)
    work.show(events.packed(outcome))
    return outcome


def index(
    source: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    extension: str | None = None,
    fields: Mapping[str, str] | None = None,
    labels: str | None = None,
    tokens: int | None = None,
    bits: int = 8,
    export: Sequence[str] = (),
    workers: int | None = None,
    strict: bool = False,
    options: Mapping[str, Any] | None = None,
    out_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make a data set of existing shards, or resume after an interruption.

    Each tar is read once, from end to end; none is changed or copied.

    Args:
        source: the folder of the shards, at any fsspec URL.
        out: folder for the indexes and the manifest; None: next to the shards.
        extension: of each sample's file, such as ``jpg``; None detects it.
        fields: for samples with several fields, the extension of each one's files: ``input.png``,
            or ``input.*`` for any. ``target``, or else the first, is the generated field.
        labels: source of each sample's class: an extension (``cls``, ``txt``), a field of its JSON
            file (``json:FIELD``) or ``none``; None takes ``cls`` if present.
        tokens: ``.npy`` files hold token ids of a vocabulary of this size, not points.
        bits: per channel of images as they are read: 8 or 16.
        export: indexes for other readers: ``dali``, ``energon``.
        workers: processes; None: one per core.
        strict: raise an error that names the samples that can't be used.
        out_options: of the storage of ``out``; on the same origin (server, or bucket), ``options``
            are used too.

    Returns:
        ``url, source, modality, sample_shape, num_classes, shards, samples, bytes, skipped,
        seconds, bytes_per_s, shards_url`` (required value of ``data.shards_url``, or "") and more.

    Raises:
        ConfigError: an option is out of range.
        DataError: there are no shards, or no sample can be used.
        InterruptedRunError: Ctrl-C; the same call resumes.
    """
    from gatdist.monitor import packing as events
    from gatdist.packing import indexing, read_fields

    url, dest = absolute(source), absolute(out or source)
    request = indexing.Request(
        source=url,
        dest=dest,
        extension=extension,
        fields=read_fields(fields or {}),
        labels=labels,
        num_tokens=tokens,
        bits=bits,
        exports=tuple(sorted(export)),
        strict=strict,
        options=dict(options or {}),
        out_options=options_for(dest, url, options or {}) | dict(out_options or {}),
    )
    with _Work(console, f"finished indexes stay in {out or source}") as work:
        plan = indexing.prepare(request)
        work.show(events.indexing(indexing.preview(plan)))
        records = work.do_all(indexing.Worker, plan.job, plan.tasks, workers)
        outcome = indexing.finish(plan, records) | work.speed("bytes_per_s")
        work.show(events.indexed(outcome))
    return outcome


def verify(
    url: str | PathLike[str],
    *,
    decode: bool = False,
    workers: int | None = None,
    options: Mapping[str, Any] | None = None,
    shards_url: str = "",
    shards_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Check every digest of a data set, a checkpoint, or all checkpoints of a run.

    Args:
        decode: decode each sample of a data set, too.
        workers: processes; None: one per core.
        shards_url: of a data set, the folder of its tars if it is on another origin (server, or
            bucket) than the manifest.

    Returns:
        ``url, kind, whole`` (nothing is damaged), ``damaged`` (pairs of subject and problem),
        numbers of ``checkpoints``, or ``shards`` and ``samples``, and ``seconds``.

    Raises:
        DataError: the manifest itself is damaged.
        StorageError: no data set, checkpoint or run is there.
    """
    from gatdist.data.format.manifest import MANIFEST, read_manifest
    from gatdist.monitor import packing as events

    url = absolute(url)
    store = Store(url, options)
    with _Work(console, "nothing was changed") as work:
        if store.exists(MANIFEST):
            from gatdist.packing import verify as shards

            manifest = read_manifest(store)
            num_bytes = sum(shard.size for shard in manifest.shards)
            work.show([events.verifying(store.url, len(manifest.shards), num_bytes)])
            job = shards.Job(
                url=url,
                options=dict(options or {}),
                shards_url=absolute(shards_url) if shards_url else "",
                shards_options=dict(shards_options or {}),
                decode=decode,
            )
            tasks = [shards.Task(number) for number in range(len(manifest.shards))]
            records = work.do_all(shards.Worker, job, tasks, workers)
            outcome: dict[str, Any] = {
                "kind": "dataset",
                "shards": len(manifest.shards),
                "samples": manifest.num_samples,
                "damaged": [list(found) for record in records for found in record.damaged],
            }
        else:
            from gatdist.runs.inspection import damaged_checkpoints

            outcome = damaged_checkpoints(store)
        outcome |= {"url": store.url, "whole": not outcome["damaged"]} | work.speed("per_s")
        work.show(events.verified(outcome))
    return outcome


class _Work:
    """Long work that shows its progress and can be interrupted; ``kept`` says what then stays."""

    def __init__(self, console: Console | None, kept: str) -> None:
        self._console, self._kept = console, kept
        self._started_s = time.monotonic()
        self._done = 0

    def show(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        for kind, fields in events:
            if self._console:
                self._console.event(kind, fields)

    def report(self, done: int, found: int) -> None:
        self._done += done
        self.show([("progress", {"done": done, "found": found})])

    def do_all(self, worker_type: Any, job: Any, tasks: Sequence[Any], workers: int | None) -> Any:
        from gatdist.packing.processes import do_all

        count = workers or usable_cores()
        return do_all(worker_type, job, tasks, count, self.report)

    def speed(self, name: str) -> dict[str, float]:
        seconds = time.monotonic() - self._started_s
        return {"seconds": round(seconds, 3), name: round(self._done / seconds, 1)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self._console:
            self._console.close()
        if isinstance(error, KeyboardInterrupt):
            message = f"interrupted; {self._kept}. Run the same command to resume."
            raise InterruptedRunError(message) from None

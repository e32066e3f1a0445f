"""The functions behind the commands, for Python: each takes what its command takes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gatdist.config import Config
from gatdist.errors import CheckpointError, ClusterError, InterruptedRunError

if TYPE_CHECKING:
    from gatdist.monitor.console import Console
    from gatdist.monitor.progress import ProgressConsole


def train(
    config: Config, run_dir: str, *, local: bool = False, console: Console | None = None
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
        GatdistError: see :mod:`gatdist.errors`.
    """
    run_dir = absolute(run_dir)
    if local:
        if config.cluster.workers > 1:
            raise ClusterError(
                "--local", "runs one process", value=True, mend="Leave out --workers, or --local"
            )
        from gatdist.training.local import run_here

        outcome = run_here(config, run_dir, console)
    else:
        from gatdist.cluster.launch import fit
        from gatdist.training.plan import check

        check(config, run_dir)  # here, since Ray takes a while to start
        outcome = fit(config, run_dir, console)
    if outcome["status"] == "interrupted":
        raise InterruptedRunError(
            f"interrupted at {outcome['samples_seen']:,} samples; everything is saved in {run_dir} "
            "and the same command goes on from there"
        )
    return outcome


def sample(run: str, num: int, *, out: str, seed: int = 0, grid: bool = False) -> list[str]:
    """Write ``num`` fakes of the run's averaged generator into the folder ``out``.

    Args:
        run: a run directory.
        num: how many (> 0).
        out: a folder (``000000.png`` …), or with ``grid`` one picture.
        seed: of the noise; the same seed gives the same fakes, whatever ``num`` is.
        grid: one picture of all.

    Returns:
        The URLs of the files written.

    Raises:
        CheckpointError: ``run`` is no run, or has no whole checkpoint.
    """
    from gatdist.runs import load_generator
    from gatdist.sampling import write_samples
    from gatdist.storage import Store

    generator = load_generator(Store(absolute(run)), default_device())
    return write_samples(generator, num, seed=seed, out=absolute(out), grid=grid)


def evaluate(run: str, metrics: list[str] | None = None, num: int | None = None) -> dict[str, Any]:
    """Measure the averaged generator of a run against its data.

    Args:
        run: a run directory.
        metrics: names; None takes the run's ``evaluate.metrics``.
        num: fakes to generate; None takes the run's ``evaluate.num_samples``.

    Returns:
        ``metrics``, ``num_samples``, ``samples_seen`` and the ``protocol`` that the numbers were
        made by.

    Raises:
        CheckpointError: ``run`` is no run, has no whole checkpoint, or its data has changed.
        ConfigError: a metric that is not known.
    """
    from gatdist.data import open_dataset
    from gatdist.evaluation import Evaluator
    from gatdist.parallel.communicator import LocalCommunicator
    from gatdist.runs import load_generator
    from gatdist.storage import Store

    comm = LocalCommunicator(default_device())
    generator = load_generator(Store(absolute(run)), comm.device)
    dataset = open_dataset(generator.config.data)
    state = generator.checkpoint.state
    if dataset.fingerprint != state["order"]["fingerprint"]:
        raise CheckpointError(
            f"{run}: fingerprint",
            f"the run was trained on other data ({state['order']['fingerprint'][:16]}…)",
            value=dataset.fingerprint[:16] + "…",
            mend="Restore the data at data.url",
        )
    asked = {k: v for k, v in {"metrics": metrics, "num_samples": num}.items() if v is not None}
    evaluator = Evaluator(
        generator.config.evaluate.model_copy(update=asked), dataset, comm, comm.device
    )
    seed = generator.config.run.seed
    evaluation = evaluator(generator.sampler(seed, "evaluation"))
    return {
        "metrics": evaluation.metrics,
        "num_samples": evaluation.protocol["num_generated"],
        "samples_seen": state["samples_seen"],
        "protocol": evaluation.protocol,
    }


def pack(
    source: str,
    dest: str,
    *,
    size: int | tuple[int, int] | None = None,
    transform: str | None = None,
    filter: str | None = None,
    format: str = "keep",
    quality: int | None = None,
    color: str = "auto",
    length: int | None = None,
    sample_rate: int | None = None,
    shard_bytes: int = 256_000_000,
    kind: str | None = None,
    labels: str | None = None,
    column: str | None = None,
    workers: int | None = None,
    address: str = "",
    strict: bool = False,
    dry_run: bool = False,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    console: ProgressConsole | None = None,
) -> dict[str, Any]:
    """Pack a source into shards, or go on with a packing that was interrupted.

    Args:
        source: a folder, zip, tar, table or text, at any fsspec URL.
        dest: URL of the folder for the shards; empty, or of the same packing.
        size: of pictures, (height, width) or both at once; None leaves them as they are.
        transform: ``center-crop`` (the default), ``center-crop-wide``, ``center-crop-dhariwal`` or
            ``stretch``; see :mod:`gatdist.data.packing.pictures`.
        filter: ``lanczos`` (the default), ``bicubic``, ``hamming``, ``bilinear`` or ``box``.
        format: of pictures: ``keep`` stores those that need no change as they are, others as PNG;
            ``png``, ``jpeg`` and ``webp`` are for all.
        quality: 1 to 100, of JPEG (95) and WebP (lossless).
        color: ``rgb``, ``gray``, or ``auto``: gray where all pictures are.
        length: of sounds, in samples: the rest is cut off, or silence added. Of texts, in bytes: so
            many are read of each. None: they have one in common.
        sample_rate: of sounds, in hertz; None for that of most.
        shard_bytes: what a shard should have, about.
        kind: of the source; None recognizes it.
        labels: ``none``, ``folders``, a column of a table, or a list of files and labels; None
            takes what is there.
        column: of a table, the one that holds the samples; None recognizes it.
        workers: processes, or tasks at a time on Ray; None for one a core. Has no influence on what
            is written.
        address: of a Ray cluster to work on; ``local`` starts one here; "" works without Ray.
        strict: a sample that can't be packed is an error, instead of a line of the report.
        dry_run: say what would be written, and write nothing.
        source_options: of the source's storage.
        dest_options: of the destination's storage.
        console: shows progress; None shows nothing.

    Returns:
        ``url, kind, modality, sample_shape, num_classes, shards, samples, bytes, left_out,
        seconds, samples_per_s`` and more; of a dry run, what is known of them.

    Raises:
        ConfigError: an option is out of range, or does not go with another.
        DataError: the source holds nothing usable, or the destination something else.
        InterruptedRunError: Ctrl-C; the same call goes on.
        GatdistError: see :mod:`gatdist.errors`.
    """
    from gatdist.data import packing
    from gatdist.monitor.packing import closing, opening

    given = {
        "size": (size, size) if isinstance(size, int) else size,
        **{"transform": transform, "filter": filter, "format": format},
        **{"quality": quality, "color": color, "shard_bytes": shard_bytes},
        **{"length": length, "sample_rate": sample_rate},
    }
    if labels and packing.is_list(labels):
        labels = absolute(labels)
    request = packing.Request(
        source=absolute(source),
        dest=absolute(dest),
        recipe=packing.read_recipe(given),
        asked=packing.Asked(kind, labels, column),
        strict=strict,
        source_options=source_options or {},
        dest_options=dest_options or {},
    )
    emit = console.event if console else lambda kind, fields: None
    began_s = time.monotonic()
    outcome: dict[str, Any] = {}
    counts = [0, 0]

    def tell(packed: int, found: int) -> None:
        counts[0], counts[1] = counts[0] + packed, counts[1] + found
        emit("progress", {"done": packed, "found": found})

    try:
        plan = packing.prepare(request, dry_run=dry_run)
        if dry_run:
            return packing.preview(plan)
        for event, fields in opening(packing.preview(plan)):
            emit(event, fields)
        if address:
            from gatdist.cluster.packing import do_all

            records = do_all(plan.job, plan.tasks, address, workers, tell, console)
        else:
            processes = workers or len(os.sched_getaffinity(0))
            records = packing.do_all(plan.job, plan.tasks, processes, tell)
        outcome = packing.finish(plan, records)
    except KeyboardInterrupt:
        where = f"the shards that are whole stay in {dest}, and the same command goes on from there"
        raise InterruptedRunError(f"interrupted; {where}") from None
    finally:
        if console and not outcome:
            console.close()
    seconds = time.monotonic() - began_s
    outcome |= {"seconds": round(seconds, 3), "samples_per_s": round(counts[0] / seconds, 1)}
    for event, fields in closing(outcome):
        emit(event, fields)
    return outcome


def default_device() -> Any:
    """The first CUDA device if there is one, else the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def absolute(url: str) -> str:
    """A local path made absolute, since workers may start in another folder; a URL as it is."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))

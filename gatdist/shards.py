"""What is done to shards: the functions behind ``gatdist pack`` and ``index``, for Python."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gatdist.common.errors import ConfigError, InterruptedRunError
from gatdist.storage import Store, absolute, options_for

if TYPE_CHECKING:
    from gatdist.monitor.progress import ProgressConsole


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
    shard_bytes: int = 256_000_000,
    kind: str | None = None,
    labels: str | None = None,
    column: str | None = None,
    workers: int | None = None,
    address: str = "",
    strict: bool = False,
    dry_run: bool = False,
    source_options: Mapping[str, Any] | None = None,
    allowed_origins: Sequence[str] = (),
    dest_options: Mapping[str, Any] | None = None,
    console: ProgressConsole | None = None,
) -> dict[str, Any]:
    """Pack a source into shards, or go on with a packing that was interrupted.

    Args:
        source: a folder, zip, tar, table or text, at any fsspec URL.
        dest: URL of the folder for the shards; empty, or of the same packing.
        size: of pictures, (height, width) or both at once; None leaves them as they are.
        transform: ``center-crop`` (the default), ``center-crop-wide``, ``center-crop-dhariwal`` or
            ``stretch``; see :mod:`gatdist.packing.images`.
        filter: ``lanczos`` (the default), ``bicubic``, ``hamming``, ``bilinear`` or ``box``.
        format: of pictures: ``keep`` stores those that need no change as they are, others as PNG;
            ``png``, ``jpeg`` and ``webp`` are for all.
        quality: 1 to 100, of JPEG (95) and WebP (lossless).
        color: ``rgb``, ``gray``, or ``auto``: gray where all pictures are.
        background: what transparent images are composited on: a color's name or ``#rrggbb``; None
            is white.
        bits: of each channel of images: 8 (None), or 16, which is stored as PNG.
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
        strict: samples that can't be packed are an error that names them, when all are known.
        dry_run: say what would be written, and write nothing.
        source_options: of the source's storage.
        allowed_origins: servers, buckets and folders that a list may name beside its own, such as
            ``https://images.example`` or ``/data/images``. Nothing else is read, and servers get
            no credentials.
        dest_options: of the destination's storage.
        console: shows progress; None shows nothing.

    Returns:
        ``url, kind, modality, sample_shape, num_classes, shards, samples, bytes, skipped,
        seconds, samples_per_s`` and more; of a dry run, what is known of them.

    Raises:
        ConfigError: an option is out of range, or does not go with another.
        DataError: the source holds nothing usable, or the destination something else.
        InterruptedRunError: Ctrl-C; the same call goes on.
        GatdistError: see :mod:`gatdist.common.errors`.
    """
    from gatdist import packing
    from gatdist.monitor.packing import closing, opening

    given = {
        "size": (size, size) if isinstance(size, int) else size,
        **{"transform": transform, "filter": filter, "format": format},
        **{"quality": quality, "color": color, "background": background, "bits": bits},
        **{"shard_bytes": shard_bytes},
        **{"length": length, "sample_rate": sample_rate},
    }
    if labels and packing.is_list(labels):
        labels = absolute(labels)
    for url in allowed_origins:
        if "://" not in url and not url.startswith("/"):
            hint = f"Say https://{url}"
            rule = "must be a URL or the absolute path of a folder"
            raise ConfigError("--allow-origin", rule, value=url, hint=hint)
    request = packing.Request(
        source=absolute(source),
        dest=absolute(dest),
        recipe=packing.read_recipe(given),
        asked=packing.Asked(kind, labels, column),
        strict=strict,
        source_options=source_options or {},
        allowed_origins=tuple(allowed_origins),
        dest_options=dest_options or {},
    )
    with _Work(console, f"the shards that are whole stay in {dest}") as work:
        plan = packing.prepare(request, dry_run=dry_run)
        if dry_run:
            return packing.preview(plan)
        work.show(opening(packing.preview(plan)))
        if address:
            from gatdist.cluster.packing import do_all as do_all_on_ray

            records = do_all_on_ray(plan.job, plan.tasks, address, workers, work.report, console)
        else:
            records = work.do_all(packing.Worker, plan.job, plan.tasks, workers)
        outcome = packing.finish(plan, records) | work.pace("samples_per_s")
        work.show(closing(outcome))
    return outcome


def index(
    source: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    extension: str | None = None,
    labels: str | None = None,
    tokens: int | None = None,
    bits: int = 8,
    export: Sequence[str] = (),
    workers: int | None = None,
    strict: bool = False,
    options: Mapping[str, Any] | None = None,
    out_options: Mapping[str, Any] | None = None,
    console: ProgressConsole | None = None,
) -> dict[str, Any]:
    """Make a data set of shards that others wrote, or go on where that was interrupted.

    Each tar is read once, from end to end. Nothing of it is changed or copied.

    Args:
        source: the folder of the shards, at any fsspec URL.
        out: where the indexes and the manifest go; None puts them beside the shards.
        extension: of each sample's file, such as ``jpg``; None recognizes it.
        labels: where each sample's class is: an ending (``cls``, ``txt``), a field of its JSON file
            (``json:FIELD``) or ``none``; None takes ``cls`` where it is there.
        tokens: ``.npy`` files hold token ids of a vocabulary of this size, not points.
        bits: of each channel of images as they are read: 8 or 16.
        export: other indexes to write: ``dali``, ``energon``.
        workers: processes; None for one a core. Has no influence on what is written.
        strict: samples that can't be used are an error that names them, when all are known.
        options: of the storage of the shards.
        out_options: of that of ``out``; where it is on the same origin (server, or bucket),
            ``options`` are used too.
        console: shows progress; None shows nothing.

    Returns:
        ``url, source, modality, sample_shape, num_classes, shards, samples, bytes, skipped,
        seconds, bytes_per_s, shards_url`` (what ``data.shards_url`` must be set to, or "") and
        more.

    Raises:
        ConfigError: an option makes no sense.
        DataError: there are no shards, or no sample can be used.
        InterruptedRunError: Ctrl-C; the same call goes on.
        GatdistError: see :mod:`gatdist.common.errors`.
    """
    from gatdist.monitor.indexing import closing, opening
    from gatdist.packing import indexing

    request = indexing.Request(
        source=absolute(source),
        dest=absolute(out or source),
        component=extension,
        labels=labels,
        num_tokens=tokens,
        bits=bits,
        exports=export,
        strict=strict,
        options=options or {},
        out_options=options_for(absolute(out or source), absolute(source), options or {})
        | dict(out_options or {}),
    )
    with _Work(console, f"what was indexed stays in {out or source}") as work:
        plan = indexing.prepare(request)
        work.show(opening(indexing.preview(plan)))
        records = work.do_all(indexing.Worker, plan.job, plan.tasks, workers)
        outcome = indexing.finish(plan, records) | work.pace("bytes_per_s")
        work.show(closing(outcome))
    return outcome


def verify(
    url: str | PathLike[str],
    *,
    decode: bool = False,
    workers: int | None = None,
    options: Mapping[str, Any] | None = None,
    shards_url: str = "",
    shards_options: Mapping[str, Any] | None = None,
    console: ProgressConsole | None = None,
) -> dict[str, Any]:
    """Check every digest of a data set, a checkpoint, or all checkpoints of a run.

    Args:
        url: of it.
        decode: of a data set, decode each sample, too.
        workers: processes; None for one a core.
        options: of its storage.
        shards_url: of a data set, the folder of its tars, where it is on another origin (server,
            or bucket) than the manifest.
        shards_options: of their storage.
        console: shows progress; None shows nothing.

    Returns:
        ``url, kind, whole`` (whether nothing is damaged), ``damaged`` (what, and what is wrong with
        it), how many ``checkpoints``, or ``shards`` and ``samples`` there are, and ``seconds``.

    Raises:
        DataError: the manifest itself is damaged.
        StorageError: nothing of ours is there.
        GatdistError: see :mod:`gatdist.common.errors`.
    """
    from gatdist.data.format import MANIFEST, read_manifest
    from gatdist.monitor.indexing import verified, verifying

    url = absolute(url)
    store = Store(url, options)
    with _Work(console, "nothing was changed") as work:
        if store.exists(MANIFEST):
            from gatdist.packing import verify as shards

            manifest = read_manifest(store)
            num_bytes = sum(shard.size for shard in manifest.shards)
            work.show(verifying(store.url, len(manifest.shards), num_bytes))
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
        outcome |= {"url": store.url, "whole": not outcome["damaged"]} | work.pace("per_s")
        work.show(verified(outcome))
    return outcome


class _Work:
    """Long work that shows its progress and can be interrupted.

    Args:
        console: shows it, if there is one.
        kept: what stays if it is interrupted, as the begin of a sentence.
    """

    def __init__(self, console: ProgressConsole | None, kept: str) -> None:
        self._console, self._kept = console, kept
        self._began_s = time.monotonic()
        self._done = 0

    def show(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Show events."""
        for kind, fields in events:
            if self._console:
                self._console.event(kind, fields)

    def report(self, done: int, found: int) -> None:
        """So much was done, and so much found done, since the last call."""
        self._done += done
        self.show([("progress", {"done": done, "found": found})])

    def do_all(self, worker_type: Any, job: Any, tasks: Sequence[Any], workers: int | None) -> Any:
        """Do tasks in processes; None is one a core."""
        from gatdist.packing.processes import do_all

        count = workers or len(os.sched_getaffinity(0))
        return do_all(worker_type, job, tasks, count, self.report)

    def pace(self, rate: str) -> dict[str, float]:
        """Seconds so far, and what was done in each, under the name ``rate``."""
        seconds = time.monotonic() - self._began_s
        return {"seconds": round(seconds, 3), rate: round(self._done / seconds, 1)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is None:
            return
        if self._console:
            self._console.close()
        if isinstance(error, KeyboardInterrupt):
            message = f"interrupted; {self._kept}, and the same command goes on from there"
            raise InterruptedRunError(message) from None

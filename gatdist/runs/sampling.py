"""Writing samples of a trained generator, to files or into shards."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from gatdist.common.errors import ConfigError, StorageError
from gatdist.data.format.manifest import SampleSpec, Shard, write_manifest
from gatdist.data.format.shard_files import write_shard
from gatdist.monitor.previews import preview
from gatdist.packing.processes import Report, ShardTask, Worker, do_all
from gatdist.runs import Sampler, TrainedRun, load_run
from gatdist.storage import Store
from gatdist.storage.store import at_file

# Samples per forward. Always the same, since convolutions may round differently in other batches.
CHUNK = 256
SHARD_SAMPLES = 40 * CHUNK
MAX_SAMPLES = 10**9
_MAX_VALUES = 2**29  # in one file: 2 GiB in float32
_ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
_FRAME_MS = 40


def require_num(num: int) -> None:
    """Raise ConfigError if ``num`` samples can't be generated."""
    if not 0 < num <= MAX_SAMPLES:
        raise ConfigError("--num", f"must be 1 to {MAX_SAMPLES:,}", value=num)


def require_latents(run: TrainedRun) -> None:
    """Raise ConfigError if the run's generator has inputs from the data."""
    if run.task.has_inputs:
        rule = "generates from inputs of the data, not from latents alone"
        hint = "Use gatdist apply RUN INPUT OUT"
        raise ConfigError("game.task", rule, value=run.config.game.task.name, hint=hint)


@dataclass(frozen=True)
class SampleRequest:
    """Which samples to generate. Sample i of a seed does not depend on their number."""

    num: int
    seed: int = 0
    labels: Sequence[str] = ()  # numbers or names of classes, used cyclically; (): random
    truncation: float | None = None  # see gatdist.runs.trained.Sampler
    interpolate: int = 0  # steps from each sample to the next, and from the last to the first

    def __post_init__(self) -> None:
        require_num(self.num)
        if not 0 <= self.interpolate <= MAX_SAMPLES:
            rule = f"must be 0 to {MAX_SAMPLES:,}"
            raise ConfigError("--interpolate", rule, value=self.interpolate)
        if self.truncation is not None and not self.truncation > 0:
            raise ConfigError("--truncation", "must be above 0", value=self.truncation)


def write_samples(run: TrainedRun, requested: SampleRequest, *, out: str, grid: bool) -> list[str]:
    """Write samples to a file each (``000000.png`` …), or all in one; return the URLs.

    ``out`` is the URL of a folder, of an animation (``.gif``, ``.webp``) or, with ``grid``, of one
    file: ``.png`` of images (a row per interpolation), points or spectrograms, ``.wav`` of
    concatenated audio, or ``.txt`` with one text per line.
    """
    require_latents(run)
    labels = _class_numbers(run, requested.labels)
    animation = next((kind for ending, kind in _ANIMATIONS.items() if out.endswith(ending)), None)
    if animation or grid:
        samples = _all_samples(run, requested, labels)
        if animation:
            content = _animated(run, samples, animation)
        else:
            columns = requested.interpolate or None
            files = preview(run.sample_format, samples, columns=columns).files()
            ending = next((e for e in files if out.endswith(e)), "")
            if not ending:
                ending = next(iter(files))
                out += ending
            content = files[ending]()
        store, name = at_file(out)
        store.publish(name, content)
        return [out]
    store, sample_format = Store(out), run.sample_format
    written = []
    for start, chunk in _samples(run, requested, labels):
        for i, sample in enumerate(sample_format.to_samples(chunk).numpy(), start=start):
            file = f"{i:06d}{sample_format.ending}"
            store.publish(file, sample_format.encode(sample))
            written.append(f"{out.rstrip('/')}/{file}")
    return written


def _animated(run: TrainedRun, samples: Tensor, kind: str) -> bytes:
    if run.sample_format.modality != "image":
        raise ConfigError(
            "--out",
            f"an animation shows images, and the run generates {run.sample_format.modality}",
            value=kind.lower(),
            hint="Name a folder",
        )
    from PIL import Image

    frames = []
    for i in range(len(samples)):
        image: NDArray[np.uint8] | None = preview(run.sample_format, samples[i : i + 1]).image
        assert image is not None
        frames.append(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image))
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0)
    return file.getvalue()


def _samples(
    run: TrainedRun, requested: SampleRequest, labels: list[int] | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield chunks of samples as networks see them, with the first one's number."""
    sampler = run.sampler(requested.seed, "sample", requested.truncation)
    if requested.interpolate:
        label, steps = labels[0] if labels else None, requested.interpolate
        for i, start in itertools.product(range(requested.num), range(0, steps, CHUNK)):
            shares = torch.arange(start, min(steps, start + CHUNK), dtype=torch.float64) / steps
            between = sampler.between(i, (i + 1) % requested.num, shares, label)
            yield i * steps + start, between.cpu()
        return
    for start, chunk, _ in chunks_of(sampler, 0, requested.num, labels):
        yield start, chunk


def _all_samples(run: TrainedRun, requested: SampleRequest, labels: list[int] | None) -> Tensor:
    num = requested.num * max(1, requested.interpolate)
    if num * math.prod(run.sample_format.shape) > _MAX_VALUES:
        most = max(1, _MAX_VALUES // math.prod(run.sample_format.shape))
        raise ConfigError(
            "--num" if requested.interpolate < requested.num else "--interpolate",
            f"gives {num:,} samples, and one file holds at most {most:,} of these",
            value=max(requested.num, requested.interpolate),
            hint="Request fewer, or write a file for each: --out FOLDER without --grid",
        )
    return torch.cat([chunk for _, chunk in _samples(run, requested, labels)])


def chunks_of(
    sampler: Sampler, begin: int, end: int, labels: list[int] | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield samples ``begin`` to ``end`` − 1 in chunks: first number, samples, classes.

    On the CPU. ``begin`` is a multiple of the chunk. ``labels`` are used cyclically; None: random.
    """
    device = next(sampler.network.parameters()).device
    for start in range(begin, end, CHUNK):
        count = min(CHUNK, end - start)
        positions = torch.arange(start, start + CHUNK, device=device)  # the last chunk is full too
        if labels is None:
            classes = sampler.labels(positions)
        else:
            classes = torch.tensor(labels, device=device)[positions % len(labels)]
        chunk = sampler(positions, classes)[:count].cpu()
        yield start, chunk, None if classes is None else classes[:count].cpu()


def _class_numbers(run: TrainedRun, requested: Sequence[str]) -> list[int] | None:
    return [run.class_number(word, "--labels") for word in requested] or None


class _Job(BaseModel):
    run: str
    out: str
    seed: int
    truncation: float | None
    labels: list[int] | None


@dataclass(frozen=True)
class _Task(ShardTask):
    """One shard: samples ``begin`` to ``end`` − 1."""

    begin: int
    end: int


class _ShardSampler(Worker[Shard]):
    job_type: ClassVar = _Job
    task_type: ClassVar = _Task
    record_type: ClassVar = Shard

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._run: TrainedRun | None = None

    def do(self, task: _Task, report: Report) -> Shard:
        if self._run is None:
            device = torch.device("cpu")
            if torch.cuda.is_available():  # workers share the GPUs
                device = torch.device("cuda", task.number % torch.cuda.device_count())
            self._run = load_run(Store(self._job.run), device)
        samples = self._samples(self._run, task, report)
        return write_shard(Store(self._job.out), f"shard-{task.number:06d}", samples)

    def _samples(
        self, run: TrainedRun, task: _Task, report: Report
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        sampler = run.sampler(self._job.seed, "sample", self._job.truncation)
        ending = run.sample_format.ending.removeprefix(".")
        for start, chunk, classes in chunks_of(sampler, task.begin, task.end, self._job.labels):
            for i, sample in enumerate(run.sample_format.to_samples(chunk).numpy()):
                files = {ending: run.sample_format.encode(sample)}
                if classes is not None:
                    files["cls"] = b"%d" % int(classes[i])
                yield f"{start + i:09d}", files
            report(len(chunk), 0)


def write_shards(
    run: TrainedRun,
    url: str,
    requested: SampleRequest,
    *,
    out: str,
    workers: int = 1,
) -> list[str]:
    """Write samples as a data set by ``workers`` processes; return the shards' URLs.

    ``url`` is the run's, for the other processes. The manifest is written last.
    """
    require_latents(run)
    if workers < 1:
        raise ConfigError("--workers", "must be at least 1", value=workers)
    if requested.interpolate:
        raise ConfigError("--interpolate", "does not go with --shards", value=requested.interpolate)
    if Store(out).exists("config.json"):
        rule = "is a run directory, and a data set needs a folder of its own"
        raise StorageError(Store(out).url, rule, hint="Choose another folder")
    labels = _class_numbers(run, requested.labels)
    job = _Job(
        run=url, out=out, seed=requested.seed, truncation=requested.truncation, labels=labels
    )
    tasks = [
        _Task(number, begin, min(requested.num, begin + SHARD_SAMPLES))
        for number, begin in enumerate(range(0, requested.num, SHARD_SAMPLES))
    ]
    shards = do_all(_ShardSampler, job, tasks, workers, lambda done, known: None)
    spec = run.sample_format.spec
    given: dict[str, Any] = spec.model_dump(
        include={"modality", "bits", "sample_rate", "num_tokens"}
    )
    given["sample_shape"] = list(run.sample_format.sample_shape)
    if run.num_classes:
        given |= {"num_classes": run.num_classes, "class_names": spec.class_names}
    write_manifest(Store(out), shards, SampleSpec(**given))
    return [f"{out.rstrip('/')}/{shard.name}" for shard in shards]

"""Samples as a data set of shards, by several processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel

from gatdist.common.errors import ConfigError, StorageError
from gatdist.data import Shard, write_manifest, write_shard
from gatdist.data.format import SampleSpec
from gatdist.packing.processes import Report, do_all
from gatdist.runs import TrainedRun, load_run
from gatdist.runs.sampling.request import CHUNK, SampleRequest, chunks_of, class_numbers
from gatdist.storage import Store

# Samples in a shard: a multiple of those that are made at once.
SHARD_SAMPLES = 40 * CHUNK


class Job(BaseModel):
    """What all shards have in common."""

    run: str
    out: str
    seed: int
    truncation: float | None
    labels: list[int] | None


class Task(NamedTuple):
    """One shard: samples ``begin`` to ``end`` − 1."""

    number: int
    begin: int
    end: int

    def to_json(self) -> str:
        """On one line."""
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`to_json` wrote."""
        return cls(*json.loads(text))


class ShardSampler:
    """Writes shards of samples; see :class:`gatdist.packing.processes.Worker`."""

    job_type: ClassVar = Job
    task_type: ClassVar = Task
    record_type: ClassVar = Shard

    def __init__(self, job: Job) -> None:
        self._job = job
        self._run: TrainedRun | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._run = None

    def do(self, task: Task, report: Report) -> Shard:
        """Write one shard."""
        if self._run is None:
            self._run = load_run(Store(self._job.run), _device(task.number))
        samples = self._samples(self._run, task, report)
        return write_shard(Store(self._job.out), f"shard-{task.number:06d}", samples)

    def _samples(
        self, run: TrainedRun, task: Task, report: Report
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        sampler = run.sampler(self._job.seed, "sample", self._job.truncation)
        ending = run.sample_format.ending.removeprefix(".")
        for start, seen, classes in chunks_of(sampler, task.begin, task.end, self._job.labels):
            for i, sample in enumerate(run.sample_format.to_samples(seen).numpy()):
                files = {ending: run.sample_format.encode(sample)}
                if classes is not None:
                    files["cls"] = b"%d" % int(classes[i])
                yield f"{start + i:09d}", files
            report(len(seen), 0)


def write_shards(
    run: TrainedRun,
    url: str,
    requested: SampleRequest,
    *,
    out: str,
    workers: int = 1,
    report: Callable[[int, int], None] = lambda done, known: None,
) -> list[str]:
    """Write samples as a data set, which is whole once its manifest is there.

    Args:
        run: trained.
        url: where it is from, for other processes.
        requested: which samples.
        out: URL of a folder.
        workers: processes that share the work.
        report: gets how many samples were made since it was last called.

    Returns:
        The URLs of the shards.

    Raises:
        ConfigError: there are no such samples.
        StorageError: ``out`` can't be written.
    """
    if workers < 1:
        raise ConfigError("--workers", "must be at least 1", value=workers)
    if requested.interpolate:
        raise ConfigError("--interpolate", "does not go with --shards", value=requested.interpolate)
    if Store(out).exists("config.json"):
        rule = "is a run directory, and a data set needs a folder of its own"
        raise StorageError(Store(out).url, rule, hint="Choose another folder")
    labels = class_numbers(run, requested.labels)
    job = Job(run=url, out=out, seed=requested.seed, truncation=requested.truncation, labels=labels)
    begins = range(0, requested.num, SHARD_SAMPLES)
    tasks = [
        Task(number, begin, min(requested.num, begin + SHARD_SAMPLES))
        for number, begin in enumerate(begins)
    ]
    shards = do_all(ShardSampler, job, tasks, workers, report)
    write_manifest(Store(out), shards, _spec(run))
    return [f"{out.rstrip('/')}/{shard.name}" for shard in shards]


def _spec(run: TrainedRun) -> SampleSpec:
    """What the samples are, as a data set tells it."""
    spec = run.sample_format.spec
    message: dict[str, Any] = {
        "modality": spec.modality,
        "sample_shape": list(run.sample_format.sample_shape),
        "bits": spec.bits,
        "sample_rate": spec.sample_rate,
        "num_tokens": spec.num_tokens,
    }
    if run.num_classes:
        message |= {"num_classes": run.num_classes, "class_names": spec.class_names}
    return SampleSpec(**message)


def _device(number: int) -> torch.device:
    """Workers share the GPUs there are."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", number % torch.cuda.device_count())

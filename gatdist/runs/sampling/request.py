"""Which samples are wanted, and how they are made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.runs import Sampler, TrainedRun

# Samples that are made at once. They come in the same company whatever is asked for, since
# convolutions may round differently in a batch of another size.
CHUNK = 256
MOST_SAMPLES = 10**9
_MOST_NUMBERS = 2**29  # that one file may be made of; 2 GiB in float32


def require_num(num: int) -> None:
    """Raise ConfigError if so many samples can't be generated."""
    if not 0 < num <= MOST_SAMPLES:
        raise ConfigError("--num", f"must be 1 to {MOST_SAMPLES:,}", value=num)


@dataclass(frozen=True)
class SampleRequest:
    """Which samples.

    Attributes:
        num: how many (> 0).
        seed: of the noise. Sample i of a seed is the same whatever ``num`` is.
        labels: classes that the samples have in turn, as numbers or names; none: drawn.
        truncation: see :class:`~gatdist.runs.trained.Sampler`.
        interpolate: above 0, so many pictures on the way from each sample to the next, and from the
            last to the first.
    """

    num: int
    seed: int = 0
    labels: Sequence[str] = ()
    truncation: float | None = None
    interpolate: int = 0

    def __post_init__(self) -> None:
        require_num(self.num)
        if not 0 <= self.interpolate <= MOST_SAMPLES:
            rule = f"must be 0 to {MOST_SAMPLES:,}"
            raise ConfigError("--interpolate", rule, value=self.interpolate)
        if self.truncation is not None and not self.truncation > 0:
            raise ConfigError("--truncation", "must be above 0", value=self.truncation)


def samples_of(
    run: TrainedRun, requested: SampleRequest, labels: list[int] | None
) -> Iterator[tuple[int, Tensor]]:
    """As networks see them, from number 0 on, in chunks: the first one's number, and samples."""
    sampler = run.sampler(requested.seed, "sample", requested.truncation)
    if requested.interpolate:
        label, steps = labels[0] if labels else None, requested.interpolate
        for i, start in itertools.product(range(requested.num), range(0, steps, CHUNK)):
            shares = torch.arange(start, min(steps, start + CHUNK), dtype=torch.float64) / steps
            way = sampler.between(i, (i + 1) % requested.num, shares, label)
            yield i * steps + start, way.cpu()
        return
    for start, seen, _ in chunks_of(sampler, 0, requested.num, labels):
        yield start, seen


def all_samples_of(run: TrainedRun, requested: SampleRequest, labels: list[int] | None) -> Tensor:
    """Samples for one file: [n, …].

    Raises:
        ConfigError: there are more than fit into memory.
    """
    num = requested.num * max(1, requested.interpolate)
    if num * math.prod(run.sample_format.shape) > _MOST_NUMBERS:
        most = max(1, _MOST_NUMBERS // math.prod(run.sample_format.shape))
        raise ConfigError(
            "--num" if requested.interpolate < requested.num else "--interpolate",
            f"gives {num:,} samples, and one file holds at most {most:,} of these",
            value=max(requested.num, requested.interpolate),
            hint="Ask for fewer, or write a file for each: --out FOLDER without --grid",
        )
    return torch.cat([chunk for _, chunk in samples_of(run, requested, labels)])


def chunks_of(
    sampler: Sampler, begin: int, end: int, labels: list[int] | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Samples ``begin`` to ``end`` − 1, on the CPU: the first one's number, samples, their classes.

    ``begin`` is a multiple of the chunk. ``labels`` are had in turn; None: they are drawn.
    """
    device = next(sampler.network.parameters()).device
    for start in range(begin, end, CHUNK):
        count = min(CHUNK, end - start)
        # Numbers past the end fill the last chunk.
        filled = torch.arange(start, start + CHUNK, device=device)
        if labels is None:
            classes = sampler.labels(filled)
        else:
            classes = torch.tensor(labels, device=device)[filled % len(labels)]
        seen = sampler(filled, classes)[:count].cpu()
        yield start, seen, None if classes is None else classes[:count].cpu()


def class_numbers(run: TrainedRun, requested: Sequence[str]) -> list[int] | None:
    """The numbers of classes, by number or name."""
    if not requested:
        return None
    if not run.num_classes:
        rule = "the run's generator is not told classes"
        raise ConfigError("--labels", rule, value=",".join(requested), hint="Leave it out")
    names = run.sample_format.spec.class_names or []
    found = []
    for word in requested:
        number = names.index(word) if word in names else int(word) if word.isdecimal() else -1
        if not 0 <= number < run.num_classes:
            known = f", or one of {', '.join(names[:10])}" if names else ""
            raise ConfigError(
                "--labels", f"there is no such class: 0 to {run.num_classes - 1}{known}", value=word
            )
        found.append(number)
    return found

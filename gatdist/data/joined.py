"""Batches of several data sets, joined sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch
from numpy.typing import NDArray

from gatdist.config import Config
from gatdist.data.dataset import Dataset
from gatdist.data.loader import Batch, Buffers, Loader
from gatdist.data.modalities import join, new_samples
from gatdist.data.order import SampleOrder
from gatdist.data.unpaired import Domains, parts_of
from gatdist.parallel.communicator import Communicator

_IN_USE = 2  # batches: one that a step uses, and the next one


class JoinedLoader:
    """Endless iterator over one worker's batches, from a loader for each data set."""

    def __init__(self, dataset: Domains, loaders: list[Loader], *, pin_memory: bool) -> None:
        self._spec, self._loaders, self._pin_memory = dataset.spec, loaders, pin_memory
        self._buffers: Buffers | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        own, *others = [next(loader) for loader in self._loaders]
        if self._buffers is None:
            count = len(own.samples)
            self._buffers = Buffers(lambda: self._new_records(count), _IN_USE)
        parts = [batch.samples.numpy() for batch in (own, *others)]
        return replace(own, samples=torch.from_numpy(join(parts, self._buffers.take())))

    def take_counts(self) -> dict[str, float]:
        """Return the sums of :meth:`Loader.take_counts`; of ready batches, the fewest."""
        counts = [loader.take_counts() for loader in self._loaders]
        return {
            tag: (min if tag == "data/ready_batches" else sum)(each[tag] for each in counts)
            for tag in counts[0]
        }

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_records(self, count: int) -> NDArray[Any]:
        shape = new_samples(self._spec, count).shape
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory).numpy()


AnyLoader = Loader | JoinedLoader


def open_loader(
    dataset: Dataset,
    orders: Mapping[str, SampleOrder],
    config: Config,
    comm: Communicator,
    *,
    position: int,
) -> AnyLoader:
    """Return the batches of a worker from ``position`` on, samples used globally so far.

    ``orders`` are those of :func:`~gatdist.data.unpaired.orders_of`. All workers call this. Raises
    ConfigError if memory or the host cache are too small.
    """
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(
                Loader.for_worker(part, orders[name], config, comm, position=position)
            )
            for name, part in parts_of(dataset).items()
        ]
        stack.pop_all()
    if not isinstance(dataset, Domains):
        return loaders[0]
    return JoinedLoader(dataset, loaders, pin_memory=comm.device.type == "cuda")

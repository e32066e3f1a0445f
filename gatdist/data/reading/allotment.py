"""How a worker's memory is shared out between fetched bytes, indexes and ready batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gatdist.common.errors import ConfigError
from gatdist.config import DataConfig
from gatdist.data.order import SampleOrder, bytes_of

if TYPE_CHECKING:
    from gatdist.data.dataset import Dataset

# A stretch of about this many bytes is planned at once, if there is memory for two.
_STRETCH_BYTES = 128 * 2**20
# No more than this many samples, since planning takes time and memory too.
_STRETCH_SAMPLES = 2**17
_INDEX_SHARE = 8
# What is kept may be fetched in larger blocks than the order has: a request costs a round trip, and
# some of a core. From a cache on disk a block is read as a whole each time a part of it is needed.
_KEPT_BYTES, _CACHED_BYTES = 2 * 2**20, 2**19


@dataclass(frozen=True)
class Allotment:
    """What a worker may keep in memory.

    Attributes:
        piece_bytes: of fetched bytes.
        keeps: whether all of the data set stays in memory once it was fetched.
        rows: of the lanes in a stretch, a multiple of the window.
        least_bytes: of a block that is fetched.
    """

    piece_bytes: int
    keeps: bool
    rows: int
    least_bytes: int = 0


def index_bytes(config: DataConfig) -> int:
    """What indexes of shards may take."""
    return config.memory_bytes // _INDEX_SHARE


def allot(
    dataset: Dataset,
    order: SampleOrder,
    config: DataConfig,
    *,
    global_batch: int,
    world_size: int,
) -> Allotment:
    """Share out ``data.memory_bytes``.

    Args:
        dataset: what is read.
        order: of its samples; the windows are what must fit.
        config: where the ceilings are.
        global_batch: samples of all workers a step.
        world_size: number of workers.

    Raises:
        ConfigError: a ceiling is too low for what must be in memory, or in the host's cache,
            together.
    """
    if dataset.is_decoded:
        return Allotment(0, keeps=True, rows=order.window)
    shards = dataset.shard_sizes
    if dataset.is_cached:
        _require_cache_fits(config, order, shards)
    local_batch = global_batch // world_size
    # Those being read ahead, and one that training holds.
    batch_bytes = (config.prefetch_batches + 1) * local_batch * dataset.sample_bytes
    fixed = batch_bytes + index_bytes(config)
    available = config.memory_bytes - fixed

    # Where workers share every lane, each needs some samples of every window.
    lanes = order.lanes if order.lanes % world_size else order.lanes // world_size
    shuffle_window_samples = lanes * order.window
    window_bytes = bytes_of(shards, shuffle_window_samples)
    # The windows in which a batch lies, and those that follow them.
    at_once = 1 + -(-local_batch // shuffle_window_samples)
    needed = bytes_of(shards, at_once * shuffle_window_samples)
    keeps = dataset.num_bytes <= available
    if not keeps and needed > available:
        # The share of the indexes grows with the ceiling.
        ceiling = (needed + batch_bytes) * _INDEX_SHARE // (_INDEX_SHARE - 1) + 1
        raise ConfigError(
            "data.memory_bytes",
            f"must be at least {ceiling:,} for windows of {order.window:,} samples in {lanes} "
            f"lanes a worker, those that follow them, and {config.prefetch_batches + 1} batches",
            value=config.memory_bytes,
            hint="Raise it, lower data.prefetch_batches, or, in a new run, "
            "data.shuffle_window_samples",
        )
    fitting = min(_STRETCH_BYTES, available // 2) // max(1, window_bytes)
    windows = max(1, min(fitting, _STRETCH_SAMPLES // shuffle_window_samples))
    least_bytes = 0
    if keeps:
        least_bytes = _KEPT_BYTES
    elif dataset.is_cached and dataset.num_bytes <= config.cache_bytes:
        least_bytes = _CACHED_BYTES
    return Allotment(available, keeps, windows * order.window, least_bytes)


def _require_cache_fits(
    config: DataConfig, order: SampleOrder, shards: Sequence[tuple[int, int]]
) -> None:
    """Raise ConfigError unless the shared cache can hold what a host's workers need together."""
    # At worst all lanes are on one host. Where a window ends in a block, its rest is needed next.
    samples = 2 * order.lanes * (order.window + order.longest_block)
    needed = bytes_of(shards, samples)
    if config.cache_bytes < needed:
        raise ConfigError(
            "data.cache_bytes",
            f"must be at least {needed:,}, what the workers of a host read at the same time",
            value=config.cache_bytes,
            hint="Raise it, or leave data.cache_dir out",
        )

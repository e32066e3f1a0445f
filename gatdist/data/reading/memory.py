"""Memory budget of a worker: fetched bytes, indexes and prefetched batches."""

from __future__ import annotations

from dataclasses import dataclass

from gatdist.common.errors import ConfigError
from gatdist.config import DataConfig
from gatdist.data.order import SampleOrder, ShardLayout

# Limits of a segment of the reading plan. Two must fit in memory; planning takes time, too.
_SEGMENT_BYTES, _SEGMENT_SAMPLES = 128 * 2**20, 2**17
_INDEX_SHARE = 8
# Data that is kept may be fetched in larger blocks than the order's, since requests are costly. A
# block in the host cache is read as a whole each time a part of it is needed.
_KEPT_BYTES, _CACHED_BYTES = 2 * 2**20, 2**19


@dataclass(frozen=True)
class MemoryBudget:
    """Limits on what a worker keeps in memory."""

    fetched_bytes: int  # of fetched data
    keeps: bool  # whether the whole data set stays in memory once fetched
    rows: int  # samples of each lane in a segment, a multiple of the window
    min_block_bytes: int = 0  # mean size of fetched blocks, at least


def index_bytes(config: DataConfig) -> int:
    """Return the memory limit of shard indexes."""
    return config.memory_bytes // _INDEX_SHARE


def memory_budget(
    layout: ShardLayout,
    order: SampleOrder,
    config: DataConfig,
    *,
    sample_bytes: int,
    is_cached: bool,
    global_batch: int,
    world_size: int,
) -> MemoryBudget:
    """Divide ``data.memory_bytes``. Raises ConfigError if it or the host cache is too small."""
    if is_cached:
        _require_cache_fits(layout, order, config)
    local_batch = global_batch // world_size
    batch_bytes = (config.prefetch_batches + 1) * local_batch * sample_bytes  # + 1 in use
    available = config.memory_bytes - batch_bytes - index_bytes(config)

    # If workers share every lane, each needs some samples of every window.
    lanes = order.lanes if order.lanes % world_size else order.lanes // world_size
    window_samples = lanes * order.window
    # The windows of a batch, and the next ones.
    at_once = 1 + -(-local_batch // window_samples)
    needed = layout.bytes_of(at_once * window_samples)
    keeps = layout.num_bytes <= available
    if not keeps and needed > available:
        # The indexes' share grows with the limit.
        least = (needed + batch_bytes) * _INDEX_SHARE // (_INDEX_SHARE - 1) + 1
        raise ConfigError(
            "data.memory_bytes",
            f"must be at least {least:,} for windows of {order.window:,} samples in {lanes} lanes "
            f"per worker, the next windows, and {config.prefetch_batches + 1} batches",
            value=config.memory_bytes,
            hint="Raise it, lower data.prefetch_batches, or, in a new run, "
            "data.shuffle_window_samples",
        )
    window_bytes = layout.bytes_of(window_samples)
    fitting = min(_SEGMENT_BYTES, available // 2) // max(1, window_bytes)
    windows = max(1, min(fitting, _SEGMENT_SAMPLES // window_samples))
    min_block_bytes = 0
    if keeps:
        min_block_bytes = _KEPT_BYTES
    elif is_cached and layout.num_bytes <= config.cache_bytes:
        min_block_bytes = _CACHED_BYTES
    return MemoryBudget(available, keeps, windows * order.window, min_block_bytes)


def _require_cache_fits(layout: ShardLayout, order: SampleOrder, config: DataConfig) -> None:
    # At worst all lanes are on one host, and a window that ends in a block needs its rest next.
    needed = layout.bytes_of(2 * order.lanes * (order.window + order.longest_block))
    if config.cache_bytes < needed:
        raise ConfigError(
            "data.cache_bytes",
            f"must be at least {needed:,}, which the workers of a host read at the same time",
            value=config.cache_bytes,
            hint="Raise it, or remove data.cache_dir",
        )

"""A data set of shards, read by sample number."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gatdist.common.errors import DataError
from gatdist.common.heartbeat import beat
from gatdist.config import DataConfig
from gatdist.data import builtin
from gatdist.data.codecs import CodecError
from gatdist.data.format.manifest import Manifest, open_shards, read_manifest
from gatdist.data.held_out import Part, training_counts
from gatdist.data.modalities import decoders_of, new_samples, read_spec, resizing
from gatdist.data.order import (
    Indices,
    SampleOrder,
    ShardLayout,
    WorkerShare,
    block_bounds,
    substitute,
)
from gatdist.data.reading.host_cache import HostCache, block_key
from gatdist.data.reading.plan import MemoryBudget, ReadRange, cut_runs, index_bytes, memory_budget
from gatdist.data.reading.shards import OpenShard, OpenShards
from gatdist.storage import Store

if TYPE_CHECKING:  # both need torch, which packing and indexing do without
    from gatdist.data.sample_format import SampleFormat
    from gatdist.parallel.communicator import Communicator

Samples = NDArray[Any]  # see `new_samples`

# Decoded samples stay in memory if they take no more than this, and no more than this share of
# data.memory_bytes.
_DECODED_BYTES, _DECODED_SHARE = 64 * 2**20, 4
_PORTION_BYTES = 32 * 2**20  # fetched at a time by `read`
_BLOCK_BYTES = 2**19
# Increase when the same files are decoded to other samples, to invalidate caches of them.
_DECODING = 2
_MAX_SUBSTITUTES = 16


def open_dataset(config: DataConfig, comm: Communicator | None = None) -> Dataset:
    """Open the data to train on, without held-out samples. Raises DataError and StorageError.

    All workers of a run pass ``comm``: worker 0 reads the manifest, and all raise its errors.
    """
    if config.unpaired:
        from gatdist.data.unpaired import open_domains  # imports this module

        return open_domains(config, comm)
    url = builtin.prepare(config.url) if config.url.startswith(builtin.PREFIX) else config.url
    store = Store(url, config.storage_options)
    manifest = read_manifest(store) if comm is None else _shared_manifest(store, comm)
    if not config.held_out:
        return Dataset(store, manifest, config)

    def read_keys() -> list[int]:
        return training_counts(store, manifest, config.held_out)

    counts = read_keys() if comm is None else comm.of_main(read_keys)
    part = Part.for_training(manifest, config.held_out, counts)
    return Dataset(store, manifest, config, part)


class Dataset:
    """Samples by number, 0 to ``num_samples`` − 1. Thread-safe.

    A data set that is small when decoded is decoded once and stays in memory. ``part`` chooses some
    of its samples, which are numbered among themselves.

    Attributes:
        fingerprint: SHA-256 (hex) of the content and its order, and of the part if any.
        reading: SHA-256 (hex) of the fingerprint and of how samples are decoded.
        resize: filter that resizes images as they are read; None if all have the right size.
        sample_shape: as read; see :attr:`~gatdist.data.modalities.ReadSpec.shape`.
        sample_bytes: of a decoded sample.
        num_classes: 0 for an unlabelled data set.
        is_decoded: whether all samples stay in memory, decoded.
        is_cached: whether fetched blocks are shared with other workers of the host.
        bytes_fetched: from storage so far.
    """

    def __init__(
        self, store: Store, manifest: Manifest, config: DataConfig, part: Part | None = None
    ) -> None:
        self._indexes, self._whole_manifest, self.part = store, manifest, part
        self.fingerprint = manifest.fingerprint
        counts = [shard.num_samples for shard in manifest.shards] if part is None else part.counts
        if part is not None:
            message = f"{manifest.fingerprint} {part.name}"
            self.fingerprint = hashlib.sha256(message.encode()).hexdigest()
            in_part = [s for s, n in zip(manifest.shards, counts, strict=True) if n]
            manifest = manifest.model_copy(update={"shards": in_part})
            counts = [n for n in counts if n]
        shards = [(n, s.size) for n, s in zip(counts, manifest.shards, strict=True)]
        self.layout = ShardLayout(shards, self.fingerprint)
        self.num_samples, self.num_shards = sum(counts), len(shards)
        self.num_bytes = self.layout.num_bytes
        self.spec = read_spec(manifest, config, store.url)
        self.sample_shape = self.spec.shape
        self.num_classes = manifest.num_classes
        self.modality = manifest.modality
        self.sample_bytes = self.new_samples(1).nbytes
        self.bytes_fetched = 0

        tars = open_shards(store, manifest, config)
        self.is_local = tars.is_local
        self._store, self._manifest, self.config = tars, manifest, config
        self.resize = resizing(manifest, config, self.spec)
        decode = decoders_of(self.spec, self.resize)
        reading = f"{self.fingerprint} {self.spec.model_dump_json()} {self.resize} {_DECODING}"
        self.reading = hashlib.sha256(reading.encode()).hexdigest()
        chosen = None if part is None else part.chosen
        self._shards = OpenShards(
            lambda number: OpenShard(
                tars, store, manifest, manifest.shards[number], decode, chosen
            ),
            index_bytes(config),
        )
        self._cache: HostCache | None = None
        if config.cache_dir is not None and not tars.is_local:
            self._cache = HostCache(config.cache_dir, config.cache_bytes)
        self.is_cached = self._cache is not None
        self.notes = self._cache.notes if self._cache else []
        # Samples that stay decoded are fetched in the same blocks by all that share a cache.
        self._block_ends = np.cumsum(self.layout.cut_blocks(_BLOCK_BYTES), dtype=np.int64)
        # Between held-out samples are others, which need not be fetched.
        self._is_sparse = part is not None and part.is_held_out
        if self._is_sparse:
            self._block_ends = np.arange(1, self.num_samples + 1)
        self._bad: dict[int, str] = {}
        self._bad_lock, self._decoded_lock = threading.Lock(), threading.Lock()
        self._fetched: dict[tuple[int, int, int], ReadRange] = {}  # until all is decoded
        limit = min(_DECODED_BYTES, config.memory_bytes // _DECODED_SHARE)
        self.is_decoded = self.sample_bytes * self.num_samples <= limit
        if self.is_decoded:  # samples and labels are filled as they are first read
            self._decoded = self.new_samples(self.num_samples)
            self._decoded_labels = self.new_labels(self.num_samples)
            self._is_known = np.zeros(self.num_samples, dtype=bool)
            self._is_full = False

    @cached_property
    def sample_format(self) -> SampleFormat:
        from gatdist.data.sample_format import sample_format_of  # needs torch

        return sample_format_of(self.spec)

    @property
    def cache_hits(self) -> int:
        return self._cache.hits if self._cache else 0

    @property
    def bad_samples(self) -> dict[int, str]:
        """Problem of each sample that was substituted, by its number."""
        with self._bad_lock:
            return dict(self._bad)

    def held_out(self) -> Dataset | None:
        """Return the samples that ``data.held_out`` excludes from these; None without."""
        if self.part is None:
            return None
        others = self.part.others(self._whole_manifest)
        return Dataset(self._indexes, self._whole_manifest, self.config, others)

    def memory_budget(
        self, order: SampleOrder, config: DataConfig, share: WorkerShare
    ) -> MemoryBudget:
        if self.is_decoded:
            return MemoryBudget(0, keeps=True, rows=order.window)
        return memory_budget(
            self.layout,
            order,
            config,
            sample_bytes=self.sample_bytes,
            is_cached=self.is_cached,
            share=share,
        )

    def new_samples(self, count: int) -> Samples:
        return new_samples(self.spec, count)

    def new_labels(self, count: int) -> Indices | None:
        """Allocate labels, int64 [count]; None if unlabelled."""
        return np.empty(count, dtype=np.int64) if self.num_classes else None

    def read(self, indices: Indices) -> tuple[Samples, Indices | None]:
        """Return samples and labels, int64 [n] if any, of ``indices``, int64 [n], which may repeat.

        Raises DataError if one is damaged, StorageUnavailableError if storage kept failing.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if not self.is_decoded:
            return self._read(indices)
        with self._decoded_lock:
            if not self._is_full and (missing := indices[~self._is_known[indices]]).size:
                self._decode_missing(np.unique(missing))
            labels = self._decoded_labels
            return self._decoded[indices], None if labels is None else labels[indices]

    def fetch(
        self, ranges: Sequence[ReadRange], stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Fetch the data of read ranges, unless ``stopped`` while another process fetches them."""
        shards = [self._shards[each.shard] for each in ranges]
        spans = [shard.span(r.first, r.end) for shard, r in zip(shards, ranges, strict=True)]
        if self._cache is None:
            contents = self._fetch_spans(shards, spans)
        else:
            contents = self._fetch_blocks(self._cache, ranges, shards, spans, stopped)
        for each, shard, (start, _), data in zip(ranges, shards, spans, contents, strict=False):
            each.opened, each.start, each.data = shard, start, data

    def decode(
        self,
        ranges: Sequence[ReadRange],
        range_of: Sequence[int],
        numbers: Sequence[int],
        rows: Iterable[int],
        samples: Samples,
        labels: Indices | None,
    ) -> None:
        """Decode samples of fetched read ranges into these ``rows`` of ``samples`` and ``labels``.

        ``range_of`` is the read range of each sample, ``numbers`` its number in its shard. Raises
        DataError if one is bad, even when fetched again, and may not be substituted.
        """
        for row, k, number in zip(rows, range_of, numbers, strict=True):
            each = ranges[k]
            assert each.opened is not None
            try:
                label = each.opened.decode_into(number, each.start, each.data, samples[row])
            except CodecError:
                if self._cache is not None and each.block is not None:
                    self._cache.forget(self._key(each.shard, each.opened.span(*each.block)))
                index = int(self.layout.begins[each.shard]) + number
                label = self._recover(index, samples[row])
            if labels is not None:
                labels[row] = label

    def _decode_missing(self, missing: Indices) -> None:
        self._decoded[missing], labels = self._read(missing)
        if self._decoded_labels is not None and labels is not None:
            self._decoded_labels[missing] = labels
        self._is_known[missing] = True
        self._is_full = bool(self._is_known.all())
        if self._is_full:
            self._fetched.clear()

    def _read(self, indices: Indices) -> tuple[Samples, Indices | None]:
        samples, labels = self.new_samples(len(indices)), self.new_labels(len(indices))
        if not len(indices):
            return samples, labels
        by_index = np.argsort(indices, kind="stable")
        ordered = indices[by_index]
        shards = self.layout.shard_of(ordered)
        begins, mean_bytes = self.layout.begins[shards], self.layout.mean_bytes
        numbers = ordered - begins
        if not self.is_decoded:
            starts = (
                np.flatnonzero(np.diff(ordered, prepend=-1))
                if self._is_sparse
                else cut_runs(ordered, shards, mean_bytes)
            )
        else:
            blocks = block_bounds(ordered, self._block_ends)
            starts = np.flatnonzero(np.diff(blocks[0], prepend=-1))
            firsts, ends = (bounds - begins for bounds in blocks)
        stops = np.append(starts[1:], len(ordered))
        num_bytes = (ordered[stops - 1] + 1 - ordered[starts]) * mean_bytes[shards[starts]]
        portions = np.cumsum(num_bytes) // _PORTION_BYTES
        for first, last in _runs(portions):
            if not self.is_decoded:
                ranges = [
                    ReadRange(int(shards[i]), int(numbers[i]), int(numbers[j - 1]) + 1)
                    for i, j in zip(starts[first:last], stops[first:last], strict=True)
                ]
                self.fetch(ranges)
            else:
                portion = starts[first:last]
                columns = shards[portion], firsts[portion], ends[portion]
                ranges = self._whole(list(zip(*(c.tolist() for c in columns), strict=True)))
            here = slice(starts[first], stops[last - 1])
            range_of = np.repeat(np.arange(last - first), (stops - starts)[first:last])
            rows = by_index[here].tolist()
            self.decode(ranges, range_of.tolist(), numbers[here].tolist(), rows, samples, labels)
            beat()
        return samples, labels

    def _whole(self, blocks: Sequence[tuple[int, int, int]]) -> list[ReadRange]:
        new = [ReadRange(*block, block=block[1:]) for block in blocks if block not in self._fetched]
        self.fetch(new)
        self._fetched.update({(each.shard, each.first, each.end): each for each in new})
        return [self._fetched[block] for block in blocks]

    def _fetch_spans(
        self, shards: Sequence[OpenShard], spans: Sequence[tuple[int, int]]
    ) -> list[bytes]:
        ranges = [(shard.name, *span) for shard, span in zip(shards, spans, strict=True)]
        contents = self._store.read_ranges(ranges)
        self.bytes_fetched += sum(map(len, contents))
        return contents

    def _fetch_blocks(
        self,
        cache: HostCache,
        ranges: Sequence[ReadRange],
        shards: Sequence[OpenShard],
        spans: Sequence[tuple[int, int]],
        stopped: Callable[[], bool],
    ) -> list[bytes]:
        blocks = [
            shard.span(*(each.block or (each.first, each.end)))
            for each, shard in zip(ranges, shards, strict=True)
        ]
        keys = [self._key(each.shard, block) for each, block in zip(ranges, blocks, strict=True)]
        distinct = dict(zip(keys, zip(shards, blocks, strict=True), strict=True))
        wanted = list(distinct.values())

        def load(numbers: list[int]) -> list[bytes]:
            return self._fetch_spans(*zip(*(wanted[i] for i in numbers), strict=True))

        contents = dict(zip(distinct, cache.fetch(list(distinct), load, stopped), strict=False))
        if not contents:
            return []
        return [
            contents[key][start - offset : stop - offset]
            for key, (offset, _), (start, stop) in zip(keys, blocks, spans, strict=True)
        ]

    def _recover(self, index: int, out: Samples) -> int:
        """Fetch a bad sample again and decode it into ``out``, or else a substitute."""
        try:
            if index not in self.bad_samples:
                return self._decode_alone(index, out)
        except DataError as error:
            self._count_bad(index, error)
        for attempt in range(_MAX_SUBSTITUTES):
            other = substitute(index, attempt, self.num_samples)
            if other in self.bad_samples:
                continue
            try:
                return self._decode_alone(other, out)
            except DataError as error:
                self._count_bad(other, error)
        raise DataError(
            self._store.url,
            f"sample {index:,} is bad, and so are its {_MAX_SUBSTITUTES} substitutes",
            hint="Restore the shards from a copy, or pack them again",
        )

    def _decode_alone(self, index: int, out: Samples) -> int:
        number = int(self.layout.shard_of(np.array(index)))
        shard, i = self._shards[number], index - int(self.layout.begins[number])
        (data,) = self._fetch_spans([shard], [shard.span(i, i + 1)])
        return shard.decode_again(i, data, out)

    def _count_bad(self, index: int, error: DataError) -> None:
        if self.config.on_bad_sample == "raise":
            raise error
        budget = self.config.bad_sample_budget
        with self._bad_lock:
            self._bad[index] = str(error)
            if len(self._bad) > budget:
                raise too_many_bad(len(self._bad), budget, str(error)) from error

    def _key(self, shard: int, span: tuple[int, int]) -> str:
        return block_key(self._manifest.shards[shard].sha256, *span)


def too_many_bad(count: int, budget: int, last: str) -> DataError:
    """Return the error of a run with too many bad samples; ``last`` is about the last one."""
    return DataError(
        "data.bad_sample_budget",
        f"{count:,} samples are bad, the last: {last.rstrip('.')}",
        value=budget,
        hint="Restore the shards from a copy, pack them again, or raise the budget",
    )


def _shared_manifest(store: Store, comm: Communicator) -> Manifest:
    found = comm.of_main(lambda: read_manifest(store).model_dump(mode="json"))
    return Manifest.model_validate(found)


def _runs(values: Indices) -> list[tuple[int, int]]:
    """Return first and end of each run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True))

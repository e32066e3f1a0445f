"""A data set of shards, read by sample number.

Bytes are fetched in pieces, neighbouring samples of one shard. A data set that is small when
decoded is decoded once and stays in memory.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gatdist.common.errors import DataError, GatdistError, rebuilt
from gatdist.common.heartbeat import beat
from gatdist.config import DataConfig
from gatdist.data import builtin
from gatdist.data.codecs import CodecError
from gatdist.data.format import Manifest, open_shards, read_manifest
from gatdist.data.modalities import MODALITIES, new_samples
from gatdist.data.order import Indices, block_bounds, cut_blocks, substitute
from gatdist.data.reading.allotment import index_bytes
from gatdist.data.reading.decoded import DecodedSamples, Samples
from gatdist.data.reading.host_cache import HostCache, block_key
from gatdist.data.reading.plan import Piece, cut_runs
from gatdist.data.reading.shape import read_spec, resizing
from gatdist.data.reading.shards import OpenShards
from gatdist.data.shard import OpenShard
from gatdist.storage import Store

if TYPE_CHECKING:
    from gatdist.data.sample_format import SampleFormat
    from gatdist.parallel.communicator import Communicator

# A data set whose decoded samples take no more than this, and no more than this share of
# data.memory_bytes, is kept decoded.
_DECODED_BYTES, _DECODED_SHARE = 64 * 2**20, 4
# What one call of `read` fetches at a time.
_PORTION_BYTES = 32 * 2**20
_BLOCK_BYTES = 2**19
# Rises when the same files are decoded to other samples, so that no cache of those is used.
_DECODING = 2
_MOST_SUBSTITUTES = 16


def open_dataset(config: DataConfig, comm: Communicator | None = None) -> Dataset:
    """Open the data set that the section ``data`` of a configuration names.

    ``builtin:digits`` and ``builtin:ring`` are written to the cache folder on first use. Shards are
    looked at when their samples are first read.

    Args:
        config: the section.
        comm: the workers of a run, all of which call this: worker 0 alone asks storage for the
            manifest, and what it raises, all raise. None: this process alone.

    Raises:
        DataError: there is no data set, it is empty or damaged, or its pictures are not of
            ``data.resolution``.
        StorageError: the URL can't be read, or the cache folder not written.
    """
    url = builtin.prepare(config.url) if config.url.startswith(builtin.PREFIX) else config.url
    store = Store(url, config.storage_options)
    manifest = read_manifest(store) if comm is None else _shared_manifest(store, comm)
    return Dataset(store, manifest, config)


class Dataset:
    """Samples by number, 0 to ``num_samples`` − 1. Safe to read from several threads.

    Args:
        store: the folder of the shards.
        manifest: what is there.
        config: how to read.

    Attributes:
        config: as given.
        num_samples: N.
        num_shards: tars.
        num_bytes: of all tars.
        fingerprint: SHA-256 (hex) of the content and its order.
        reading: SHA-256 (hex) of that and of how it is decoded: of all that makes the samples.
        spec: what the samples are, as they are read.
        sample_shape: of each, as they are read: (C, H, W) of images, that of points, (C, n) of
            sounds, (n,) of texts and tokens.
        sample_bytes: of a decoded sample.
        num_classes: 0 where there are no labels.
        modality: ``image``, ``points``, ``audio``, ``text`` or ``tokens``.
        is_decoded: whether all samples stay in memory, decoded.
        is_local: whether the shards are on this machine.
        is_cached: whether what is fetched is shared with other workers of the host.
        shard_sizes: (samples, bytes) of each shard.
        bytes_fetched: from storage so far.
    """

    def __init__(self, store: Store, manifest: Manifest, config: DataConfig) -> None:
        self.num_samples = manifest.num_samples
        self.num_shards = len(manifest.shards)
        self.num_bytes = sum(shard.size for shard in manifest.shards)
        self.fingerprint = manifest.fingerprint
        self.spec = read_spec(manifest, config, store.url)
        self.sample_shape = self.spec.shape
        self.num_classes = manifest.num_classes
        self.modality = manifest.modality
        self.shard_sizes = [(shard.num_samples, shard.size) for shard in manifest.shards]
        self.sample_bytes = self.new_samples(1).nbytes
        self.bytes_fetched = 0

        tars = open_shards(store, manifest, config)
        self.is_local = tars.is_local
        self._store, self._manifest, self.config = tars, manifest, config
        samples, sizes = np.array(self.shard_sizes, dtype=np.int64).T
        self._shard_ends, self._shard_begins = np.cumsum(samples), np.cumsum(samples) - samples
        self._mean_bytes = np.maximum(1, sizes // samples)
        resize = resizing(manifest, config, self.sample_shape)
        decode = MODALITIES[self.modality].decoder(self.spec, resize)
        message = f"{self.fingerprint} {self.spec.model_dump_json()} {resize} {_DECODING}"
        self.reading = hashlib.sha256(message.encode()).hexdigest()
        self._shards = OpenShards(
            lambda number: OpenShard(tars, store, manifest, manifest.shards[number], decode),
            index_bytes(config),
        )
        self._cache = (
            HostCache(config.cache_dir, config.cache_bytes)
            if config.cache_dir is not None and not tars.is_local
            else None
        )
        self.is_cached = self._cache is not None
        # What is kept decoded is fetched in blocks, which are the same for all that share a cache.
        self._block_ends = np.cumsum(cut_blocks(self.shard_sizes, _BLOCK_BYTES), dtype=np.int64)
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()  # of what is decoded
        self._bad_lock = threading.Lock()
        self._fetched: dict[tuple[int, int, int], Piece] = {}  # until all is decoded
        self._decoded: DecodedSamples | None = None
        if self.sample_bytes * self.num_samples <= min(
            _DECODED_BYTES, config.memory_bytes // _DECODED_SHARE
        ):
            self._decoded = DecodedSamples(
                self.new_samples(self.num_samples), self.new_labels(self.num_samples)
            )
        self.is_decoded = self._decoded is not None

    @cached_property
    def sample_format(self) -> SampleFormat:
        """Where networks see the samples."""
        from gatdist.data.sample_format import (
            sample_format_of,  # needs torch, which mere readers do without
        )

        return sample_format_of(self.spec)

    @property
    def cache_hits(self) -> int:
        """Blocks that were in the host's cache so far."""
        return self._cache.hits if self._cache else 0

    @property
    def notes(self) -> list[str]:
        """What to tell people about the reading."""
        return list(self._cache.notes) if self._cache else []

    @property
    def bad_samples(self) -> dict[int, str]:
        """What is wrong with each sample that another one had to stand in for, by its number."""
        with self._bad_lock:
            return dict(self._bad)

    def new_samples(self, count: int) -> Samples:
        """Memory for samples; see :func:`~gatdist.data.modalities.new_samples`."""
        return new_samples(self.spec, count)

    def new_labels(self, count: int) -> Indices | None:
        """Memory for their labels, int64 [count]; None where there are no classes."""
        return np.empty(count, dtype=np.int64) if self.num_classes else None

    def read(self, indices: Indices) -> tuple[Samples, Indices | None]:
        """Read and decode samples.

        Args:
            indices: int64 [n], each in [0, N), in any order, also repeated.

        Returns:
            The samples in the order asked, as :meth:`new_samples` has them, and their labels,
            int64 [n], or None where there are no classes. The arrays are the caller's.

        Raises:
            DataError: a sample is damaged or not what the manifest says.
            StorageUnavailableError: storage kept failing.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if self._decoded is None:
            return self._read(indices)
        with self._lock:
            missing = self._decoded.missing(indices)
            if missing.size:
                self._decoded.put(missing, *self._read(missing))
                if self._decoded.is_full:
                    self._fetched.clear()
            return self._decoded.get(indices)

    def fetch(self, pieces: Sequence[Piece], stopped: Callable[[], bool] = lambda: False) -> None:
        """Give pieces their bytes, unless ``stopped`` while another process fetches them.

        Raises:
            DataError: an index or shard is not the one of the manifest.
            StorageError: storage can't be read.
        """
        shards = [self._shards[piece.shard] for piece in pieces]
        spans = [shard.span(p.first, p.end) for shard, p in zip(shards, pieces, strict=True)]
        if self._cache is None:
            contents = self._fetch_spans(shards, spans)
        else:
            contents = self._fetch_blocks(self._cache, pieces, shards, spans, stopped)
        for piece, shard, (start, _), data in zip(pieces, shards, spans, contents, strict=False):
            piece.rows, piece.start, piece.data = shard, start, data

    def forget(self, piece: Piece) -> None:
        """Do not trust the copy of a piece in the host's cache any more."""
        if self._cache is not None and piece.block is not None:
            self._cache.forget(self._key(piece, self._shards[piece.shard]))

    def decode(
        self,
        pieces: Sequence[Piece],
        piece_of: Sequence[int],
        numbers: Sequence[int],
        rows: Iterable[int],
        samples: Samples,
        labels: Indices | None,
    ) -> None:
        """Decode samples of fetched pieces.

        Args:
            pieces: fetched.
            piece_of: for each sample, which of the pieces holds it,
            numbers: its number in its shard, and
            rows: where it belongs in
            samples: the memory for decoded samples, and in
            labels: that for labels.

        Raises:
            DataError: a sample is bad, even after it was fetched again, and ``data.on_bad_sample``
                is "raise", or there were too many.
        """
        for row, k, number in zip(rows, piece_of, numbers, strict=True):
            piece = pieces[k]
            try:
                label = piece.rows.decode_into(number, piece.start, piece.data, samples[row])
            except CodecError:
                self.forget(piece)
                index = int(self._shard_begins[piece.shard]) + number
                label = self._recover(index, samples[row])
            if labels is not None:
                labels[row] = label

    def _read(self, indices: Indices) -> tuple[Samples, Indices | None]:
        samples, labels = self.new_samples(len(indices)), self.new_labels(len(indices))
        if not len(indices):
            return samples, labels
        by_index = np.argsort(indices, kind="stable")
        ordered = indices[by_index]
        shards = np.searchsorted(self._shard_ends, ordered, side="right")
        numbers = ordered - self._shard_begins[shards]
        if self._decoded is None:
            starts = cut_runs(ordered, shards, self._mean_bytes)
        else:
            blocks = block_bounds(ordered, self._block_ends)
            starts = np.flatnonzero(np.diff(blocks[0], prepend=-1))
            firsts, ends = (bounds - self._shard_begins[shards] for bounds in blocks)
        stops = np.append(starts[1:], len(ordered))
        num_bytes = (ordered[stops - 1] + 1 - ordered[starts]) * self._mean_bytes[shards[starts]]
        portions = np.cumsum(num_bytes) // _PORTION_BYTES
        for first, last in _runs(portions):
            if self._decoded is None:
                pieces = [
                    Piece(int(shards[i]), int(numbers[i]), int(numbers[j - 1]) + 1, 0, None)
                    for i, j in zip(starts[first:last], stops[first:last], strict=True)
                ]
                self.fetch(pieces)
            else:
                portion = starts[first:last]
                columns = shards[portion], firsts[portion], ends[portion]
                pieces = self._whole(list(zip(*(c.tolist() for c in columns), strict=True)))
            here = slice(starts[first], stops[last - 1])
            piece_of = np.repeat(np.arange(last - first), (stops - starts)[first:last])
            rows = by_index[here].tolist()
            self.decode(pieces, piece_of.tolist(), numbers[here].tolist(), rows, samples, labels)
            beat()
        return samples, labels

    def _whole(self, blocks: Sequence[tuple[int, int, int]]) -> list[Piece]:
        """Blocks of samples (shard, first, end), each fetched once."""
        new = [Piece(*block, 0, block[1:]) for block in blocks if block not in self._fetched]
        self.fetch(new)
        self._fetched.update({(piece.shard, piece.first, piece.end): piece for piece in new})
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
        pieces: Sequence[Piece],
        shards: Sequence[OpenShard],
        spans: Sequence[tuple[int, int]],
        stopped: Callable[[], bool],
    ) -> list[bytes]:
        """Pieces of blocks that the cache has, or gets."""
        places: dict[str, tuple[OpenShard, tuple[int, int]]] = {}
        keys = []
        for piece, shard in zip(pieces, shards, strict=True):
            block = shard.span(*(piece.block or (piece.first, piece.end)))
            keys.append(block_key(self._manifest.shards[piece.shard].sha256, *block))
            places[keys[-1]] = shard, block
        absent = list(places.values())

        def load(numbers: list[int]) -> list[bytes]:
            return self._fetch_spans(*zip(*(absent[i] for i in numbers), strict=True))

        blocks = dict(zip(places, cache.fetch(list(places), load, stopped), strict=False))
        if not blocks:
            return []
        contents = []
        for key, (start, stop) in zip(keys, spans, strict=True):
            begin = places[key][1][0]
            contents.append(blocks[key][start - begin : stop - begin])
        return contents

    def _recover(self, index: int, out: Samples) -> int:
        """Decode a sample that was damaged into ``out``: fetched again, or else by the policy."""
        try:
            if index not in self.bad_samples:
                return self._decode_alone(index, out)
        except DataError as error:
            self._count_bad(index, error)
        for attempt in range(_MOST_SUBSTITUTES):
            other = substitute(index, attempt, self.num_samples)
            if other in self.bad_samples:
                continue
            try:
                return self._decode_alone(other, out)
            except DataError as error:
                self._count_bad(other, error)
        raise DataError(
            self._store.url,
            f"sample {index:,} is bad, and so are the {_MOST_SUBSTITUTES} that would stand in",
            hint="Restore the shards from a copy, or pack them again",
        )

    def _decode_alone(self, index: int, out: Samples) -> int:
        """Fetch one sample from storage and decode it into ``out``; its label."""
        number = int(np.searchsorted(self._shard_ends, index, side="right"))
        shard, i = self._shards[number], index - int(self._shard_begins[number])
        span = shard.span(i, i + 1)
        (data,) = self._fetch_spans([shard], [span])
        return shard.decode_again(i, data, out)

    def _count_bad(self, index: int, error: DataError) -> None:
        """Note a sample as bad, or raise."""
        if self.config.on_bad_sample == "raise":
            raise error
        budget = self.config.bad_sample_budget
        with self._bad_lock:
            self._bad[index] = str(error)
            if len(self._bad) > budget:
                raise too_many_bad(len(self._bad), budget, str(error)) from error

    def _key(self, piece: Piece, shard: OpenShard) -> str:
        assert piece.block is not None
        return block_key(self._manifest.shards[piece.shard].sha256, *shard.span(*piece.block))


def too_many_bad(count: int, budget: int, message: str) -> DataError:
    """The error of a run that had to replace too many samples; ``message`` is about the last."""
    return DataError(
        "data.bad_sample_budget",
        f"{count:,} samples are bad, the last: {message.rstrip('.')}",
        value=budget,
        hint="Restore the shards from a copy, pack them again, or raise the budget",
    )


def _shared_manifest(store: Store, comm: Communicator) -> Manifest:
    message: dict[str, Any] = {}
    if comm.is_main:
        try:
            message = {"manifest": read_manifest(store).model_dump(mode="json")}
        except GatdistError as error:
            message = {"error": [type(error).__name__, str(error)]}
    message = comm.broadcast_object(message)
    if "error" in message:
        raise rebuilt(*message["error"])
    return Manifest.model_validate(message["manifest"])


def _runs(values: Indices) -> list[tuple[int, int]]:
    """First and end of each run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True))

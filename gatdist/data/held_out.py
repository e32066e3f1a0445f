"""Which samples of a data set are held out: never trained on, and evaluated instead.

A function of a sample's key alone, so it does not depend on workers, shards or the other samples.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gatdist.common.errors import ConfigError
from gatdist.common.heartbeat import beat
from gatdist.data.format.manifest import Manifest, Shard
from gatdist.data.format.shard_files import read_index
from gatdist.storage import Store

# Of the clips that one recording was cut into.
_CLIP = re.compile(rb"-\d{5}$")
_HASH_BYTES = 8
_READERS = 16  # of indexes in remote storage


@dataclass(frozen=True)
class Part:
    """The held-out samples of a data set, or all others.

    Attributes:
        share: ``data.held_out``, above 0 and below 1.
        is_held_out: Whether these are the held-out samples.
        by_recording: Whether clips of one recording stay together: keys that differ only in a
            suffix of a hyphen and five digits.
        counts: Number of these samples in each shard.
    """

    share: float
    is_held_out: bool
    by_recording: bool
    counts: Sequence[int]

    @classmethod
    def for_training(cls, manifest: Manifest, share: float, counts: Sequence[int]) -> Self:
        """Return the part to train on. Raises ConfigError unless both parts have samples."""
        by_recording = _has_audio(manifest)
        if sum(counts) in (0, manifest.num_samples):
            what = "holds out none" if sum(counts) else "holds out all"
            hint = "Change the share, or name separate data in evaluate.url"
            if by_recording:
                hint += ". Clips of one recording, NAME-00000, NAME-00001, …, stay together"
            rule = f"{what} of the {manifest.num_samples:,} samples"
            raise ConfigError("data.held_out", rule, value=share, hint=hint)
        return cls(share, False, by_recording, counts)

    def others(self, manifest: Manifest) -> Part:
        """Return the other part."""
        counts = [s.num_samples - n for s, n in zip(manifest.shards, self.counts, strict=True)]
        return Part(self.share, not self.is_held_out, self.by_recording, counts)

    def chosen(self, keys: NDArray[Any]) -> NDArray[np.bool_]:
        """Return whether samples are of this part by their keys, both [n]."""
        return _are_held_out(keys, self.share, self.by_recording) == self.is_held_out

    @property
    def name(self) -> str:
        return f"{'held out' if self.is_held_out else 'not held out'}, share {self.share:g}"


def training_counts(store: Store, manifest: Manifest, share: float) -> list[int]:
    """Return how many samples of each shard are trained on; reads the keys of all samples."""
    by_recording = _has_audio(manifest)

    def count(shard: Shard) -> int:
        keys = read_index(store, shard)["key"]
        is_first = np.append(True, keys[1:] != keys[:-1])
        return shard.num_samples - int(_are_held_out(keys[is_first], share, by_recording).sum())

    counts = []
    with ThreadPoolExecutor(1 if store.is_local else _READERS) as readers:
        for found in readers.map(count, manifest.shards):
            counts.append(found)
            beat()
    return counts


def _has_audio(manifest: Manifest) -> bool:
    fields = (manifest.fields or {}).values()
    return "audio" in {manifest.modality, *(field.modality for field in fields)}


def _are_held_out(keys: NDArray[Any], share: float, by_recording: bool) -> NDArray[np.bool_]:
    names = (_CLIP.sub(b"", key) if by_recording else key for key in keys.tolist())
    hashes = (hashlib.blake2b(name, digest_size=_HASH_BYTES).digest() for name in names)
    limit = round(share * 2 ** (8 * _HASH_BYTES))
    return np.array([int.from_bytes(each, "big") < limit for each in hashes], dtype=bool)

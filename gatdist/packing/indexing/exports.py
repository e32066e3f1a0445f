"""Indexes that other readers of WebDataset shards want.

* DALI's ``.idx``: a line ``v1.2 N``, then one a sample: ending, offset, size and name of each file.
* Megatron-Energon's ``.tar.idx``: where each sample begins, and the last one ends, as little-endian
  64-bit numbers; and the folder ``.nv-meta``, which lists the shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from gatdist.data.format import Shard
from gatdist.packing.indexing.scan import Sample
from gatdist.storage import Store

NAMES = ("dali", "energon")


class Exports:
    """The indexes of one shard.

    Args:
        names: which, of ``NAMES``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._lines: list[str] = []

    def add(self, sample: Sample) -> None:
        """A sample that is in the index."""
        if "dali" in self._names:
            files = (f"{m.component} {m.offset} {len(m.content)} {m.name}" for m in sample.members)
            self._lines.append(" ".join(files))

    def write(self, dest: Store, shard: str, begins: Sequence[int]) -> None:
        """Write them.

        Args:
            dest: the folder.
            shard: name of the tar.
            begins: of all keys, and of the end; see :class:`~gatdist.packing.indexing.scan.Scan`.
        """
        if "dali" in self._names:
            text = "\n".join([f"v1.2 {len(self._lines)}", *self._lines])
            dest.publish(f"{shard.removesuffix('.tar')}.idx", f"{text}\n".encode())
        if "energon" in self._names:
            dest.publish(f"{shard}.idx", np.array(begins, dtype="<u8").tobytes())


def write_energon_folder(dest: Store, shards: Sequence[Shard], begins: Sequence[int]) -> None:
    """Write ``.nv-meta``.

    Args:
        dest: the folder.
        shards: all of them.
        begins: how many keys each has, as its ``.tar.idx`` tells.
    """
    names = [shard.name for shard in shards]
    counts = dict(zip(names, begins, strict=True))
    info = {"energon_version": "7.0.0", "shard_counts": counts}
    split = {"split_parts": {"train": names, "val": [], "test": []}, "exclude": []}
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    for name, values in ((".info.json", info), ("split.yaml", split), ("dataset.yaml", kind)):
        # What is JSON is YAML, too.
        dest.publish(f".nv-meta/{name}", json.dumps(values, indent=1).encode())

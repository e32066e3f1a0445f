"""Shards on storage: WebDataset tars, an index of each, and the manifest, written last.

::

    shard-000000.tar          USTAR, mtime 0; the files of a sample share their key: 000042.png,
                              000042.cls
    shard-000000.index.npy    one row per file: key, component, offset, size, crc32
    manifest.json             sample format; size, number of samples and SHA-256 of each shard

A folder without a manifest is an incomplete data set. The tars may be in another folder, named in
the manifest.
"""

from gatdist.data.format.manifest import (
    MANIFEST,
    Manifest,
    SampleSpec,
    Shard,
    fits_manifest,
    open_shards,
    read_manifest,
    write_manifest,
)
from gatdist.data.format.shard_files import (
    Components,
    encode_index,
    read_index,
    write_dataset,
    write_shard,
)

__all__ = [
    "MANIFEST",
    "Components",
    "Manifest",
    "SampleSpec",
    "Shard",
    "encode_index",
    "fits_manifest",
    "open_shards",
    "read_index",
    "read_manifest",
    "write_dataset",
    "write_manifest",
    "write_shard",
]

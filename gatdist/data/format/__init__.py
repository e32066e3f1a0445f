"""Shards on storage: plain WebDataset tars, an index beside each, and the manifest, written last.

::

    shard-000000.tar          USTAR, mtime 0; the files of a sample share their key: 000042.png,
                              000042.cls
    shard-000000.index.npy    one row a file: key, component, offset, size, crc32
    manifest.json             what the data set is, and each shard's size, count and SHA-256

A folder without a manifest is no data set, so that one half written is never taken for whole. The
tars may lie elsewhere, in a folder that can't be written to: the manifest
says where.
"""

from gatdist.data.format.index import encode_index, read_index
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
from gatdist.data.format.writing import Components, write_dataset, write_shard

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

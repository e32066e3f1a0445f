"""Zips and tars: where in them each file is."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from gatdist.data.packing.entries import LeftOut, Span, Zipped
from gatdist.data.packing.ranges import open_file
from gatdist.data.packing.sources.tree import File
from gatdist.errors import DataError
from gatdist.storage import Store

_END_OF_TAR_BYTES = 512
_ENCRYPTED = 0x1  # bit of a zip's flags
_UNPACKERS: Mapping[str, Any] = {
    **{".tar.gz": gzip.open, ".tgz": gzip.open},
    **{".tar.bz2": bz2.open, ".tbz": bz2.open, ".tbz2": bz2.open},
    **{".tar.xz": lzma.open, ".txz": lzma.open},
}
COMPRESSED = tuple(_UNPACKERS)


def zip_files(store: Store, name: str, left_out: list[LeftOut]) -> Iterator[File]:
    """The files of a zip, as its directory lists them.

    Raises:
        DataError: it is no zip.
    """
    try:
        with open_file(store, name) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            end = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DataError(f"{store.url}/{name}", f"is no readable zip ({error})") from None
    # A member ends before the next begins; its own header may be longer than the directory tells.
    starts = sorted({member.header_offset for member in members} | {end})
    next_start = dict(pairwise(starts))
    for member in members:
        if member.is_dir():
            continue
        if member.flag_bits & _ENCRYPTED:
            left_out.append((member.filename, "is encrypted"))
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = f"is compressed by method {member.compress_type}, expected 8 (deflate)"
            left_out.append((member.filename, method))
        else:
            zipped = Zipped(member.compress_type, member.file_size, member.CRC)
            start, stop = member.header_offset, next_start[member.header_offset]
            yield File(member.filename, Span(name, start, stop, member.file_size, zipped))


def tar_files(
    store: Store, name: str, left_out: list[LeftOut], shown: str | None = None
) -> Iterator[File]:
    """The files of an uncompressed tar, from its headers.

    Raises:
        DataError: it is no tar, compressed, or cut short.
    """
    subject = shown or f"{store.url}/{name}"
    end = store.size(name)
    try:
        with open_file(store, name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                stop = member.offset_data + member.size
                if stop > end:
                    rule = f"is cut short: {member.name} ends at byte {stop} of {end}"
                    raise DataError(subject, rule, mend="Fetch it again")
                if member.isreg() and not member.issparse():
                    span = Span(name, member.offset_data, stop, member.size)
                    yield File(member.name.removeprefix("./"), span)
                elif not member.isdir():
                    left_out.append((member.name, "is a link or another thing than a file"))
            file.seek(archive.offset)
            if file.read(_END_OF_TAR_BYTES) != bytes(_END_OF_TAR_BYTES):  # Python would not mind
                rule = f"is cut short or damaged at byte {archive.offset} of {end}"
                raise DataError(subject, rule, mend="Fetch it again")
    except tarfile.TarError as error:
        mend = "Fetch it again; one that is compressed must end in .tar.gz, .tar.bz2 or .tar.xz"
        raise DataError(subject, f"is no tar, or cut short ({error})", mend=mend) from None


def unpack_tar(store: Store, name: str, spool: Store) -> str:
    """Copy a compressed tar, uncompressed, into the folder ``spool``, once.

    Files in a compressed tar can't be read in another order than they stand there.

    Returns:
        The name of the copy in ``spool``.

    Raises:
        DataError: it can't be uncompressed.
    """
    copy = f"{hashlib.sha256(f'{name}:{store.size(name)}'.encode()).hexdigest()[:16]}.tar"
    if spool.exists(copy):
        return copy
    unpack = next(each for end, each in _UNPACKERS.items() if name.lower().endswith(end))
    with tempfile.TemporaryDirectory(prefix="gatdist-pack-") as folder:
        path = Path(folder, copy)
        try:
            with open_file(store, name) as packed, unpack(packed) as tar, path.open("wb") as plain:
                shutil.copyfileobj(tar, plain, 2**20)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, OSError) as error:
            raise DataError(
                f"{store.url}/{name}",
                f"can't be uncompressed ({error})",
                mend="Fetch it again, and see that there is room for it uncompressed",
            ) from error
        spool.publish_file(copy, path)
    return copy

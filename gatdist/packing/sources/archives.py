"""Zips and tars: the positions of their files."""

from __future__ import annotations

import bz2
import hashlib
import json
import lzma
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

from gatdist.common.errors import DataError
from gatdist.data.format.shard_files import TarDamagedError, Walk, not_a_file, trailing_data
from gatdist.packing.entries import Skipped, Span, Zipped
from gatdist.packing.sources.files import File, SeekableFile, open_file, plain_path
from gatdist.storage import Store

_ENCRYPTED = 0x1  # bit of a zip's flags
_UTF8 = 0x800
_ZIP_END = struct.Struct("<20xH")  # the length of the comment behind it
# A few bytes may inflate to a thousand times as many.
_CHUNK_BYTES = 2**14
_MAGIC_BYTES = 10  # after these, a stream is known to be of the format
_gzip = partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS)
_UNPACKERS: Mapping[str, Callable[[], Any]] = {
    **{".tar.gz": _gzip, ".tgz": _gzip},
    **dict.fromkeys((".tar.bz2", ".tbz", ".tbz2"), bz2.BZ2Decompressor),
    **dict.fromkeys((".tar.xz", ".txz"), lzma.LZMADecompressor),
}
COMPRESSED = tuple(_UNPACKERS)


def zip_files(store: Store, name: str, skipped: list[Skipped]) -> Iterator[File]:
    """Yield the files in a zip's directory. Raises DataError if it is no zip."""
    with open_file(store, name) as file:
        yield from _zip_files(file, name, store.size(name), f"{store.url}/{name}", skipped)


def _zip_files(
    file: BinaryIO, name: str, size: int, subject: str, skipped: list[Skipped]
) -> Iterator[File]:
    """The files of the zip that ends at byte ``size``, and of one before it."""
    try:
        with zipfile.ZipFile(cast(Any, _Begin(file, size))) as archive:
            members = archive.infolist()
            end = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise DataError(subject, f"is not a readable zip ({error})") from None
    stop = _zip_end(file, size)
    if stop < size:
        skipped.append((name, trailing_data(stop)))
    # A member ends before the next; its own header may be longer than in the directory.
    starts = sorted({member.header_offset for member in members} | {end})
    next_start = dict(pairwise(starts))
    if starts[0]:  # as after `cat a.zip b.zip`
        before: list[Skipped] = []
        try:
            yield from list(_zip_files(file, name, starts[0], subject, before))
            skipped += before
        except DataError:
            rule = f"has {starts[0]} bytes before its first file that are not a zip (ignored)"
            skipped.append((name, rule))
    for member in members:
        path = plain_path(member.filename)
        if member.filename.endswith(("/", "\\")):
            continue
        if member.flag_bits & _ENCRYPTED:
            skipped.append((path, "is encrypted"))
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = f"is compressed by method {member.compress_type}, expected 8 (deflate)"
            skipped.append((path, method))
        elif member.header_offset not in next_start:
            skipped.append((path, "is damaged in the zip: it is after the directory"))
        else:
            encoding = "utf-8" if member.flag_bits & _UTF8 else "cp437"
            crc = zlib.crc32(member.orig_filename.encode(encoding, "replace"))
            zipped = Zipped(member.compress_type, member.file_size, member.CRC, crc)
            start, stop = member.header_offset, next_start[member.header_offset]
            yield File(path, Span(name, start, stop, member.file_size, zipped))


def _zip_end(file: BinaryIO, size: int) -> int:
    """The byte after a zip's end record, which ``zipfile`` finds in the last 64 KiB."""
    begin = max(0, size - 2**16 - _ZIP_END.size)
    file.seek(begin)
    tail = file.read(size - begin)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _ZIP_END.size:
        return size
    return begin + at + _ZIP_END.size + int(_ZIP_END.unpack_from(tail, at)[0])


class _Begin(SeekableFile):
    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(size)
        self._file = file

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._position)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content


def tar_files(
    store: Store, name: str, skipped: list[Skipped], shown: str | None = None
) -> Iterator[File]:
    """Yield the files of an uncompressed tar, from its headers. DataError if it is none."""
    subject = shown or f"{store.url}/{name}"
    hint = "Fetch it again; one that is compressed must end in .tar.gz, .tar.bz2 or .tar.xz"
    try:
        with open_file(store, name) as file:
            walk = Walk(file, store.size(name))
            for member in walk:
                if what := not_a_file(member):
                    skipped.append((member.name, f"is {what}"))
                elif not member.isdir():
                    start, stop = member.offset_data, member.offset_data + member.size
                    yield File(member.name, Span(name, start, stop, member.size))
            if walk.trailing is not None:
                skipped.append((shown or name, trailing_data(walk.trailing)))
    except TarDamagedError as error:
        raise DataError(subject, str(error), hint=hint) from None


def unpack_tar(store: Store, name: str, spool: Store, skipped: list[Skipped]) -> str:
    """Copy a compressed tar, uncompressed, into the folder ``spool``, once; return the copy's name.

    Files of a compressed tar can only be read in its order.
    """
    stem = hashlib.sha256(f"{name}:{store.size(name)}".encode()).hexdigest()[:16]
    copy = f"{stem}.tar"
    if not spool.exists(f"{stem}.json"):  # written last
        unpacker = next(each for end, each in _UNPACKERS.items() if name.lower().endswith(end))
        with tempfile.TemporaryDirectory(prefix="gatdist-pack-") as folder:
            path = Path(folder, copy)
            try:
                with open_file(store, name) as packed, path.open("wb") as plain:
                    trailing = _unpack(packed, unpacker, plain)
            except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
                raise DataError(
                    f"{store.url}/{name}",
                    f"can't be uncompressed ({error})",
                    hint="Fetch it again, and check the free space",
                ) from error
            spool.publish_file(copy, path)
        spool.publish(f"{stem}.json", json.dumps(trailing).encode())
    trailing = json.loads(spool.read(f"{stem}.json"))
    if trailing is not None:
        skipped.append((f"{store.url}/{name}", trailing_data(trailing)))
    return copy


def _unpack(packed: BinaryIO, unpacker: Callable[[], Any], plain: BinaryIO) -> int | None:
    """Uncompress all streams of a file; return the first byte of trailing data, if there is any."""
    at, whole, rest = 0, 0, packed.read(_CHUNK_BYTES)
    while rest:
        begin, stream, size = at, unpacker(), 0
        try:
            while rest and not stream.eof:
                content = stream.decompress(rest)
                size += plain.write(content)
                at += len(rest)
                rest = packed.read(_CHUNK_BYTES) if not stream.eof else stream.unused_data
            if not stream.eof:
                raise EOFError("it is truncated")
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            is_stream = size or (isinstance(error, EOFError) and at - begin > _MAGIC_BYTES)
            if whole and not is_stream:
                return begin
            raise
        whole += 1
        at -= len(rest)
        while True:  # gzip and xz may be padded with zeros
            stripped = rest.lstrip(b"\0")
            at, rest = at + len(rest) - len(stripped), stripped
            if rest or not (rest := packed.read(_CHUNK_BYTES)):
                break
    if not whole:
        raise EOFError("it is empty")
    return None

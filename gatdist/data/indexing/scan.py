"""Reads a tar from its first byte to its last, once, in memory that does not grow with it."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from gatdist.data.packing.entries import LeftOut, printable
from gatdist.data.packing.sources.tree import is_hidden
from gatdist.data.packing.sources.webdataset import split
from gatdist.errors import DataError
from gatdist.storage import Store

# A request to an object store should be worth its round trip.
_CHUNK_BYTES = 8 * 2**20
_TAR_BLOCK = 512
_LARGEST_FILE_BYTES = 2**30
# What compressed files begin with, and what makes a tar of one.
_COMPRESSED = {
    b"\x1f\x8b": "gzip -dc",
    b"BZh": "bzip2 -dc",
    b"\xfd7zXZ\x00": "xz -dc",
    b"\x28\xb5\x2f\xfd": "zstd -dc",
}


class Member(NamedTuple):
    """A file of a sample.

    Attributes:
        key: of the sample.
        component: ending, in lower case.
        name: as it stands in the tar.
        header: byte where its header begins, and
        offset: where its content begins.
        content: of the file.
    """

    key: str
    component: str
    name: str
    header: int
    offset: int
    content: bytes


class Sample(NamedTuple):
    """The files of one key, in the order of the tar."""

    key: str
    members: list[Member]


class Scan:
    """A tar being read.

    Args:
        store: its folder.
        name: of the tar.

    Attributes:
        size: of the tar, in bytes.
        left_out: what is no file of a sample, or can't be used, and why; filled while reading.
        begins: byte where each key's first header begins, those left out too, and at last where
            the end of the tar begins; filled while reading.

    Raises:
        DataError: it is compressed.
        StorageError: it can't be read.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._url = f"{store.url}/{name}"
        self.size = store.size(name)
        self.left_out: list[LeftOut] = []
        self.begins: list[int] = []
        self._end = 0
        self._stream = _Hashed(store, name, self.size)

    @property
    def num_read(self) -> int:
        """Bytes of the tar so far."""
        return self._stream.tell()

    @property
    def sha256(self) -> str:
        """Of the whole tar, in hex; after all samples were taken."""
        assert self._stream.tell() == self.size
        return self._stream.digest.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Each sample, once.

        Raises:
            DataError: it is no tar, compressed, cut short or damaged.
            StorageError: it can't be read.
        """
        seen: set[str] = set()
        for key, members in groupby(self._members(), key=attrgetter("key")):
            sample = Sample(key, list(members))
            self.begins.append(sample.members[0].header)
            components = [member.component for member in sample.members]
            if key in seen:
                self._leave_out(key, "its files stand in two places of the shard")
            elif len(set(components)) < len(components):
                twice = next(c for c in components if components.count(c) > 1)
                self._leave_out(key, f"has two files .{twice}")
            else:
                yield sample
            seen.add(key)
        self.begins.append(self._end)

    def _members(self) -> Iterator[Member]:
        self._require_plain()
        try:
            with tarfile.open(fileobj=self._stream, mode="r:", errorlevel=0) as archive:
                while (info := archive.next()) is not None:
                    if member := self._member(archive, info):
                        yield member
                    archive.members.clear()  # type: ignore[attr-defined]  # they only grow
                end = archive.offset
        except tarfile.TarError as error:
            raise self._damaged(f"is no tar, or cut short ({error})") from None
        except (ValueError, OverflowError, UnicodeError) as error:  # headers that make no sense
            raise self._damaged(f"is damaged at byte {self._stream.tell()} ({error})") from None
        # Python takes any garbage for the end.
        self._stream.seek(end)
        if self._stream.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
            raise self._damaged(f"is cut short or damaged at byte {end} of {self.size}")
        self._end = end
        self._stream.drain()

    def _member(self, archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member | None:
        name = info.name.removeprefix("./")
        stop = info.offset_data + info.size
        if stop > self.size:
            raise self._damaged(f"is cut short: {name} ends at byte {stop} of {self.size}")
        key, component = split(name)
        if name.startswith("/") or ".." in name.split("/"):
            self._leave_out(name, "has a name that leads out of the shard")
        elif info.isdir() or is_hidden(name):
            return None
        elif printable(name) != name:
            self._leave_out(name, "has a name that is not UTF-8")
        elif not info.isreg() or info.issparse():
            self._leave_out(name, "is a link or another thing than a file")
        elif not component or not key.rpartition("/")[2]:
            self._leave_out(name, "has no key or no ending")
        elif info.size > _LARGEST_FILE_BYTES:
            self._leave_out(name, f"has {info.size:,} bytes, the most is {_LARGEST_FILE_BYTES:,}")
        else:
            file = archive.extractfile(info)
            content = file.read() if file else b""
            return Member(key, component, name, info.offset, info.offset_data, content)
        return None

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out.append((f"{self._name}/{printable(name)}", reason))

    def _require_plain(self) -> None:
        begin = self._stream.read(8)
        self._stream.seek(0)
        for magic, unpack in _COMPRESSED.items():
            if begin.startswith(magic):
                plain = self._name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
                mend = f"Unpack it, and index again: {unpack} {self._url} > {plain}.tar"
                rule = "is compressed, so that no sample can be read without all before it"
                raise DataError(self._url, rule, mend=mend)

    def _damaged(self, problem: str) -> DataError:
        return DataError(self._url, problem, mend="Restore it from a copy, or write it again")


class _Hashed(io.RawIOBase):
    """The tar as a file. Every byte is fetched and hashed once, in order."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name, self._size = store, name, size
        self._begin, self._chunk, self._position = 0, b"", 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        assert offset >= self._begin, "what was passed is gone"
        self._position = offset
        return offset

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._position + size)
        parts = []
        while self._position < stop:
            end = self._begin + len(self._chunk)
            if self._position >= end:
                self._fetch(end)
                continue
            part = self._chunk[self._position - self._begin : stop - self._begin]
            parts.append(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def drain(self) -> None:
        """Read what is left."""
        while self._position < self._size:
            self.read(_CHUNK_BYTES)

    def _fetch(self, begin: int) -> None:
        stop = min(begin + _CHUNK_BYTES, self._size)
        (content,) = self._store.read_ranges([(self._name, begin, stop)])
        self.digest.update(content)
        # tarfile looks at the last byte before a header again.
        kept = self._chunk[-_TAR_BLOCK:]
        self._begin, self._chunk = begin - len(kept), kept + content

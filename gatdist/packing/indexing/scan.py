"""Read a tar once from end to end, in constant memory."""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from gatdist.common.errors import DataError
from gatdist.data.format.shard_files import (
    TAR_BLOCK,
    TarDamagedError,
    Walk,
    not_a_file,
    trailing_data,
)
from gatdist.packing.entries import Skipped, printable
from gatdist.packing.processes import Report
from gatdist.packing.sources.files import SeekableFile, split, system_file
from gatdist.storage import Store

_CHUNK_BYTES = 8 * 2**20
_LARGEST_FILE_BYTES = 2**30
_RESTORE = "Restore it from a copy, or write it again"
# Magic bytes of compressed files, and the command that unpacks them.
_COMPRESSED = {
    b"\x1f\x8b": "gzip -dc",
    b"BZh": "bzip2 -dc",
    b"\xfd7zXZ\x00": "xz -dc",
    b"\x28\xb5\x2f\xfd": "zstd -dc",
}


class Member(NamedTuple):
    """A file of a sample; its extension is in lower case."""

    key: str
    component: str
    name: str
    header: int  # first byte of its header in the tar
    offset: int  # first byte of its content
    content: bytes


class Sample(NamedTuple):
    """The files of one key, in the order of the tar."""

    key: str
    members: list[Member]


class Scan:
    """A tar that is being read, and what was found so far; DataError if it is compressed."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._url = f"{store.url}/{name}"
        self.size = store.size(name)
        self.skipped: list[Skipped] = []
        self.ignored: list[Skipped] = []  # files of operating systems and tools
        self.scattered: set[str] = set()  # keys whose files are not adjacent
        self.begins: list[int] = []  # first byte of each key, skipped ones included, and the end
        self.trailing: int | None = None  # first byte of data after the tar
        self._end = self._reported = 0
        self._stream = _Hashed(store, name, self.size)

    def drain(self) -> None:
        self._stream.drain()

    def report(self, report: Report, at_least: int = 1) -> None:
        """Report the bytes read since the last report, if there are ``at_least`` as many."""
        if (read := self._stream.tell() - self._reported) >= at_least:
            report(read, 0)
            self._reported += read

    def report_rest(self, report: Report) -> None:
        report(self.size - self._reported, 0)

    @property
    def sha256(self) -> str:
        assert self._stream.tell() == self.size
        return self._stream.digest.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Yield each sample. DataError if it is no tar, compressed, truncated or damaged."""
        seen: dict[str, set[str]] = {}
        for key, members in groupby(self.members(), key=attrgetter("key")):
            sample = Sample(key, list(members))
            self.begins.append(sample.members[0].header)
            components = Counter(member.component for member in sample.members)
            if key in seen:
                if seen[key].isdisjoint(components):
                    self.scattered.add(key)
                    self._skip(key, "its files are not adjacent in the tar")
                else:
                    self._skip(key, "its files are in two places of the shard")
            elif twice := next((c for c, count in components.items() if count > 1), None):
                self._skip(key, f"has two files .{twice}")
            else:
                yield sample
            seen.setdefault(key, set()).update(components)
        self.begins.append(self._end)

    def members(self) -> Iterator[Member]:
        """Yield each file of a sample, in order. DataError as for :meth:`samples`."""
        self._require_plain()
        walk = Walk(self._stream, self.size)
        try:
            for info in walk:
                if member := self._member(info):
                    yield member
        except TarDamagedError as error:
            raise DataError(self._url, str(error), hint=_RESTORE) from None
        if walk.trailing is not None:
            self.trailing = walk.trailing
            self.skipped.append((self._name, trailing_data(walk.trailing)))
        self._end = walk.end
        self._stream.drain()

    def _member(self, info: tarfile.TarInfo) -> Member | None:
        name = info.name.removeprefix("./")
        key, component = split(name)
        if name.startswith("/") or ".." in name.split("/"):
            self._skip(name, "has a name outside the shard")
        elif info.isdir():
            return None
        elif reason := system_file(name):
            self.ignored.append((f"{self._name}/{printable(name)}", reason))
        elif printable(name) != name:
            self._skip(name, "has a name that is not UTF-8")
        elif what := not_a_file(info):
            self._skip(name, f"is {what}")
        elif not component or not key.rpartition("/")[2]:
            self._skip(name, "has no key or no extension")
        elif info.size > _LARGEST_FILE_BYTES:
            self._skip(name, f"has {info.size:,} bytes, the most is {_LARGEST_FILE_BYTES:,}")
        else:
            self._stream.seek(info.offset_data)
            content = self._stream.read(info.size)
            return Member(key, component, name, info.offset, info.offset_data, content)
        return None

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append((f"{self._name}/{printable(name)}", reason))

    def _require_plain(self) -> None:
        begin = self._stream.read(8)
        self._stream.seek(0)
        for magic, unpack in _COMPRESSED.items():
            if begin.startswith(magic):
                plain = self._name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
                hint = f"Unpack it, and index again: {unpack} {self._url} > {plain}.tar"
                rule = "is compressed, so that no sample can be read without all before it"
                raise DataError(self._url, rule, hint=hint)


class _Hashed(SeekableFile):
    """The tar as a file whose bytes are fetched and hashed once, in order."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        super().__init__(size)
        self._store, self._name = store, name
        self._begin, self._chunk = 0, b""
        self.digest = hashlib.sha256()

    def read(self, size: int | None = -1) -> bytes:
        assert self._position >= self._begin, "these bytes were dropped"
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
        while self._position < self._size:
            self.read(_CHUNK_BYTES)

    def _fetch(self, begin: int) -> None:
        stop = min(begin + _CHUNK_BYTES, self._size)
        (content,) = self._store.read_ranges([(self._name, begin, stop)])
        self.digest.update(content)
        # The reader of headers goes back by one block.
        kept = self._chunk[-TAR_BLOCK:]
        self._begin, self._chunk = begin - len(kept), kept + content

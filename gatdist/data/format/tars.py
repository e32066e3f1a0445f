"""Reader of tar headers, which are not trusted. Concatenated tars are read like one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

TAR_BLOCK = 512

_MAX_HEADER_BYTES = 2**20
_KINDS = {
    tarfile.LNKTYPE: "a hard link; write the tar with --hard-dereference",
    tarfile.SYMTYPE: "a symbolic link; write the tar with --dereference",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
}


class TarDamagedError(ValueError):
    """A tar is truncated or damaged: its list of files is incomplete."""


class Walk:
    """Iterator over the members of a tar, which is sought forward only, or back by one block.

    Attributes:
        end: offset of the last end-of-archive record, after the last member.
        trailing: offset of data that is neither zeros nor another tar; None without.
    """

    def __init__(self, file: BinaryIO | io.RawIOBase, size: int) -> None:
        self._file, self._size = file, size
        self.end = 0
        self.trailing: int | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield each member once, in tar order. Raises TarDamagedError."""
        headers = _Headers(self._file)
        at, ended = 0, False
        while at < self._size:
            self._file.seek(at)
            block = self._file.read(TAR_BLOCK) or b""
            if not block.strip(b"\0"):
                if not ended:
                    self.end, ended = at, True
                at += TAR_BLOCK
                continue
            try:
                self._file.seek(at)
                member = tarfile.TarInfo.fromtarfile(headers)  # type: ignore[arg-type]
                if member.size < 0 or headers.offset <= at:
                    raise ValueError("negative size")
            except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError) as e:
                if ended:
                    self.trailing = at
                    return
                where = f"is truncated or damaged at byte {at:,} of {self._size:,}"
                what = where if at else "is not a tar, or truncated"
                raise TarDamagedError(f"{what} ({e})") from None
            stop = min(member.offset_data + member.size, headers.offset)  # links have no content
            if stop > self._size:
                where = f"{member.name} ends at byte {stop:,} of {self._size:,}"
                raise TarDamagedError(f"is truncated: {where}")
            yield member
            at, ended = headers.offset, False
        if not self._size:
            raise TarDamagedError("is not a tar, or truncated: it is empty")
        if not ended:
            raise TarDamagedError(f"is truncated: no end-of-archive record in {self._size:,} bytes")


class _Headers:
    """The parts of ``TarFile`` and its file that :class:`tarfile.TarInfo` needs."""

    encoding, errors = "utf-8", "surrogateescape"

    def __init__(self, file: BinaryIO | io.RawIOBase) -> None:
        self._file, self.fileobj = file, self
        self.offset = 0
        self.pax_headers: dict[str, Any] = {}
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        return self._file.read(size) or b""


def not_a_file(member: tarfile.TarInfo) -> str:
    """Return what a member is if neither a file nor a folder, else ""."""
    if member.issparse():
        return "a sparse file; write the tar without --sparse"
    return "" if member.isreg() or member.isdir() else _KINDS.get(member.type, "not a regular file")


def trailing_data(at: int) -> str:
    """Return the reason reported for data after the end of a container."""
    return f"has data after its end at byte {at}, which is not read"

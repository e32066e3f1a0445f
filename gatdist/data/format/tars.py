"""The one reader of tar headers: indexing, packing and verifying walk a tar with it.

Like ``tar --ignore-zeros``, it reads on behind an end-of-archive record where another tar follows
(``cat a.tar b.tar``). Anything else behind the end is reported, and headers are not trusted.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

TAR_BLOCK = 512

# Names and records of one member; more is no sensible header.
_LARGEST_HEADER_BYTES = 2**20
_KINDS = {
    tarfile.LNKTYPE: "a hard link; write the tar with --hard-dereference",
    tarfile.SYMTYPE: "a symbolic link; write the tar with --dereference",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
}


class TarDamagedError(ValueError):
    """A tar is cut short or damaged, so that not all of its files can be known."""


class Walk:
    """Reads the headers of a tar, from its first byte to its last.

    Args:
        file: the tar. It is sought forward only, or back by one block.
        size: of the tar, in bytes.

    Attributes:
        end: byte where the last end-of-archive record begins; after the last member.
        trailing: byte where data begins that is neither zeros nor another tar; None without.
    """

    def __init__(self, file: BinaryIO | io.RawIOBase, size: int) -> None:
        self._file, self._size = file, size
        self.end = 0
        self.trailing: int | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Each member once, in the order of the tar. The file may be read between two of them.

        Raises:
            TarDamagedError: the tar is cut short, or a header makes no sense.
        """
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
                what = f"is cut short or damaged at byte {at:,} of {self._size:,}"
                raise TarDamagedError(
                    f"{what if at else 'is no tar, or cut short'} ({e})"
                ) from None
            stop = min(member.offset_data + member.size, headers.offset)  # links have no content
            if stop > self._size:
                rule = f"{member.name} ends at byte {stop:,} of {self._size:,}"
                raise TarDamagedError(f"is cut short: {rule}")
            yield member
            at, ended = headers.offset, False
        if not self._size:
            raise TarDamagedError("is no tar, or cut short: it is empty")
        if not ended:
            raise TarDamagedError(f"is cut short: no end-of-archive record in {self._size:,} bytes")


class _Headers:
    """What :class:`tarfile.TarInfo` needs of a ``TarFile``, and of its file."""

    encoding, errors = "utf-8", "surrogateescape"

    def __init__(self, file: BinaryIO | io.RawIOBase) -> None:
        self._file, self.fileobj = file, self
        self.offset = 0
        self.pax_headers: dict[str, Any] = {}
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        return self._file.read(size) or b""


def not_a_file(member: tarfile.TarInfo) -> str:
    """What a member is instead of a file or folder; "" where it is one."""
    if member.issparse():
        return "a sparse file; write the tar without --sparse"
    return "" if member.isreg() or member.isdir() else _KINDS.get(member.type, "no plain file")


def trailing_data(at: int) -> str:
    """The reason given for data behind the end of any kind of container."""
    return f"has data after the end at byte {at}, which is not read"

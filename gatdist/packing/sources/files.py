"""Files of a source: their names, whoever wrote them, and access to their bytes."""

from __future__ import annotations

import io
import re
import unicodedata
from typing import BinaryIO, NamedTuple, cast

from gatdist.packing.entries import Span
from gatdist.storage import Store

# Files and folders of operating systems and tools, in lower case.
_SYSTEM_NAMES = {
    # Windows
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler"),
    *("system volume information",),
    # macOS
    *("__macosx", "icon\r", "network trash folder", "temporary items"),
    # NAS: Synology, QNAP, NetApp
    *("@eadir", "@tmp", "@synoeastream", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    # Linux
    "lost+found",
}
_DRIVE = re.compile(r"^[A-Za-z]:/")
# A request to an object store takes as long as reading about this much.
_BUFFER_BYTES = 256 * 2**10


class File(NamedTuple):
    """A file of a tree: its path in it, and where its bytes are."""

    name: str
    span: Span


def system_file(name: str) -> str:
    """Return why a file belongs to an operating system or tool; "" for a user's file."""
    for part in name.replace("\\", "/").split("/"):
        if part.lower() in _SYSTEM_NAMES:
            return f"belongs to the operating system ({part.strip()})"
        if part.startswith(".") and part not in (".", ".."):
            return f"is hidden ({part})"
    return ""


def plain_path(name: str) -> str:
    """Return a normal form of a path: separators ``/``, no drive, no ``.``, relative, NFC.

    Windows writes other separators; macOS decomposes letters with accents.
    """
    path = _DRIVE.sub("", name.replace("\\", "/"))
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return unicodedata.normalize("NFC", "/".join(parts))


def extension_of(file: str) -> str:
    """Return the extension of a path or URL, in lower case, without the dot; "" without one."""
    path = file.partition("?")[0].partition("#")[0] if "://" in file else file
    return path.rpartition("/")[2].rpartition(".")[2].lower() if "." in path else ""


def split(name: str) -> tuple[str, str]:
    """Return WebDataset's key and extension: from the first dot of the last part, in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def open_file(store: Store, name: str) -> BinaryIO:
    """Open a file for reading; it may be closed, but need not be."""
    if store.is_local:
        store.size(name)  # raises the store's errors
        return store.local_path(name).open("rb")
    return cast(BinaryIO, io.BufferedReader(_Ranges(store, name), _BUFFER_BYTES))


class SeekableFile(io.RawIOBase):
    """The seeking of a read-only file; subclasses read."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a byte before the begin")
        self._position = base + offset
        return self._position


class _Ranges(SeekableFile):
    """A file of a store, read with its retries and checks."""

    def __init__(self, store: Store, name: str) -> None:
        super().__init__(store.size(name))
        self._store, self._name = store, name

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        (content,) = self._store.read_ranges([(self._name, self._position, stop)])
        buffer[: len(content)] = content
        self._position = stop
        return len(content)

"""Read the bytes of samples, from the origins and folders that the user allows."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self
from urllib.parse import unquote

from gatdist.common.errors import ConfigError, DataError, StorageError, StorageUnavailableError
from gatdist.config import expand_env
from gatdist.packing.entries import Entry, Listing, Part, Span, Zipped
from gatdist.storage import Store
from gatdist.storage.urls import LOCAL, OutsideUrl, origin

_GROUP_BYTES, _GROUP_ENTRIES = 16 * 2**20, 512
_UNKNOWN_BYTES = 256 * 2**10  # assumed for files of unknown size
_LARGEST_SAMPLE_BYTES = 2**30
# Ranges with a smaller gap are read by one request.
_GAP_BYTES = 64 * 2**10
_RUN_BYTES = 16 * 2**20
_CONCURRENT_FILES = 16
_MAX_PLACES_SHOWN = 5
# Lists of URLs are full of dead hosts; none may delay the rest for long.
_ELSEWHERE_BUDGET_S = 10.0

_ZIP_HEADER = struct.Struct("<4s22x2H")  # signature, length of the name, length of the extra field

# Of each of an entry's files: the content, or the reason why it can't be read.
Contents = Sequence[bytes | str]


class Fetcher:
    """Reads the files of samples in groups, the next one while the caller uses the last.

    A missing or truncated file concerns its sample alone: the reason is returned. StorageError is
    raised if the source's own storage is down or denies access.

    Args:
        stores: folders that files may be in. Relative names are in the first.
        allowed_origins: URLs of other allowed origins, and absolute paths of allowed folders.
            Nothing is requested from elsewhere.
    """

    def __init__(self, stores: Sequence[Store], allowed_origins: Sequence[str] = ()) -> None:
        self._stores = stores
        self._others = [
            Store(url, retry_budget_s=_ELSEWHERE_BUDGET_S)
            for url in allowed_origins
            if origin(url) != LOCAL
        ]
        self._folders = local_folders(stores, allowed_origins)
        self._root = Store("/")
        self._elsewhere: dict[str, tuple[Store, bool]] = {}
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="gatdist-pack")
        self._files = ThreadPoolExecutor(_CONCURRENT_FILES, thread_name_prefix="gatdist-pack")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for executor in (self._ahead, self._files):
            executor.shutdown(wait=True, cancel_futures=True)

    def fetch(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Contents]]:
        """Yield each entry with its files, in order."""
        waiting: tuple[Sequence[Entry], Future[list[Contents]]] | None = None
        for group in _groups(entries):
            reading = self._ahead.submit(self._read, group)
            if waiting:
                yield from zip(waiting[0], waiting[1].result(), strict=True)
            waiting = group, reading
        if waiting:
            yield from zip(waiting[0], waiting[1].result(), strict=True)

    def _read(self, entries: Sequence[Entry]) -> list[Contents]:
        contents = [part.content for entry in entries for part in entry.files]
        spans = [content for content in contents if isinstance(content, Span)]
        read = dict(zip(spans, self.read(spans), strict=True))
        return [[_content(part, read) for part in entry.files] for entry in entries]

    def read(self, spans: Sequence[Span]) -> list[bytes | str]:
        """Return the bytes of each span, or the reason why not."""
        read: dict[Span, bytes | str] = {}
        whole = [span for span in spans if span.stop is None]
        near = all("://" not in span.file for span in whole) and self._stores[0].is_local
        # Threads hide the latency of storage; on a local disk they only cost time.
        each = map(self._read_one, whole) if near else self._files.map(self._read_one, whole)
        read.update(zip(whole, each, strict=True))
        for run in _runs(span for span in spans if span.stop is not None):
            first, stop = run[0].start, max(span.stop or 0 for span in run)
            together = self._read_one(Span(run[0].file, first, stop)) if len(run) > 1 else ""
            for span in run:
                if isinstance(together, bytes):
                    read[span] = together[span.start - first : (span.stop or 0) - first]
                else:
                    read[span] = self._read_one(span)
        return [_unzipped(read[span], span.zipped) for span in spans]

    def _read_one(self, span: Span) -> bytes | str:
        if (span.size or 0) > _LARGEST_SAMPLE_BYTES:
            limit = f"{_LARGEST_SAMPLE_BYTES / 2**30:g} GiB"
            return f"has {span.size} bytes, and a sample may have {limit}"
        try:
            store, name, is_ours = self._store(span.file)
        except ValueError as error:
            return f"can't be read: it {error}"
        try:
            if span.stop is None:
                return store.read(name)
            return store.read_ranges([(name, span.start, span.stop)])[0]
        except StorageUnavailableError as error:
            if is_ours:
                raise
            return _reason(error)
        except StorageError as error:
            cause = error.__cause__
            absent = cause is None or isinstance(cause, FileNotFoundError | NotADirectoryError)
            if is_ours and not absent and not store.is_local:
                raise
            return _reason(error)

    def _store(self, file: str) -> tuple[Store, str, bool]:
        """The store, the name there, and whether it is the source's; ValueError if not allowed."""
        for store in self._stores:
            if file.startswith(f"{store.url}/") and ".." not in file.split("/"):
                return store, file[len(store.url) + 1 :], True
        if "://" in file:
            OutsideUrl(file).require_plain()
        path = local_path(file, self._stores[0])
        if path is not None:
            if not is_within(path, self._folders):
                raise ValueError("is in a folder that was not named (--allow-origin)")
            return self._root, path[1:], False
        if "://" not in file:
            return self._stores[0], file, True
        root, name = _root_and_name(file)
        if root in self._elsewhere:
            return self._elsewhere[root][0], name, self._elsewhere[root][1]
        store, is_ours = self._reached(OutsideUrl(root))
        if "?" not in root:  # or there may be one for each file
            self._elsewhere[root] = store, is_ours
        return store, name, is_ours

    def _reached(self, root: OutsideUrl) -> tuple[Store, bool]:
        """The store at a URL of a list. The source's credentials are for its origin alone."""
        for known in (self._stores[0], *self._others):
            if root.origin == known.origin:
                return known.reach(root), known is self._stores[0] and not known.is_local
        raise ValueError(f"is on {root.origin}, which was not named (--allow-origin)")


def _content(part: Part, read: Mapping[Span, bytes | str]) -> bytes | str:
    return read[part.content] if isinstance(part.content, Span) else part.content.encode()


def _root_and_name(url: str) -> tuple[str, str]:
    """The URL of a server or bucket, with the query of HTTP, and the unquoted name there."""
    protocol, _, rest = url.partition("://")
    host, _, name = rest.partition("/")
    if not protocol.startswith("http"):
        return f"{protocol}://{host}", name
    name, mark, query = name.partition("#")[0].partition("?")
    return f"{protocol}://{host}{mark}{query}", unquote(name)


def _groups(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    total = 0
    for entry in entries:
        group.append(entry)
        size = entry.size
        total += _UNKNOWN_BYTES if size is None else size
        if total >= _GROUP_BYTES or len(group) == _GROUP_ENTRIES:
            yield group
            group, total = [], 0
    if group:
        yield group


def _runs(spans: Iterable[Span]) -> Iterator[list[Span]]:
    run: list[Span] = []
    stop = 0
    for span in sorted(spans, key=lambda span: (span.file, span.start)):
        far = span.start > stop + _GAP_BYTES or (run and span.start > run[0].start + _RUN_BYTES)
        if run and (far or span.file != run[0].file):
            yield run
            run, stop = [], 0
        run.append(span)
        stop = max(stop, span.stop or 0)
    if run:
        yield run


def _unzipped(content: bytes | str, zipped: Zipped | None) -> bytes | str:
    if isinstance(content, str) or zipped is None:
        return content
    try:
        signature, name_length, extra_length = _ZIP_HEADER.unpack_from(content)
        name = content[_ZIP_HEADER.size : _ZIP_HEADER.size + name_length]
        raw = content[_ZIP_HEADER.size + name_length + extra_length :]
        if zipped.method == zipfile.ZIP_STORED:
            found = raw[: zipped.size]
        else:  # no more than the directory says: a few bytes could inflate to gigabytes
            found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, zipped.size or 1)
    except (struct.error, zlib.error) as error:
        return f"is damaged in the zip ({error})"
    if signature != b"PK\x03\x04" or zlib.crc32(found) != zipped.crc32:
        return "is damaged in the zip: its CRC-32 differs from the zip's directory"
    if zlib.crc32(name) != zipped.name_crc32:
        return "is damaged in the zip: its name differs from the zip's directory"
    return found


def _reason(error: Exception) -> str:
    cause = error.__cause__
    if cause is None:
        return f"can't be read ({error})"
    return f"can't be read ({getattr(cause, 'strerror', None) or ' '.join(str(cause).split())})"


def read_origins(allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the origins and folders that a list may name. ConfigError for a relative path."""
    for url in allowed:
        if "://" not in url and not url.startswith("/"):
            rule = "must be a URL or the absolute path of a folder"
            raise ConfigError("--allow-origin", rule, value=url, hint=f"Use https://{url}")
    return tuple(allowed)


def require_allowed(listing: Listing, stores: Sequence[Store], allowed: Sequence[str]) -> None:
    """Raise DataError unless all files of a source are in places that the user has named.

    On this machine, these are the source's folder and the named ones: a list written by somebody
    else must not read private files.

    Args:
        listing: of the source, whose own origin is allowed.
        stores: more folders that files may be in.
        allowed: URLs of other origins, and absolute paths of folders.
    """
    known = {listing.store.origin, *(origin(expand_env(url)) for url in allowed)} - {LOCAL}
    folders = local_folders([listing.store, *stores], allowed)
    known_folders = tuple(f"{store.url}/" for store in stores)
    found: Counter[str] = Counter()
    for entry in listing.entries:
        for _, content in entry.files:
            if isinstance(content, str):
                continue
            if content.file.startswith(known_folders) and ".." not in content.file.split("/"):
                continue
            place = _place(content, listing.store, folders)
            if place and place not in known:
                found[place] += 1
    if not found:
        return
    message = [f"{place} ({count:,})" for place, count in found.most_common(_MAX_PLACES_SHOWN)]
    if len(found) > _MAX_PLACES_SHOWN:
        message.append(f"{len(found) - _MAX_PLACES_SHOWN:,} more")
    place = found.most_common(1)[0][0]
    rule = "names files in places that are not allowed"
    hint = f"Allow what you trust: --allow-origin {place}"
    if not place.startswith("/"):
        hint += "; it gets no credentials"
    raise DataError(listing.store.url, f"{rule}: {', '.join(message)}", hint=hint)


def local_path(file: str, store: Store | None = None) -> str | None:
    """Return the absolute path of a file of this machine; None for any other.

    A path relative to ``store``, the source's folder, is resolved only if ``..`` is in it.
    """
    if "://" in file:
        url = OutsideUrl(file)
        if url.origin != LOCAL:
            return None
        file = "/" + url.on("")
    elif not file.startswith("/"):
        if store is None or not store.is_local or ".." not in file.split("/"):
            return None
        file = f"{store.local_path()}/{file}"
    return os.path.normpath(f"/{file.lstrip('/')}")


def local_folders(stores: Sequence[Store], allowed: Sequence[str]) -> list[str]:
    """Return the folders of this machine that files may be read from."""
    paths = [str(store.local_path()) for store in stores if store.is_local]
    paths += [path for url in allowed if (path := local_path(expand_env(url)))]
    return sorted(
        {normal(path) for path in paths for normal in (os.path.abspath, os.path.realpath)}
    )


def is_within(path: str, folders: Sequence[str]) -> bool:
    """Return whether a path of :func:`local_path` is below one of the folders."""
    return any(path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def _place(span: Span, store: Store, folders: Sequence[str]) -> str:
    """The origin or folder of a file; "" if its folder is allowed."""
    if "://" in span.file:
        url = OutsideUrl(span.file)
        try:
            url.require_plain()
        except ValueError as error:
            raise DataError(f"{store.url}: URL", str(error), value=url.shown) from None
        if url.origin != LOCAL:
            return url.origin
    path = local_path(span.file, store)
    if path is None or is_within(path, folders):
        return ""
    return os.path.dirname(path)


def require_apart(source: Store, dest: Store, source_name: str, dest_name: str) -> None:
    """Raise DataError if one folder is inside the other, or both are one.

    ``source_name`` and ``dest_name`` are the arguments' names for messages.
    """
    places = (
        os.path.realpath(store.local_path()) if store.is_local else store.url
        for store in (dest, source)
    )
    inside, outside = (f"{place.rstrip('/')}/" for place in places)
    if inside.startswith(outside):
        rule, hint = f"is inside {source_name} ({source.url})", "Choose a folder outside of it"
        raise DataError(dest_name, rule, value=dest.url, hint=hint)
    if outside.startswith(inside):
        rule = f"is inside {dest_name} ({dest.url})"
        raise DataError(source_name, rule, value=source.url, hint="Choose another")

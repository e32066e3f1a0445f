"""Where a source that others wrote, such as a list of URLs, may have files read from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from gatdist.common.errors import DataError
from gatdist.config import expand_env
from gatdist.packing.entries import Listing, Span
from gatdist.storage import LOCAL, OutsideUrl, Store, origin

_MOST_SHOWN = 5


def require_allowed(listing: Listing, stores: Sequence[Store], allowed: Sequence[str]) -> None:
    """Raise unless all files of a source are where the user has allowed.

    Those are the origins that the user has named. On this machine, only the folder of the source
    and folders that were named are allowed: a list of others must not read private files.

    Args:
        listing: of the source, whose own origin is among them.
        stores: that files may be in besides.
        allowed: URLs of other origins, and absolute paths of folders.

    Raises:
        DataError: some are not; names those origins or folders, and how many files are there.
    """
    known = {listing.store.origin, *(origin(expand_env(url)) for url in allowed)} - {LOCAL}
    folders = local_folders([listing.store, *stores], allowed)
    ours = tuple(f"{store.url}/" for store in stores)
    found: Counter[str] = Counter()
    for entry in listing.entries:
        for content in (entry.content, *(content for _, content in entry.others)):
            if isinstance(content, str):
                continue
            if content.file.startswith(ours) and ".." not in content.file.split("/"):
                continue
            place = _place(content, listing.store, folders)
            if place and place not in known:
                found[place] += 1
    if not found:
        return
    message = [f"{place} ({count:,})" for place, count in found.most_common(_MOST_SHOWN)]
    if len(found) > _MOST_SHOWN:
        message.append(f"{len(found) - _MOST_SHOWN:,} more")
    place = found.most_common(1)[0][0]
    rule = "names files elsewhere, and a list alone does not decide what is read"
    hint = f"Allow what you trust: --allow-origin {place}"
    if not place.startswith("/"):
        hint += "; it gets no credentials"
    raise DataError(listing.store.url, f"{rule}: {', '.join(message)}", hint=hint)


def local_path(file: str, store: Store | None = None) -> str | None:
    """The absolute path of a file that is named as one of this machine; None of any other.

    Args:
        file: an absolute path or URL; or, with ``..`` in it, a path relative to ``store``.
        store: the folder of the source.
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
    """Folders of this machine that files may be read from: stores, and what the user allows."""
    paths = [str(store.local_path()) for store in stores if store.is_local]
    paths += [path for url in allowed if (path := local_path(expand_env(url)))]
    return sorted(
        {normal(path) for path in paths for normal in (os.path.abspath, os.path.realpath)}
    )


def is_within(path: str, folders: Sequence[str]) -> bool:
    """Whether a path, as :func:`local_path` gives it, is below one of the folders."""
    return any(path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def _place(span: Span, store: Store, folders: Sequence[str]) -> str:
    """Where a file is: an origin, a folder, or "" for the folders that are allowed.

    Raises DataError where its URL asks for more than that.
    """
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

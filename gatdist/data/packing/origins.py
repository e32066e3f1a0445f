"""Which servers a source that others wrote, such as a list of URLs, may have files read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gatdist.config import expand_env
from gatdist.data.packing.entries import Listing, Span
from gatdist.errors import DataError
from gatdist.storage import LOCAL, OutsideUrl, Store, origin

_MOST_SHOWN = 5


def require_allowed(listing: Listing, stores: Sequence[Store], allowed: Sequence[str]) -> None:
    """Raise unless all files of a source are on origins that the user has named.

    Args:
        listing: of the source, whose own origin is among them.
        stores: that files may be in besides.
        allowed: URLs of other origins.

    Raises:
        DataError: some are not; names those origins, and how many files are there.
    """
    known = {listing.store.origin, *(origin(expand_env(url)) for url in allowed)}
    ours = tuple(f"{store.url}/" for store in stores)
    found: Counter[str] = Counter()
    for entry in listing.entries:
        for content in (entry.content, *(content for _, content in entry.others)):
            if isinstance(content, str) or content.file.startswith(ours):
                continue
            place = _origin(content, listing.store)
            if place not in known:
                found[place] += 1
    if not found:
        return
    told = [f"{place} ({count:,})" for place, count in found.most_common(_MOST_SHOWN)]
    if len(found) > _MOST_SHOWN:
        told.append(f"{len(found) - _MOST_SHOWN:,} more")
    others = [place for place, _ in found.most_common() if place != LOCAL]
    rule = "names files elsewhere, and a list alone does not decide where requests go"
    mend = "Pack a copy of the list on this machine"
    if others:
        mend = f"Allow what you trust: --allow-origin {others[0]}; it gets no credentials"
    raise DataError(listing.store.url, f"{rule}: {', '.join(told)}", mend=mend)


def _origin(span: Span, store: Store) -> str:
    """Where a file is. Raises DataError where its URL asks for more than that."""
    if "://" not in span.file:
        return LOCAL if span.file.startswith("/") else store.origin
    url = OutsideUrl(span.file)
    try:
        url.require_plain()
    except ValueError as error:
        raise DataError(f"{store.url}: URL", str(error), value=url.shown) from None
    return url.origin

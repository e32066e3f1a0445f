"""Results that a command writes into a folder: ``result.json``, and pictures of it."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gatdist.common.errors import GatdistError, StorageError

if TYPE_CHECKING:
    from gatdist.storage import Store


def writable(folder: str | None) -> Store | None:
    """The folder of ``--out``, in which a file can be written: found out before any work is done.

    Raises:
        StorageError: none can.
    """
    if folder is None:
        return None
    from gatdist.storage import Store, absolute

    store, name = Store(absolute(folder)), f".{uuid.uuid4().hex}"
    try:
        store.publish(name, b"")
        store.delete_files([name])
    except GatdistError as error:
        raise StorageError("--out", f"can't be written ({error})", value=folder) from None
    return store


def publish(
    found: dict[str, Any], draw: Callable[[Mapping[str, Any]], dict[str, bytes]], out: Store
) -> None:
    """Write what was found, and the pictures where they can be drawn."""
    files = {"result.json": (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()}
    try:
        files |= draw(found)
    except ImportError as error:
        _report(f"no plot ({error}): pip install 'gatdist[bench]', or matplotlib alone")
    for name, content in files.items():
        out.publish(name, content)
        _report(f"wrote {out.url}/{name}")


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

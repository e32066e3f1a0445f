"""The state of a packing, for a rerun.

It is in the destination's folder ``packing/``::

    packing/plan.json           the request, and a fingerprint of the plan; others are refused
    packing/shard-000000.json   the record of a shard, written after it
    packing/spool/              copies of what can't be read in any order, such as compressed tars

A kill at any moment leaves complete files of the plan, or nothing. A start that is refused before
any shard is packed leaves nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from gatdist.common.errors import DataError, GatdistError, UserError
from gatdist.data.format.manifest import MANIFEST
from gatdist.packing.task import NOTES, Request
from gatdist.storage import Store
from gatdist.storage.local import TEMPORARY

PLAN = f"{NOTES}/plan.json"
SPOOL = f"{NOTES}/spool"

_PLAN_VERSION = 1


def noted_plan(request: Request, dest: Store) -> dict[str, Any] | None:
    """Return the plan of an earlier start, None if no shard was packed.

    Raises DataError if it is another packing, or the folder holds something else.
    """
    hint = "Choose another DEST, or delete that folder"
    if not dest.exists(PLAN):
        if names := [name for name in dest.list() if name != NOTES]:
            what = "a data set" if MANIFEST in names else f"other files, such as {names[0]}"
            raise DataError(dest.url, f"holds {what}", hint=hint)
        return None
    try:
        noted: dict[str, Any] = json.loads(dest.read(PLAN))
        theirs = noted["request"]
        noted["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{dest.url}/{PLAN}", "is not the plan of a packing", hint=hint) from None
    if noted["fingerprint"] is None:  # nothing was packed yet
        return None
    requested = _settings(request)
    for key in sorted(requested.keys() | theirs.keys()):
        if requested.get(key) != theirs.get(key):
            rule = f"holds another packing, with {key} {theirs.get(key)}, not {requested.get(key)}"
            raise DataError(dest.url, rule, hint=hint)
    return noted


def note_plan(request: Request, dest: Store, found: str | None) -> None:
    """Write the plan; ``found`` is its fingerprint, None before it is known."""
    plan = {"version": _PLAN_VERSION, "request": _settings(request), "fingerprint": found}
    dest.publish(PLAN, json.dumps(plan, indent=1).encode())


def _settings(request: Request) -> dict[str, Any]:
    return {
        "source": Store(request.source, request.source_options).url,  # without its secrets
        **asdict(request.selection),
        "fields": [list(pair) for pair in request.selection.fields.items()] or None,
        **request.recipe.model_dump(mode="json"),
    }


def remove_temporary(dest: Store, before_s: float) -> None:
    """Remove temporary files that an earlier start left in a folder of this machine."""
    if dest.is_local:
        for path in dest.local_path().rglob(f".*{TEMPORARY}"):
            if path.stat().st_mtime < before_s:
                path.unlink()


@contextmanager
def open_spool(dest: Store, noted: Mapping[str, Any] | None, dry_run: bool) -> Iterator[Store]:
    """Return the folder for copies; that of a dry run is removed afterwards.

    If the block refuses the request, what it has written is removed: all of the packing's state
    but that of an earlier start, whose plan is ``noted``.
    """
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="gatdist-pack-") as folder:
            yield Store(folder)
        return
    written = [name for name in (SPOOL, PLAN) if not (noted and dest.exists(name))]
    folders = [NOTES] if dest.exists() else [NOTES, ""]
    try:
        yield dest.child(SPOOL)
    except UserError:
        with suppress(GatdistError):  # the refusal is what the user must know
            for name in written:
                dest.delete(name)
        for name in folders if dest.is_local else ():
            with suppress(OSError):  # it holds something else
                dest.local_path(name).rmdir()
        raise

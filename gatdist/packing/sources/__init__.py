"""Sources: detect the kind of one, and list its samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from gatdist.common.errors import DataError, StorageError, nearest
from gatdist.packing.entries import MODALITY, Listing, Selection, Skipped, Span, each_readable
from gatdist.packing.fetch import Fetcher
from gatdist.packing.sources.archives import COMPRESSED, tar_files, unpack_tar, zip_files
from gatdist.packing.sources.fields import belonging
from gatdist.packing.sources.files import File, extension_of, plain_path, split, system_file
from gatdist.packing.sources.parquet import list_parquet
from gatdist.packing.sources.tables import list_lines, list_rows, read_table
from gatdist.packing.sources.tree import list_tree
from gatdist.packing.sources.webdataset import list_shards
from gatdist.storage import Store
from gatdist.storage.local import links

__all__ = ["KINDS", "list_source"]

# Extensions of the files of each kind of source.
KINDS: Mapping[str, tuple[str, ...]] = {
    "folder": ("",),
    "zip": (".zip",),
    "tar": (".tar", *COMPRESSED),
    "webdataset": (".tar", *COMPRESSED),
    "parquet": (".parquet", ".pq"),
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "text": (".txt",),
}

# Files next to a sample that indicate WebDataset; others, such as .xmp, do not.
_COMPANIONS = ("cls", "json")


def list_source(
    url: str, selection: Selection, spool: Store, options: Mapping[str, Any] | None = None
) -> tuple[str, str, Listing]:
    """List what the file or folder at ``url`` holds; ``spool`` gets copies of compressed files.

    Returns:
        The source's kind, the URL of the folder that its files are in, and its samples.

    Raises:
        DataError: it holds nothing of a known kind, is damaged, or its labels don't fit.
        StorageError: it does not exist, or can't be read.
    """
    if selection.kind is not None and selection.kind not in KINDS:
        raise DataError(
            "--kind", f"no such kind. {nearest(selection.kind, KINDS)}", value=selection.kind
        )
    folder, files = _located(url, options or {})
    kind = selection.kind or (
        _kind_of_folder(files) if folder == url else _kind_of_file(next(iter(files)))
    )
    store = Store(folder, options)
    names = [name for name in files if _ends(name, KINDS[kind]) and not system_file(name)]
    if not names:
        rule = f"holds no file for --kind {kind}, which ends in {' or '.join(KINDS[kind])}"
        raise DataError(store.url, rule, hint="Check the path and --kind")
    if kind == "folder":
        tree = (File(name, Span(name, size=size)) for name, size in files.items())
        skipped = []
        if store.is_local:
            root = str(store.local_path())
            broken = [link for link in links(root) if not os.path.exists(link)]
            skipped = [(os.path.relpath(link, root), "is a broken link") for link in broken]
        return kind, folder, list_tree(store, tree, selection, _reader(store), skipped)
    if kind == "parquet":
        return kind, folder, list_parquet(store, names, selection, spool)
    if kind == "text":
        return kind, folder, list_lines(store, names)
    if kind in ("csv", "jsonl"):
        if len(names) > 1:
            rule = f"holds {len(names)} lists"
            raise DataError(store.url, rule, hint=f"Name one, such as {names[0]}")
        name = names[0]
        rows = partial(list_rows, store, name, selection=selection)
        return kind, folder, read_table(store, name, rows)
    kind, listing = _list_archives(kind, store, names, selection, spool)
    return kind, folder, listing


def _list_archives(
    kind: str, store: Store, names: list[str], selection: Selection, spool: Store
) -> tuple[str, Listing]:
    skipped: list[Skipped] = []

    def members(name: str) -> list[File]:
        if kind == "zip":
            return list(zip_files(store, name, skipped))
        if not name.lower().endswith(COMPRESSED):
            return list(tar_files(store, name, skipped))
        copy = unpack_tar(store, name, spool, skipped)
        files = tar_files(spool, copy, skipped, f"{store.url}/{name}")
        return [File(file, span._replace(file=f"{spool.url}/{copy}")) for file, span in files]

    archives = each_readable(names, members, skipped)
    if kind == "tar" and selection.kind is None:
        are_shards = any(_is_shard(files, selection.fields) for files in archives.values())
        kind = "webdataset" if are_shards else kind
    if kind == "webdataset":
        shards = {
            name: [File(file.removeprefix("./"), span) for file, span in files]
            for name, files in archives.items()
        }
        listing = Listing(store, [], [], skipped=skipped)
        return kind, list_shards([store, spool], shards, selection, listing)
    tree = (
        File(f"{archive}/{plain_path(name)}" if len(names) > 1 else name, span)
        for archive, files in archives.items()
        for name, span in files
    )
    archive = names[0] if len(names) == 1 else ""
    return kind, list_tree(store, tree, selection, _reader(store, spool), skipped, archive)


def _is_shard(files: Iterable[File], fields: Mapping[str, str]) -> bool:
    if fields:  # the kind follows from what the user has named: extensions, or folders
        found = {split(name)[1] for name, _ in files}
        return all(belonging(where, found) for where in fields.values())
    kinds: dict[str, set[str]] = {}
    for name, _ in files:
        key, component = split(name)
        extension = component.rpartition(".")[2]
        kind = MODALITY.get(extension, extension if extension in _COMPANIONS else "")
        if kind and not system_file(name):
            kinds.setdefault(key, set()).add(kind)
    return any(len(found) > 1 for found in kinds.values())


def _located(url: str, options: Mapping[str, Any]) -> tuple[str, Mapping[str, int | None]]:
    parent, name = _cut(url)
    if name:
        with suppress(StorageError):
            return parent, {name: Store(parent, options).size(name)}
    store = Store(url, options)
    files = store.find()
    if not files:
        rule = "is an empty folder" if store.exists() else "no such file or folder"
        raise StorageError(store.url, rule, hint="Check the path")
    return url, files


def _cut(url: str) -> tuple[str, str]:
    """Folder and name, "" if there is none. An HTTP query goes with the folder."""
    path, mark, query = url.partition("?") if "://" in url else (url, "", "")
    protocol, separator, rest = path.rpartition("://")
    folder, slash, name = rest.rpartition("/")
    return f"{protocol}{separator}{folder or slash}{mark}{query}", name if slash else ""


def _kind_of_file(name: str) -> str:
    for kind, endings in KINDS.items():
        if kind != "folder" and _ends(name, endings):
            return kind
    raise DataError(
        name,
        f"is one file of an unknown kind. Known: {', '.join(KINDS)}",
        hint="Name its folder, or choose one with --kind",
    )


def _kind_of_folder(files: Iterable[str]) -> str:
    """Shards or Parquet files if there are no other samples, else files."""
    visible = [name for name in files if not system_file(name)]
    samples = {MODALITY.get(extension_of(name)) for name in visible} - {None, "array"}
    if not samples:  # arrays may be indexes of shards
        for kind in ("tar", "parquet", "zip"):
            if any(_ends(name, KINDS[kind]) for name in visible):
                return kind
    return "folder"


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings)


def _reader(*stores: Store) -> Callable[[Span], bytes]:
    def read(span: Span) -> bytes:
        with Fetcher(stores) as fetcher:
            (content,) = fetcher.read([span])
        if isinstance(content, str):
            raise DataError(f"{stores[0].url}/{span.file}", content)
        return content

    return read

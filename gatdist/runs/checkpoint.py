"""One checkpoint: a folder of safetensors files, ``state.json`` and ``MANIFEST.json``.

The manifest lists each file's size and SHA-256 and is written last: a folder without a valid
manifest is no checkpoint. Files and content do not depend on the number of workers, which write and
read them together (:mod:`gatdist.runs.sharding`); loading never unpickles.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gatdist.common.errors import CheckpointError, StorageError
from gatdist.common.position import reached
from gatdist.common.strict_json import parse_json
from gatdist.common.tensor_files import read_safetensors
from gatdist.config import PlayerName
from gatdist.runs.sharding import Layout, group_of
from gatdist.storage import Store

MANIFEST = "MANIFEST.json"
FILE = re.compile(r"[\w-]+\.safetensors|state\.json")
# Files that are written at a time to an object store, and their bytes.
_MOST_FILES, _AT_ONCE_BYTES = 16, 2**28
# The group of a checkpoint's tensors with each network for inference.
GROUPS: Mapping[PlayerName, str] = {"generator": "average", "discriminator": "discriminator"}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder's name, ``state.json`` and its tensors, on the CPU.

    A worker that reads only its share of the files has only their tensors.
    """

    name: str
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def named_samples(self) -> int:
        return int(self.name.partition(".")[0])

    def weights(self, player: PlayerName) -> dict[str, Tensor]:
        """Return the weights for inference: the averaged generator's, or the discriminator's."""
        prefix = f"{GROUPS[player]}/"
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the names, dtypes, shapes and bytes of all tensors."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def read_manifest(store: Store) -> dict[str, Any]:
    """Read a checkpoint's manifest; raise CheckpointError if it is missing or damaged."""
    try:
        content = store.read(MANIFEST)
    except StorageError as error:
        raise CheckpointError(store.url, f"has no readable {MANIFEST} ({error})") from None
    return parse_manifest(content, f"{store.url}/{MANIFEST}")


def parse_manifest(content: bytes, subject: str) -> dict[str, Any]:
    """Return the values of a manifest; raise CheckpointError if it is damaged."""
    try:
        manifest: dict[str, Any] = parse_json(content)
        for entry in manifest["files"].values():
            if type(entry["size"]) is not int or type(entry["sha256"]) is not str:
                raise TypeError("files need an integer size and a text sha256")
            if entry["size"] < 0:
                raise ValueError("a size is negative")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(subject, f"is damaged ({error!r})") from None
    if "state.json" not in manifest["files"]:
        raise CheckpointError(subject, "lists no state.json")
    for name in manifest["files"]:
        if not FILE.fullmatch(name):  # it could lead out of the folder
            raise CheckpointError(subject, "lists a file that is not of a checkpoint", value=name)
    return manifest


def read_checkpoint(store: Store, groups: Collection[str] = ()) -> Checkpoint:
    """Read and verify a checkpoint, or only some groups of its tensors, such as "average".

    Raises CheckpointError if a file is missing or damaged.
    """
    entries = read_manifest(store)["files"]
    wanted = {"", *groups}  # "": the state
    mine = [file for file in entries if not groups or group_of(file) in wanted]
    return read_share(store, entries, mine)


def read_share(
    store: Store, entries: Mapping[str, Mapping[str, Any]], mine: Collection[str]
) -> Checkpoint:
    """Read and verify some files of a checkpoint; without ``state.json``, its state is empty.

    Args:
        store: the checkpoint's folder.
        entries: the sizes and digests of all files, from its manifest.
        mine: the files to read.

    Raises:
        CheckpointError: a file that was to be read is missing or damaged.
    """
    files = {file: entries[file] for file in mine}
    try:
        sizes = store.find() if files else {}
        for file, entry in files.items():  # first, so that no oversized file is read
            size = sizes.get(file)  # a web server may list none
            size = store.size(file) if size is None else size
            if size != entry["size"]:
                rule = f"is damaged: expected {entry['size']} bytes, found {size}"
                raise CheckpointError(f"{store.url}/{file}", rule)
        contents = store.read_files({file: entry["size"] for file, entry in files.items()})
    except StorageError as error:
        rule = f"has files in its {MANIFEST} that can't be read ({error})"
        raise CheckpointError(store.url, rule) from None
    for file, entry in files.items():
        found = _entry(contents[file])
        if found != entry:
            rule = f"is damaged: expected SHA-256 {entry['sha256']}, found {found['sha256']}"
            raise CheckpointError(f"{store.url}/{file}", rule)
    tensors: dict[str, Tensor] = {}
    try:
        for file, content in contents.items():
            if group := group_of(file):
                for key, tensor in read_safetensors(content).items():
                    if tensors.setdefault(f"{group}/{key}", tensor) is not tensor:
                        raise ValueError(f"tensor {group}/{key} is in two files")
        state = dict(parse_json(contents.get("state.json", b"{}")))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(store.url, f"is not a checkpoint ({error!r})") from None
    name = store.url.rstrip("/").rsplit("/", 1)[-1]
    return Checkpoint(name, state, tensors)


def write_files(
    store: Store, tensors: Mapping[str, Tensor], files: Layout
) -> dict[str, dict[str, Any]]:
    """Write files with tensors into a checkpoint's folder; return their entries for its manifest.

    No other worker writes these files.
    """

    def publish(file: str) -> tuple[str, dict[str, Any]]:
        named = {name.partition("/")[2]: tensors[name].contiguous() for name in files[file]}
        return file, _publish(store, file, safetensors.torch.save(named))

    largest = max((sum(tensors[n].nbytes for n in names) for names in files.values()), default=0)
    # Requests take a while each; what is serialized is a second copy.
    at_once = 1 if store.is_local else max(1, min(_MOST_FILES, _AT_ONCE_BYTES // (largest + 1)))
    with ThreadPoolExecutor(at_once) as pool:
        return dict(pool.map(publish, sorted(files)))


def write_manifest(
    store: Store,
    entries: Mapping[str, Any],
    state: Mapping[str, Any],
    about: Mapping[str, Any],
    may_commit: Callable[[], None],
) -> dict[str, Any]:
    """Complete a checkpoint whose files with tensors are written; return its manifest.

    Args:
        store: the checkpoint's folder.
        entries: of its files with tensors, as :func:`write_files` returns them.
        state: for ``state.json``.
        about: further values for the manifest.
        may_commit: called just before that is written; may raise.
    """
    files = {file: entries[file] for file in sorted(entries)}
    files["state.json"] = _publish(store, "state.json", json.dumps(state, indent=1).encode())
    may_commit()
    manifest = {"version": 1, **about, "files": files}
    _publish(store, MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def require_same_order(saved: Mapping[str, Any], now: Mapping[str, Any], url: str) -> None:
    """Raise CheckpointError unless a checkpoint's data and sample order are the run's."""
    if not saved["fingerprint"]:
        hint = "Train in another --run-dir, with model.init_from set to this one"
        raise CheckpointError(url, "holds imported weights, and no run to resume", hint=hint)
    for key in sorted(saved.keys() | now.keys(), key=lambda key: (key != "fingerprint", key)):
        if saved.get(key) != now.get(key):
            is_data = key.endswith("fingerprint")
            what = "another data set" if is_data else "another order of samples"
            raise CheckpointError(
                f"{url}: {key}",
                f"the checkpoint was made with {what} ({saved.get(key)!r})",
                value=now.get(key),
                hint="Restore the data or the setting, or choose another --run-dir to start afresh",
            )


def _publish(store: Store, file: str, content: bytes) -> dict[str, Any]:
    reached(f"commit/{file}")
    store.publish(file, content)
    return _entry(content)


def _entry(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

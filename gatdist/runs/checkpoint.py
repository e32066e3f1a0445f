"""Checkpoints: committed whole or not at all, checked by digest, written in the background.

A checkpoint is a folder named by its clock: safetensors files, ``state.json``, and
``MANIFEST.json`` with each file's size and SHA-256, written last. A folder without a valid manifest
does not exist. Nothing in it depends on the number of workers, and loading never unpickles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gatdist.errors import CheckpointError, StorageError
from gatdist.storage import Store

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose every byte was verified.

    Attributes:
        name: its folder, the clock in nine digits.
        state: the content of ``state.json``.
        tensors: all trained tensors, on the CPU.
    """

    name: str
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    def digest(self) -> str:
        """SHA-256 (hex) over the names, dtypes, shapes and bytes of all trained state, by name."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def read_checkpoint(store: Store) -> Checkpoint:
    """Read and verify the checkpoint in the folder ``store``.

    Raises:
        CheckpointError: no manifest, or a file that is missing or differs from it.
    """
    name = store.url.rstrip("/").rsplit("/", 1)[-1]
    try:
        manifest = json.loads(store.read(MANIFEST))
        listed = {
            file: (entry["size"], entry["sha256"]) for file, entry in manifest["files"].items()
        }
    except StorageError as error:
        raise CheckpointError(store.url, f"has no readable {MANIFEST} ({error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{store.url}/{MANIFEST}", f"is damaged ({error!r})") from None
    contents: dict[str, bytes] = {}
    for file, (size, sha256) in listed.items():
        try:
            contents[file] = store.read(file)
        except StorageError as error:
            raise CheckpointError(
                f"{store.url}/{file}", f"is listed in {MANIFEST} but can't be read ({error})"
            ) from None
        found = hashlib.sha256(contents[file]).hexdigest()
        if len(contents[file]) != size or found != sha256:
            raise CheckpointError(
                f"{store.url}/{file}",
                f"is damaged: expected {size} bytes with SHA-256 {sha256}, "
                f"found {len(contents[file])} with {found}",
            )
    tensors = {
        f"{file.removesuffix('.safetensors')}/{key}": tensor
        for file, content in contents.items()
        if file.endswith(".safetensors")
        for key, tensor in safetensors.torch.load(content).items()
    }
    return Checkpoint(name, json.loads(contents["state.json"]), tensors)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        store: the folder ``checkpoints`` of the run directory.
        keep: how many of the newest to keep.
        may_commit: called just before each commit; raises if another attempt has taken the run
            over.
        on_damaged: called with a message for each damaged checkpoint that is passed over.
    """

    def __init__(
        self,
        store: Store,
        keep: int = 1,
        may_commit: Callable[[], None] = lambda: None,
        on_damaged: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.store = store
        self._keep = keep
        self._may_commit = may_commit
        self._on_damaged = on_damaged
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def committed(self) -> list[str]:
        """Names of the folders that hold a manifest, oldest first."""
        names = [name for name in self.store.list() if name.isdigit()]
        return [name for name in names if self.store.exists(f"{name}/{MANIFEST}")]

    def read(self, name: str) -> Checkpoint:
        """See :func:`read_checkpoint`."""
        return read_checkpoint(self.store.child(name))

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None; damaged ones are told and passed over.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged: starting afresh would bury
                them.
        """
        names = self.committed()
        for name in reversed(names):
            try:
                return self.read(name)
            except CheckpointError as error:
                self._on_damaged(str(error))
        if names:
            raise CheckpointError(
                self.store.url,
                f"all {len(names)} checkpoints are damaged",
                mend="Restore one from a copy, or choose another --run-dir to start afresh",
            )
        return None

    def save(self, samples_seen: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Snapshot the tensors once the last commit has ended, and commit in the background.

        Raises:
            GatdistError: what went wrong in the background since the last call.
        """
        self.wait()
        snapshot = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        self._writer = self._writer or ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._writer.submit(self._commit, f"{samples_seen:09d}", snapshot, state)

    def wait(self) -> None:
        """Return when nothing is being written. Raises what went wrong in the background."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and end the background thread."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def _commit(self, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._may_commit()
        folder = self.store.child(name)
        folder.delete(MANIFEST)  # a folder that is about to change must not look whole
        files: dict[str, dict[str, Any]] = {}
        for file, content in _files(tensors, state):
            folder.publish(file, content)
            files[file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self._may_commit()
        folder.publish(MANIFEST, json.dumps({"version": 1, "files": files}, indent=1).encode())
        self._retire()

    def _retire(self) -> None:
        """Delete all but the newest ``keep``, and what never got a manifest."""
        kept = self.committed()[-self._keep :]
        for name in self.store.list():
            if name.isdigit() and name not in kept:
                # The manifest goes first: a half-deleted checkpoint must not look whole.
                self.store.delete(f"{name}/{MANIFEST}")
                self.store.delete(name)


def _files(tensors: dict[str, Tensor], state: dict[str, Any]) -> list[tuple[str, bytes]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = tensor
    files = [
        (f"{group}.safetensors", safetensors.torch.save(content))
        for group, content in sorted(groups.items())
    ]
    return [*files, ("state.json", json.dumps(state, indent=1).encode())]

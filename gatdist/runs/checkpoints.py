"""The checkpoints of a run: written in the background, fenced, and deleted by age and metric.

Each commit writes into its own folder, such as ``000000640.2-9f3ac21b0004``: ``samples_seen``, the
attempt, and an id of eight random digits and four that count the attempt's commits. That is safe
with overlapping attempts, and with requests that arrive late or twice:

* A folder belongs to one commit, and each of its files has one writer, so that late requests change
  no other commit.
* The manifest is written last. If it arrives after its files were deleted, the folder lacks files
  that it lists, and never counts as a checkpoint to keep.
* An attempt deletes only folders of its own and of earlier attempts, which are stale, and only
  those older than a checkpoint that it has just committed.
* It deletes exactly the files that a folder's manifest lists or, without a manifest, those with
  names of a checkpoint's files.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from gatdist.common.background import Background
from gatdist.common.errors import (
    CheckpointError,
    StaleAttemptError,
    StorageError,
    StorageUnavailableError,
)
from gatdist.common.position import reached
from gatdist.config import RunConfig
from gatdist.runs.checkpoint import (
    FILE,
    MANIFEST,
    Checkpoint,
    parse_manifest,
    read_checkpoint,
    read_manifest,
    write_files,
    write_manifest,
)
from gatdist.runs.sharding import Layout, layout
from gatdist.storage import Store
from gatdist.storage.local import unfinished

_NAME = re.compile(r"(\d{9,18})(?:\.(\d{1,18})(?:-([0-9a-f]{12}))?)?", re.ASCII)
# Tries to find the newest checkpoint while another attempt deletes.
_LOOKS = 5
# Time after the start of a commit for which the next one waits for it.
_PATIENCE_S = 5.0
_SHOWN = 5  # names in a message
_MANIFEST_BYTES = 2**20


@dataclass(frozen=True, order=True)
class Name:
    """The parsed name of a checkpoint's folder (see the module); ordered by age."""

    samples_seen: int
    attempt: int = 0
    id: str = ""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = _NAME.fullmatch(text)
        return cls(int(match[1]), int(match[2] or 0), match[3] or "") if match else None

    def __str__(self) -> str:
        attempt = f".{self.attempt}" if self.attempt or self.id else ""
        return f"{self.samples_seen:09d}{attempt}" + (f"-{self.id}" if self.id else "")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept."""

    newest: int = 1
    best: int = 0  # those with the lowest or highest ``metric``
    metric: str = "fid"
    every_samples: int = 0  # the first at or after each multiple; 0: none
    higher_is_better: bool = False

    @classmethod
    def from_config(cls, run: RunConfig, *, higher_is_better: bool = False) -> Self:
        return cls(
            newest=run.keep_checkpoints,
            best=run.keep_best_checkpoints,
            metric=run.best_metric,
            higher_is_better=higher_is_better,
            every_samples=run.keep_every_samples,
        )

    def kept(self, metrics: Mapping[Name, Mapping[str, float]]) -> set[Name]:
        names = sorted(metrics)
        kept = set(names[-self.newest :])
        measured = [name for name in names if self.metric in metrics[name]]
        sign = -1 if self.higher_is_better else 1
        measured.sort(key=lambda name: sign * metrics[name][self.metric])
        kept.update(measured[: self.best])
        if self.every_samples:
            first: dict[int, Name] = {}
            for name in names:
                first.setdefault(name.samples_seen // self.every_samples, name)
            kept.update(name for interval, name in first.items() if interval)
        return kept


class Snapshots:
    """Copies of tensors on the CPU, of which the last one is valid.

    Tensors on a GPU are copied one after another into page-locked memory, which is allocated once
    and takes as much as one checkpoint; the GPU holds no second copy.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy all tensors, and wait for the copies."""
        found = {name: self._copy(name, tensor.detach()) for name, tensor in tensors.items()}
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.accelerator.synchronize(device)
        return found

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True).contiguous()
        kept = self._pinned.get(name)
        # Of the same memory layout: another would take a copy on the GPU.
        like = tensor.shape, tensor.dtype, tensor.stride()
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != like:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._pinned[name] = kept
        return kept.copy_(tensor, non_blocking=True)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        store: the folder ``checkpoints`` of the run directory.
        may_commit: called before each commit; raises if another attempt has taken the run over.
        on_damaged: called with a message for each damaged checkpoint; None: ``on_warning``.
        on_commit: called in the background after each commit.
        on_warning: called with a message, in the background and once, if deleting old checkpoints
            or ``on_commit`` fails. Both are retried after the next commit.
        measured: (samples_seen, attempt) → metrics measured after the checkpoint was written.
    """

    def __init__(
        self,
        store: Store,
        retention: Retention | None = None,
        may_commit: Callable[[], None] = lambda: None,
        on_damaged: Callable[[str], None] | None = None,
        background: Background | None = None,
        on_commit: Callable[[], None] = lambda: None,
        on_warning: Callable[[str], None] = lambda message: None,
        measured: Callable[[int, int], Mapping[str, Any]] = lambda samples_seen, attempt: {},
    ) -> None:
        self.store = store
        self._retention = retention or Retention()
        self._may_commit, self._measured = may_commit, measured
        self._on_commit, self._on_warning = on_commit, on_warning
        self._on_damaged = on_damaged or (lambda text: on_warning(f"{text}; using the one before"))
        self._id, self._num_commits = secrets.token_hex(4), 0
        self._manifests: dict[Name, Mapping[str, Any]] = {}
        self._listed: dict[Name, Mapping[str, int | None]] | None = None
        self._damaged: set[Name] = set()
        self._warned = False
        self._background = background or Background("checkpoint")
        self._snapshots = Snapshots()
        self._pending: Future[None] | None = None
        self._began = 0.0

    def committed(self) -> list[str]:
        """Return the names of the folders with a manifest, oldest first."""
        return [str(name) for name in self._committed()]

    def has_any(self) -> bool:
        """Return whether there is a folder with a manifest."""
        return any(self.store.exists(f"{name}/{MANIFEST}") for name in reversed(self._names()))

    def _committed(self) -> list[Name]:
        return sorted(name for name, files in self._folders().items() if MANIFEST in files)

    def _folders(self) -> dict[Name, dict[str, int | None]]:
        found: dict[Name, dict[str, int | None]] = {}
        for path, size in self.store.find(with_unfinished=True).items():
            folder, _, file = path.partition("/")
            name = Name.parse(folder)
            if name and file:
                found.setdefault(name, {})[file] = size
        return found

    def read(self, name: str, groups: Collection[str] = ()) -> Checkpoint:
        """Read a checkpoint by its name; see :func:`~gatdist.runs.checkpoint.read_checkpoint`."""
        return read_checkpoint(self.store.child(name), groups)

    def find(self, name: str = "", groups: Collection[str] = ()) -> Checkpoint | None:
        """Return a checkpoint by its name or ``samples_seen``; "" is the newest undamaged one.

        ``groups`` are as for :meth:`read`. Returns None without any checkpoint. Raises
        CheckpointError if there is no such one.
        """
        read = partial(self.read, groups=groups)
        if not name:
            return self.newest(read)
        known = self._committed()
        if not known:
            return None
        found = [each for each in known if name in (str(each), str(each.samples_seen))]
        if not found:
            last = ", ".join(f"{each.samples_seen}" for each in known[-_SHOWN:])
            hint = f"The run has {last}"
            raise CheckpointError("--checkpoint", "no such checkpoint", value=name, hint=hint)
        return read(str(found[-1]))

    def newest(self, read: Callable[[str], Checkpoint] | None = None) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, None without any; raise if all are damaged.

        ``read`` reads one by its name, as :meth:`read` does.
        """
        read = read or self.read
        names, damaged = self._names(), 0
        for _ in range(_LOOKS):
            damaged = 0
            for name in reversed(names):
                try:
                    return read(str(name))
                except CheckpointError as error:
                    if self.store.exists(f"{name}/{MANIFEST}"):
                        damaged += 1
                        self._damaged.add(name)
                        self._on_damaged(str(error))
                    elif self._names() != names:
                        break
            # An ending attempt may have committed another, and deleted these.
            before, names = names, self._names()
            if names == before:
                break
        if damaged:
            hint = "Restore one from a copy, or choose another --run-dir to start afresh"
            rule = f"all {damaged} checkpoints are damaged"
            raise CheckpointError(self.store.url, rule, hint=hint)
        return None

    def _names(self) -> list[Name]:
        """Return the folders of checkpoints, oldest first, perhaps incomplete; lists no files."""
        return sorted(filter(None, map(Name.parse, self.store.list())))

    def save(
        self,
        samples_seen: int,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        *,
        attempt: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> Future[None]:
        """Snapshot the tensors once the last commit has ended, and commit in the background.

        The future is done once the checkpoint is complete. Raises the error of the last commit.
        """
        name = self.next_name(samples_seen, attempt)
        files = layout({name: tensor.nbytes for name, tensor in tensors.items()})
        work, entries = self._writing(name, tensors, files)
        commit = partial(self._commit, name, entries, state, dict(metrics or {}))
        self._pending = self._background.submit(lambda: (work(), commit()))
        return self._pending

    def next_name(self, samples_seen: int, attempt: int) -> str:
        """Return the name of the next checkpoint."""
        self._num_commits += 1
        return str(Name(samples_seen, attempt, f"{self._id}{self._num_commits:04x}"[:12]))

    def write(self, name: str, tensors: Mapping[str, Tensor], files: Layout) -> dict[str, Any]:
        """Snapshot what files hold once the last commit has ended, and write in the background.

        Several workers may write files of one checkpoint. Raises the error of the last commit.

        Returns:
            The files' entries for the manifest, once they are written.
        """
        work, entries = self._writing(name, tensors, files)
        self._pending = self._background.submit(work)
        return entries

    def commit(self, name: str, entries: Mapping[str, Any], state: dict[str, Any]) -> Future[None]:
        """Complete a checkpoint in the background, after what this worker writes of it.

        ``entries`` are those of all its files with tensors, which other workers have written by
        now. The future is done once the checkpoint is complete.
        """
        self._pending = self._background.submit(partial(self._commit, name, entries, state, {}))
        return self._pending

    def require_room(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise StorageError unless the kept checkpoints, and one being written, fit."""
        free = self.store.free_bytes()
        if free is None:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        missing = max(1, self._retention.newest + 1 - len(self._committed()))
        if free < missing * size:
            mega, needed = free / 1e6, missing * size / 1e6
            rule = f"has {mega:,.1f} MB free, and {missing} more checkpoints take {needed:,.1f} MB"
            hint = "Make room, keep fewer (run.keep_checkpoints), or choose another --run-dir"
            raise StorageError(self.store.url, rule, hint=hint)

    def is_free(self) -> bool:
        """Return whether the last commit has ended, waiting up to 5 s from its start."""
        return self.is_written(max(0.0, self._began + _PATIENCE_S - time.monotonic()))

    def is_written(self, timeout_s: float) -> bool:
        """Return whether no checkpoint is being written, waiting up to ``timeout_s``."""
        return self._pending is None or bool(wait([self._pending], timeout_s).done)

    def wait(self) -> None:
        """Wait until no checkpoint is being written. Raises the error of the commit."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        self._background.close()

    def _writing(
        self, name: str, tensors: Mapping[str, Tensor], files: Layout
    ) -> tuple[Callable[[], None], dict[str, Any]]:
        """Snapshot what files hold; return what writes them, and then their entries."""
        self.wait()
        held = {name: tensors[name] for names in files.values() for name in names}
        snapshot, entries = self._snapshots.take(held), dict[str, Any]()
        self._began = time.monotonic()

        def write() -> None:
            self._may_commit()
            entries.update(write_files(self.store.child(name), snapshot, files))

        return partial(self._fenced, write), entries

    def _fenced(self, work: Callable[[], object]) -> None:
        try:
            work()
        except StorageError:
            self._may_commit()  # a stale attempt's files are deleted while it writes
            raise

    def _commit(
        self,
        folder: str,
        entries: Mapping[str, Any],
        state: dict[str, Any],
        metrics: dict[str, float],
    ) -> None:
        name = Name.parse(folder)
        assert name
        about = {"samples_seen": name.samples_seen, "attempt": name.attempt, "metrics": metrics}
        store, manifest = self.store.child(folder), dict[str, Any]()

        def work() -> None:
            manifest.update(write_manifest(store, entries, state, about, self._may_commit))

        self._fenced(work)
        try:
            self._may_commit()
        except StaleAttemptError:
            # The newer attempt may have deleted files of this one before its manifest.
            files = self._folders().get(name, {})
            if not self._is_complete(name, files):
                self._delete(name, files)
            raise
        reached("commit/retire")
        try:
            self._on_commit()
            self._manifests[name] = manifest
            self._retire(name)
        except (StorageError, StorageUnavailableError) as error:
            if not self._warned:
                again = "Training continues; this is retried after each checkpoint"
                self._on_warning(f"cleaning up after a checkpoint failed: {error}. {again}")
            self._warned = True
        else:
            self._warned = False

    def _retire(self, last: Name) -> None:
        """Delete checkpoints not to keep, and incomplete ones, if older than ``last``."""
        folders = self._all_folders(last)
        self._read_manifests(folders)
        complete = {name for name, files in folders.items() if self._is_complete(name, files)}
        kept = self._retention.kept({name: self._metrics_of(name) for name in complete})
        self._listed = dict(folders)
        for name, files in folders.items():
            if name < last and name not in kept and self._may_delete(name, last.attempt):
                self._delete(name, files)
                del self._listed[name]

    def _all_folders(self, last: Name) -> dict[Name, Mapping[str, int | None]]:
        """Return all folders with the sizes of their files, after a commit to ``last``.

        An object store lists a thousand names at a time. Files are listed once, and later those of
        folders that this attempt does not know: an earlier one was late.
        """
        if self.store.is_local or self._listed is None:
            return dict(self._folders())
        files = self._manifests[last]["files"]
        written = {file: int(entry["size"]) for file, entry in files.items()}
        known = self._listed | {last: written | {MANIFEST: None}}

        def files_of(name: Name) -> Mapping[str, int | None]:
            return self.store.child(str(name)).find(with_unfinished=True)

        return {name: known.get(name) or files_of(name) for name in self._names()}

    def _read_manifests(self, folders: Mapping[Name, Mapping[str, int | None]]) -> None:
        """Read those that are not known, with concurrent requests."""
        sizes = {
            f"{name}/{MANIFEST}": size
            for name, files in folders.items()
            if (size := files.get(MANIFEST)) and size <= _MANIFEST_BYTES
            if name not in self._manifests
        }
        if self.store.is_local or len(sizes) < 2:
            return
        with suppress(StorageError):  # else they are read one by one
            for path, content in self.store.read_files(sizes).items():
                name = Name.parse(path.partition("/")[0])
                assert name
                with suppress(CheckpointError):
                    self._manifests[name] = parse_manifest(content, f"{self.store.url}/{path}")

    def _may_delete(self, name: Name, attempt: int) -> bool:
        mine = name.id[: len(self._id)] in ("", self._id)
        return name.attempt < attempt or (name.attempt == attempt and mine)

    def _is_complete(self, name: Name, files: Mapping[str, int | None]) -> bool:
        """Return whether a folder has all files that its manifest lists, by their sizes."""
        if MANIFEST not in files or name in self._damaged:
            return False
        listed = self._manifest_of(name).get("files", {})
        return bool(listed) and all(
            files.get(file, -1) in (entry["size"], None) for file, entry in listed.items()
        )

    def _delete(self, name: Name, files: Mapping[str, int | None]) -> None:
        listed: Mapping[str, Any] = {}
        if MANIFEST in files:
            # The manifest first: a partly deleted folder is no checkpoint.
            listed = self._manifest_of(name).get("files", {})
            self.store.delete_files([f"{name}/{MANIFEST}"])
        is_checkpoint_file = listed.__contains__ if listed else FILE.fullmatch
        gone = [file for file in files if is_checkpoint_file(unfinished(file) or file)]
        self.store.delete_files([f"{name}/{file}" for file in gone])
        self._manifests.pop(name, None)

    def _manifest_of(self, name: Name) -> Mapping[str, Any]:
        if name not in self._manifests:
            try:
                self._manifests[name] = read_manifest(self.store.child(str(name)))
            except CheckpointError:
                return {}
        return self._manifests[name]

    def _metrics_of(self, name: Name) -> Mapping[str, float]:
        """Return its finite metrics, from its manifest or measured later."""
        manifest = self._manifest_of(name)
        attempt = manifest.get("attempt", name.attempt)
        found = manifest.get("metrics") or self._measured(name.samples_seen, attempt)
        values = found.items() if isinstance(found, Mapping) else ()
        return {
            key: value
            for key, value in values
            if isinstance(value, int | float) and math.isfinite(value)
        }

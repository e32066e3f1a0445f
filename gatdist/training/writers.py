"""Sharded checkpoints: the workers write and read them together, each some of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from gatdist.common.errors import GatdistError
from gatdist.parallel.communicator import Communicator
from gatdist.runs import Checkpoint, Checkpoints, Layout, group_of, is_sharded, shares
from gatdist.runs.checkpoint import read_manifest, read_share

Commit = Callable[[Mapping[str, Any]], object]


class Writers:
    """Writes checkpoints with all workers.

    A small one is worker 0's alone. Of others, each worker writes some files in the background;
    after a later step, when all have, worker 0 completes it.

    Args:
        checkpoints: of the run.
        comm: the workers.
    """

    def __init__(self, checkpoints: Checkpoints, comm: Communicator) -> None:
        self._checkpoints, self._comm = checkpoints, comm
        # Set on all workers or none: entries of this worker's files, and what follows.
        self._part: tuple[dict[str, Any], Commit | None] | None = None

    def save(
        self, name: str, tensors: Mapping[str, Tensor], files: list[Layout], commit: Commit | None
    ) -> None:
        """Write this worker's files in the background, and let worker 0 complete the checkpoint.

        Args:
            name: of the checkpoint.
            tensors: of the state.
            files: of each worker, by rank.
            commit: given on worker 0; called with the entries of all files once all workers have
                written theirs or, if all are worker 0's, at once.
        """
        entries = self._checkpoints.write(name, tensors, files[self._comm.rank])
        if is_sharded(files):
            self._part = entries, commit
        elif commit:
            commit(entries)

    @property
    def is_writing(self) -> bool:
        """Whether this worker is still writing its files of a checkpoint."""
        return self._part is not None and not self._checkpoints.is_written(0.0)

    def complete(self, *, any_writes: bool) -> None:
        """Complete a checkpoint unless a worker is still writing its files; collective.

        Raises:
            StorageError: files of one of the workers could not be written.
        """
        if self._part is None or any_writes:
            return
        mine, commit = self._part

        def written() -> dict[str, Any]:
            self._checkpoints.wait()
            return mine

        entries: dict[str, Any] = {}
        for theirs in self._comm.of_each(written):
            entries |= theirs
        self._part = None  # now, since a worker may have been lost meanwhile
        if commit:
            commit(entries)

    def is_free(self) -> bool:
        """Return whether the last commit has ended, up to 5 s after its start; collective."""
        is_free = self._checkpoints.is_free()
        if self._part is not None:
            is_free = not self._comm.any(not is_free)
            self.complete(any_writes=not is_free)
        return is_free

    def wait_for_all(self, timeout_s: float, meanwhile: Callable[[], object]) -> None:
        """Wait until all workers have written their files, and complete the checkpoint; collective.

        ``meanwhile`` is called every ``timeout_s``.
        """
        while self._part is not None:
            is_written = self._checkpoints.is_written(timeout_s)
            self.complete(any_writes=self._comm.any(not is_written))
            meanwhile()

    def abandon(self) -> bool:
        """Leave a checkpoint incomplete whose files not all workers may have written.

        Returns whether there was one.
        """
        was_written, self._part = self._part is not None, None
        return was_written


def read_newest(
    checkpoints: Checkpoints, comm: Communicator, judge: Callable[[Checkpoint | None], Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Read the newest checkpoint that is undamaged wherever it is read; collective.

    Args:
        checkpoints: of the run.
        comm: the workers.
        judge: called on worker 0 with the checkpoint, or None without any; returns JSON values.

    Returns:
        What ``judge`` has returned, and the tensors that this worker has read.

    Raises:
        CheckpointError: all are damaged.
    """
    tensors: dict[str, Tensor] = {}

    def share(name: str, entries: dict[str, Any]) -> Checkpoint:
        sizes = {file: entry["size"] for file, entry in entries.items() if group_of(file)}
        mine = shares(sizes, comm.world_size)[comm.rank] + ["state.json"] * comm.is_main
        found: list[Checkpoint] = []
        tensors.clear()
        # What one can't read is damaged for all.
        comm.of_each(lambda: found.append(read_share(checkpoints.store.child(name), entries, mine)))
        tensors.update(found[0].tensors)
        return found[0]

    def read(name: str) -> Checkpoint:
        entries = read_manifest(checkpoints.store.child(name))["files"]
        comm.broadcast_object([name, entries])
        return share(name, entries)

    def lead() -> Any:
        try:
            newest = checkpoints.newest(read)
        finally:
            comm.broadcast_object(None)
        return judge(newest)

    if not comm.is_main:
        while request := comm.broadcast_object(None):
            with suppress(GatdistError):  # worker 0 raises it, or tries another
                share(*request)
    return comm.of_main(lead), tensors

"""The checkpoints of a run: written in the background, fenced, and kept as long as is asked.

A folder is named by its clock in nine digits. Where that name is taken, by a checkpoint that turned
out damaged or by what a killed attempt left, the number of the attempt is added (``000000640.2``),
so that no attempt ever writes into a folder of another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from gatdist.background import Background
from gatdist.config import RunConfig
from gatdist.errors import CheckpointError, StaleAttemptError, StorageError
from gatdist.faults import reached
from gatdist.runs.checkpoint import (
    MANIFEST,
    Checkpoint,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)
from gatdist.storage import Store

# A commit that takes no longer is waited for, where the next one is due.
_PATIENCE_S = 5.0


@dataclass(frozen=True, order=True)
class Name:
    """What the name of a checkpoint's folder says; ordered by age.

    Attributes:
        samples_seen: the clock.
        attempt: that wrote it; 0 where the name does not say.
    """

    samples_seen: int
    attempt: int = 0

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The name, or None if ``text`` is none."""
        clock, dot, attempt = text.partition(".")
        if not clock.isdecimal() or bool(dot) != attempt.isdecimal():
            return None
        return cls(int(clock), int(attempt or 0))

    def __str__(self) -> str:
        return f"{self.samples_seen:09d}" + (f".{self.attempt}" if self.attempt else "")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept.

    Attributes:
        newest: so many of the newest (≥ 1).
        best: so many of those with the lowest ``metric``, measured at their clock.
        metric: lower is better.
        every_samples: the first at or after each multiple of so many samples; 0 for none.
    """

    newest: int = 1
    best: int = 0
    metric: str = "fid"
    every_samples: int = 0

    @classmethod
    def from_config(cls, run: RunConfig) -> Self:
        """What ``run`` asks for."""
        return cls(
            newest=run.keep_checkpoints,
            best=run.keep_best_checkpoints,
            metric=run.best_metric,
            every_samples=run.keep_every_samples,
        )

    def kept(self, metrics: Mapping[Name, Mapping[str, float]]) -> set[Name]:
        """Those to keep of checkpoints whose metrics are known, by name."""
        names = sorted(metrics)
        kept = set(names[-self.newest :])
        measured = [name for name in names if self.metric in metrics[name]]
        kept.update(sorted(measured, key=lambda name: metrics[name][self.metric])[: self.best])
        if self.every_samples:
            first: dict[int, Name] = {}
            for name in names:
                first.setdefault(name.samples_seen // self.every_samples, name)
            kept.update(name for interval, name in first.items() if interval)
        return kept


class Checkpoints:
    """The checkpoints of one run.

    Args:
        store: the folder ``checkpoints`` of the run directory.
        retention: which are kept.
        may_commit: called just before each commit; raises if another attempt has taken the run
            over.
        on_damaged: called with a message for each damaged checkpoint that is passed over.
        background: writes; None makes one.
        measured: metrics of a checkpoint, measured after it was written, by its samples seen and
            attempt.
    """

    def __init__(
        self,
        store: Store,
        retention: Retention | None = None,
        may_commit: Callable[[], None] = lambda: None,
        on_damaged: Callable[[str], None] = lambda message: None,
        background: Background | None = None,
        measured: Callable[[int, int], Mapping[str, Any]] = lambda samples_seen, attempt: {},
    ) -> None:
        self.store = store
        self._retention = retention or Retention()
        self._may_commit = may_commit
        self._on_damaged = on_damaged
        self._measured = measured
        self._metrics: dict[Name, Mapping[str, float]] = {}
        self._damaged: set[Name] = set()
        self._mine: set[Name] = set()
        self._background = background or Background("checkpoint")
        self._pending: Future[None] | None = None
        self._began = 0.0

    def committed(self) -> list[str]:
        """Names of the folders that hold a manifest, oldest first."""
        return [str(name) for name in self._committed()]

    def _committed(self) -> list[Name]:
        return [name for name in self._names() if self.store.exists(f"{name}/{MANIFEST}")]

    def _names(self) -> list[Name]:
        return sorted(filter(None, map(Name.parse, self.store.list())))

    def read(self, name: str) -> Checkpoint:
        """See :func:`read_checkpoint`."""
        return read_checkpoint(self.store.child(name))

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None; damaged ones are told and passed over.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged: starting afresh would bury
                them.
        """
        names = self._committed()
        for name in reversed(names):
            try:
                return self.read(str(name))
            except CheckpointError as error:
                self._damaged.add(name)
                self._on_damaged(str(error))
        if names:
            raise CheckpointError(
                self.store.url,
                f"all {len(names)} checkpoints are damaged",
                mend="Restore one from a copy, or choose another --run-dir to start afresh",
            )
        return None

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

        Args:
            samples_seen: the clock.
            tensors: all trained state by name.
            state: JSON values.
            attempt: that writes; enters the name where it is needed.
            metrics: measured at this clock.

        Returns:
            What is done once the checkpoint is complete.

        Raises:
            GatdistError: what went wrong in the background since the last call.
        """
        self.wait()
        snapshot = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        name, measured, self._began = Name(samples_seen), dict(metrics or {}), time.monotonic()
        self._pending = self._background.submit(
            lambda: self._commit(name, snapshot, state, attempt, measured)
        )
        return self._pending

    def require_room(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise if what is kept, and one more that is being written, would not fit.

        Args:
            tensors: what a checkpoint will hold.

        Raises:
            StorageError: see above.
        """
        free = self.store.free_bytes()
        if free is None:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        missing = max(1, self._retention.newest + 1 - len(self._committed()))
        if free < missing * size:
            raise StorageError(
                self.store.url,
                f"has {free / 1e6:,.1f} MB free, and {missing} more checkpoints take "
                f"{missing * size / 1e6:,.1f} MB",
                mend="Make room, keep fewer (run.keep_checkpoints), or choose another --run-dir",
            )

    def is_free(self) -> bool:
        """Whether the last commit has ended; while it is young, that is waited for."""
        if self._pending is None:
            return True
        left_s = self._began + _PATIENCE_S - time.monotonic()
        return bool(wait([self._pending], max(0.0, left_s)).done)

    def wait(self) -> None:
        """Return when no checkpoint is being written. Raises what went wrong in the background."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and end the background thread."""
        self._background.close()

    def _commit(
        self,
        name: Name,
        tensors: Mapping[str, Tensor],
        state: dict[str, Any],
        attempt: int,
        metrics: dict[str, float],
    ) -> None:
        self._may_commit()
        if name not in self._mine and self.store.exists(str(name)):
            name = Name(name.samples_seen, attempt)
        self._mine.add(name)
        about = {"samples_seen": name.samples_seen, "attempt": attempt, "metrics": metrics}
        try:
            write_checkpoint(self.store.child(str(name)), tensors, state, about, self._may_commit)
        except StorageError:
            self._may_commit()  # what a stale attempt writes is swept away under its hands
            raise
        try:
            self._may_commit()
        except StaleAttemptError:
            self._drop_what_was_swept(name)
            raise
        self._damaged.discard(name)
        reached("commit/retire")
        self._retire(name)

    def _drop_what_was_swept(self, name: Name) -> None:
        """Take back a commit that came after another attempt had swept the folder's files."""
        try:
            self.read(str(name))
        except CheckpointError:
            self.store.delete(f"{name}/{MANIFEST}")
            self.store.delete(str(name))

    def _retire(self, last: Name) -> None:
        """Delete what is not to be kept, and older folders that never got a manifest.

        Never what is as new as ``last``: if this attempt is stale, that is of the one that took
        over.
        """
        committed = set(self._committed())
        sound = {name: self._metrics_of(name) for name in committed - self._damaged}
        kept = self._retention.kept(sound)
        for name in self._names():
            if name.samples_seen < last.samples_seen and name not in kept:
                # The manifest goes first: a half-deleted checkpoint must not look whole.
                self.store.delete(f"{name}/{MANIFEST}")
                self.store.delete(str(name))

    def _metrics_of(self, name: Name) -> Mapping[str, float]:
        """Those of its manifest, or measured later; finite ones."""
        if name not in self._metrics:
            try:
                manifest = read_manifest(self.store.child(str(name)))
            except CheckpointError:
                return {}
            attempt = manifest.get("attempt", name.attempt)
            found = manifest.get("metrics") or self._measured(name.samples_seen, attempt)
            if not found:
                return {}
            self._metrics[name] = {key: value for key, value in found.items() if _finite(value)}
        return self._metrics[name]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

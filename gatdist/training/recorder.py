"""Metrics, previews and alarms of a run, written by worker 0."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatdist.common.background import Background, Coalesced
from gatdist.common.errors import GatdistError, StorageUnavailableError
from gatdist.common.registry import user_code
from gatdist.config import Config, redact_url
from gatdist.data.dataset import Dataset
from gatdist.game.tasks import Fields
from gatdist.models import DTYPES
from gatdist.monitor.metrics import Record
from gatdist.monitor.previews import Preview, preview, preview_columns
from gatdist.monitor.sinks import Monitor
from gatdist.monitor.uploads import Uploads
from gatdist.parallel.communicator import Communicator
from gatdist.runs import Change, ChangeLog, Evaluations, Mapped, RunDirectory, Sampler
from gatdist.runs.changes import CHANGES_FILE
from gatdist.training.health import alarms, time_lost
from gatdist.training.state import TrainState

Emit = Callable[[str, dict[str, Any]], None]
# Slower writes cause a warning.
_SLOW_STORAGE_S = 10.0
# At most so many previews wait to be written.
_MAX_PREVIEWS = 4


class Recorder:
    """Write metrics, previews, evaluations and alarms of one attempt; does nothing on ranks > 0.

    ``unwritten`` are metrics that a checkpoint holds because they could not be written before it;
    metrics of earlier attempts beyond ``resume_samples`` are removed. ``changes`` of workers may
    not have been written yet; None: the workers can't change.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        directory: RunDirectory,
        dataset: Dataset,
        validation: Dataset,
        state: TrainState,
        emit: Emit,
        background: Background,
        unwritten: Iterable[Record],
        resume_samples: int,
        changes: Sequence[Change] | None = None,
    ) -> None:
        self.active = comm.is_main
        if not self.active:
            return
        self.config, self.device, self.dataset = config, comm.device, dataset
        self._validation = validation
        self._comm = comm
        self.state, self.emit = state, emit
        self.store, self._directory = directory.store, directory
        self._background, self._waits = background, False
        self._metrics: deque[tuple[int, dict[str, Any]]] = deque()
        self._previews: deque[tuple[int, str, Preview, str]] = deque()
        self._changes = None if changes is None else ChangeLog(directory.store, changes)
        self._write_soon = Coalesced(background, self._write)
        self._warned = self._is_closed = False
        self.preview_path = ""
        # May raise DataError: before any thread starts.
        self._fields: Fields = self._mapped.fields(self._numbers) if self._has_inputs else {}
        self._real = self._real_samples()
        self.monitor = self._monitor(resume_samples, unwritten)
        self._introduce(state.samples_seen)
        emit(
            "start",
            {
                "run_dir": self.store.url,
                "attempt": directory.attempt,
                "samples_seen": state.samples_seen,
                "total_samples": config.run.total_samples,
                "workers": comm.world_size,
                "device": comm.device.type,
                "data": redact_url(config.data.url),
                "num_samples": dataset.num_samples,
                "num_shards": dataset.num_shards,
                "parameters": {
                    name: sum(p.numel() for p in player.bare.parameters())
                    for name, player in state.players.items()
                },
            },
        )

    def log(self, values: dict[str, Any]) -> None:
        """Write a row of metrics and a preview, and raise alarms.

        Raises:
            StaleAttemptError: another attempt has taken over the run; a later call may raise it.
        """
        if not self.active:
            return
        fakes = self._fakes()
        values = values | {"health/storage_wait_s": self._background.busy_s}
        if not self._has_inputs:  # others vary with their inputs
            values["diversity/ratio"] = _diversity(fakes) / max(_diversity(self._real), 1e-12)
        if self._changes:
            values |= self._changes.totals()
        raised = alarms(self.config.health, values)
        values |= {f"health/{alarm.name}": 1.0 for alarm in raised}
        samples_seen = int(values["samples_seen"])
        # While storage is slow, previews would fill memory.
        if not self._waits and len(self._previews) < _MAX_PREVIEWS:
            shown, path = self._preview(fakes), f"samples/fakes-{samples_seen:09d}"
            self._previews.append((samples_seen, "fakes", shown, path))
            self.preview_path = f"{path}{next(iter(shown.files()))}"
        self._metrics.append((samples_seen, values))
        self._write_soon.request()
        self._warn_of_failures()
        self.emit("log", values | {"total_samples": self.config.run.total_samples})
        for alarm in raised:
            self.emit("alarm", asdict(alarm) | {"samples_seen": samples_seen})

    def look_at_storage(self, *, waits: bool = False) -> None:
        """Raise what failed in the background; warn once of slow storage.

        ``waits`` says whether training is waiting for it.
        """
        if not self.active:
            return
        self._background.check()
        for_s, before = self._background.busy_s, self._waits
        self._waits = for_s > _SLOW_STORAGE_S
        if self._waits and not before:
            message = f"nothing could be written to {self.store.url} for {for_s:.0f} s"
            meanwhile = "training waits for the checkpoint" if waits else "training goes on"
            self.emit("warning", {"message": f"{message}; {meanwhile} meanwhile"})

    def changed(self, change: Change) -> None:
        """Record and show a change of workers; warn if changes take too much time."""
        if not self.active:
            return
        assert self._changes
        self._changes.add(change)
        if self._is_closed:  # a worker was lost while the last files were written
            with suppress(GatdistError):
                self._directory.require_current()
                self.store.publish(CHANGES_FILE, self._changes.content())
        else:
            self._write_soon.request()
        self.emit("members", asdict(change) | {"totals": self._changes.totals()})
        if message := time_lost(self.config.health, *self._changes.lost_shares()):
            self.emit("warning", {"message": message})

    def evaluation(self, metrics: dict[str, float], seconds: float) -> None:
        if self.active:
            message = {"metrics": metrics, "seconds": seconds}
            self.emit("evaluation", {"samples_seen": self.state.samples_seen} | message)

    def evaluated(
        self, evaluations: Evaluations, state: dict[str, Any], outcome: dict[str, Any]
    ) -> None:
        """Record the outcome of evaluating the checkpoint with this state."""

        def record() -> None:
            self._directory.require_current()
            evaluations.record(state, outcome)

        if self.active:
            self._background.submit(record)

    def finish(self, outcome: dict[str, Any]) -> None:
        if self.active:
            where = {
                "run_dir": self.store.url,
                "samples": self.preview_path,
                "tensorboard": self.config.monitor.tensorboard,
            }
            self.emit("done", outcome | where)

    def before_commit(self, state: dict[str, Any]) -> None:
        """Write all metrics before the next checkpoint; add to its ``state`` what can't be written.

        So a checkpoint is never ahead of the metrics.
        """
        if self.active:

            def write() -> None:
                self._write(force=True)
                if unwritten := self.monitor.unwritten:
                    state["unwritten_metrics"] = unwritten

            self._background.submit(write)

    def close(self) -> None:
        """Write what is buffered; warn of what can't be written."""
        if self.active:
            self._is_closed = True
            self._close(final=True)
            if missing := self.monitor.missing:
                what, error = ", ".join(missing), self.monitor.error
                because = f": {error}" if error else ""
                self.emit(
                    "warning", {"message": f"not written to {self.store.url}: {what}{because}"}
                )

    def rewind(self) -> None:
        """Remove metrics beyond the state's ``samples_seen``, after a rollback."""
        if self.active:
            self._close(final=False)
            waiting = self.monitor.unwritten, self.monitor.uploads
            self.monitor = self._monitor(self.state.samples_seen, *waiting)
            self._show_changes()

    def _close(self, *, final: bool) -> None:
        try:
            if not self._background.failed:
                self._write_soon.request()
            self._background.wait()
        finally:
            while self._metrics:  # if the thread has failed
                self.monitor.tick(*self._metrics.popleft())
            # Storage that has just failed for a minute is not tried for another one.
            self.monitor.close(final=final, publish=not self._background.failed)

    def _warn_of_failures(self) -> None:
        """Warn once as long as something can't be written."""
        error = self.monitor.error
        if error and not self._warned:
            again = "Training continues; this is retried at each log interval"
            self.emit("warning", {"message": f"{error}. {again}"})
        self._warned = bool(error)

    def _monitor(
        self, resume_samples: int, unwritten: Iterable[Record], uploads: Uploads | None = None
    ) -> Monitor:
        return Monitor(
            self.store,
            tensorboard=self.config.monitor.tensorboard,
            resume_samples=resume_samples,
            unwritten=unwritten,
            uploads=uploads,
        )

    def _fakes(self) -> Tensor:
        """Generate samples of the same latents or inputs every time, on the CPU."""
        if self._has_inputs:
            return self._mapped.of_fields(self._fields, self._numbers).cpu()
        sampler = Sampler.from_config(
            self.config,
            self.state.average.network,
            self.dataset.num_classes,
            "grid",
            at_once=self.config.at_once(self._comm.world_size, self.device.type),
        )
        positions, classes = torch.arange(self._num_shown, device=self.device), sampler.num_classes
        return sampler(positions, positions % classes if classes else None).cpu()

    @property
    def _mapped(self) -> Mapped:
        game, network = self.state.game, self.state.average.network
        at_once = self.config.at_once(self._comm.world_size, self.device.type)
        return Mapped(self.config, game.task, network, self._validation, "grid", at_once)

    @property
    def _numbers(self) -> Tensor:
        return torch.from_numpy(self._shown).to(self.device)

    def _real_samples(self) -> Tensor:
        if self._has_inputs:
            return self._fields[self.state.game.task.target].cpu()
        samples, _ = self.dataset.read(self._shown)
        reals = self.dataset.sample_format.to_network(torch.from_numpy(samples))
        return reals.to(DTYPES[self.config.precision.dtype])

    @property
    def _shown(self) -> NDArray[np.int64]:
        """Numbers of the real samples that are shown."""
        available = (self._validation if self._has_inputs else self.dataset).num_samples
        count = min(self._num_shown, available)
        return np.linspace(0, available - 1, count).astype(np.int64)

    @property
    def _has_inputs(self) -> bool:
        return self.state.game.task.has_inputs

    @property
    def _num_shown(self) -> int:
        shown = self.config.monitor.grid_samples
        if self._has_inputs:  # each with its inputs and its target
            return min(shown, 8 if self.dataset.modality == "audio" else 24)
        # A scatter plot needs thousands of points; nobody listens to a hundred clips.
        return {"points": 4096, "audio": min(shown, 16)}.get(self.dataset.modality, shown)

    def _introduce(self, samples_seen: int) -> None:
        self.monitor.text("configuration", config_table(self.config))
        self.monitor.hparams(self.config)
        self._show_changes()
        if not self._has_inputs:  # else targets are beside the outputs
            shown = self._preview(self._real)
            self._previews.append((samples_seen, "reals", shown, "samples/reals"))
        self._write_soon.request()

    def _write(self, *, force: bool = False) -> None:
        """Write metrics and previews in the background, unless another attempt has taken over."""
        while self._metrics:
            self.monitor.tick(*self._metrics.popleft())
        for samples_seen, curves in self._changes.take() if self._changes else ():
            self.monitor.scalars(samples_seen, curves)
            self._show_changes(samples_seen)
        try:
            self._directory.require_current()
        except StorageUnavailableError:
            return  # later
        if self._changes and not self._changes.is_written:
            self._changes.is_written = True
            self.monitor.uploads.add(CHANGES_FILE, self._changes.content())
        while self._previews:
            self._show(*self._previews.popleft())
        self.monitor.flush(force=force)

    def _show_changes(self, samples_seen: int | None = None) -> None:
        if self._changes and (table := self._changes.markdown()):
            self.monitor.text("worker_changes", table, samples_seen)

    def _show(self, samples_seen: int, tag: str, shown: Preview, path: str) -> None:
        for ending, make in shown.files().items():
            self.monitor.uploads.add(f"{path}{ending}", make())
        self.monitor.preview(samples_seen, f"samples/{tag}", shown.image, shown.audio, shown.text)

    def _preview(self, samples: Tensor) -> Preview:
        if self._has_inputs:
            task, real = self.state.game.task, {k: v.cpu() for k, v in self._fields.items()}
            with user_code("game.task", "fails in preview()", value=type(task).__name__):
                columns = task.preview(real, {**real, task.target: samples})
                return preview_columns(self._validation.sample_format, columns)
        return preview(
            self.dataset.sample_format, samples, extent=float(self._real.abs().max()) * 1.5
        )


def _diversity(samples: Tensor) -> float:
    """Return the standard deviation over the batch, averaged over pixels or coordinates."""
    return float(samples.double().std(dim=0).mean())


def config_table(config: Config) -> str:
    """Return the configuration as a Markdown table."""
    from gatdist.config import flatten

    rows = [
        f"| `{key}` | `{json.dumps(value)}` |" for key, value in flatten(config.redacted()).items()
    ]
    return "\n".join(["| key | value |", "| --- | --- |", *rows])

"""What a run shows of itself: metrics, pictures and alarms, written by worker 0 alone."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatdist.common.background import Background, Coalesced
from gatdist.common.errors import StorageUnavailableError
from gatdist.config import Config, redact_url
from gatdist.data import Dataset
from gatdist.models import DTYPES
from gatdist.monitor.metrics import Record
from gatdist.monitor.previews import Preview, preview
from gatdist.monitor.sinks import Monitor
from gatdist.monitor.uploads import Uploads
from gatdist.parallel.communicator import Communicator
from gatdist.runs import Evaluations, RunDirectory, Sampler
from gatdist.training.health import alarms
from gatdist.training.state import TrainState

Emit = Callable[[str, dict[str, Any]], None]
# Writes that take longer are told of.
_SLOW_STORAGE_S = 10.0
# With so many previews waiting, no more are made.
_MAX_PREVIEWS = 4


class Recorder:
    """Ticks, pictures, evaluations and alarms of one attempt; silent on all workers but 0.

    Args:
        config: of the run.
        comm: the workers.
        directory: of the run, its attempt started.
        dataset: the real samples, some of which are shown beside the fakes.
        state: resumed; its averaged generator makes the pictures.
        emit: tells people.
        background: does the writing.
        unwritten: metrics that the checkpoint holds, since they could not be written before it.
        resume_samples: what was written past it by earlier attempts is taken back.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        directory: RunDirectory,
        dataset: Dataset,
        state: TrainState,
        emit: Emit,
        background: Background,
        unwritten: Iterable[Record],
        resume_samples: int,
    ) -> None:
        self.active = comm.is_main
        if not self.active:
            return
        self.config, self.device, self.dataset, self.state, self.emit = (
            config,
            comm.device,
            dataset,
            state,
            emit,
        )
        self.store, self._directory = directory.store, directory
        self._background, self._waits = background, False
        self._metrics: deque[tuple[int, dict[str, Any]]] = deque()
        self._previews: deque[tuple[int, str, Preview, str]] = deque()
        self._write_soon = Coalesced(background, self._write)
        self._warned = False
        self.preview_path = ""
        self._real = self._real_samples()  # may find that they are bad: before any thread starts
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

    def tick(self, values: dict[str, Any]) -> None:
        """Write one line of numbers and one picture, and raise the alarms they call for.

        Raises:
            StaleAttemptError: another attempt has taken the run over; nothing more is written. It
                may be a later call that tells.
        """
        if not self.active:
            return
        fakes = self._fakes()
        values = values | {
            "diversity/ratio": _diversity(fakes) / max(_diversity(self._real), 1e-12),
            "health/storage_wait_s": self._background.busy_s,
        }
        raised = alarms(self.config.health, values)
        values |= {f"health/{alarm.name}": 1.0 for alarm in raised}
        samples_seen = int(values["samples_seen"])
        # While storage keeps us waiting, previews would pile up in memory.
        if not self._waits and len(self._previews) < _MAX_PREVIEWS:
            shown, path = self._preview(fakes), f"samples/fakes-{samples_seen:09d}"
            self._previews.append((samples_seen, "fakes", shown, path))
            self.preview_path = f"{path}{next(iter(shown.files()))}"
        self._metrics.append((samples_seen, values))
        self._write_soon.request()
        self._warn_of_failures()
        self.emit("log", values | {"total_samples": self.config.run.total_samples})
        for alarm in raised:
            self.emit(
                "alarm",
                {"name": alarm.name, "message": alarm.message, "samples_seen": samples_seen},
            )

    def look_at_storage(self, *, waits: bool = False) -> None:
        """Raise what failed in the background, and warn once of storage that is slow.

        Args:
            waits: whether training waits for it at present.
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

    def evaluation(self, metrics: dict[str, float], seconds: float) -> None:
        """Tell people of an evaluation, and how long training waited for it."""
        if self.active:
            message = {"metrics": metrics, "seconds": seconds}
            self.emit("evaluation", {"samples_seen": self.state.samples_seen} | message)

    def evaluated(
        self, evaluations: Evaluations, state: dict[str, Any], outcome: dict[str, Any]
    ) -> None:
        """Record the outcome of an evaluation of the checkpoint with this state."""

        def record() -> None:
            self._directory.require_current()
            evaluations.record(state, outcome)

        if self.active:
            self._background.submit(record)

    def finish(self, outcome: dict[str, Any]) -> None:
        """Tell how the run ended."""
        if self.active:
            self.emit("done", outcome | {"samples": self.preview_path, "run_dir": self.store.url})

    def before_commit(self, state: dict[str, Any]) -> None:
        """Have all metrics so far written before the checkpoint that is committed next.

        Args:
            state: of the checkpoint; metrics that can't be written are added to it, so that a
                checkpoint never knows more than the metrics do.
        """
        if self.active:

            def write() -> None:
                self._write(force=True)
                if unwritten := self.monitor.unwritten:
                    state["unwritten_metrics"] = unwritten

            self._background.submit(write)

    def close(self) -> None:
        """Write out what is buffered, and warn once of what can't be written."""
        if self.active:
            self._close(final=True)
            if missing := self.monitor.missing:
                what, error = ", ".join(missing), self.monitor.error
                because = f": {error}" if error else ""
                self.emit(
                    "warning", {"message": f"not written to {self.store.url}: {what}{because}"}
                )

    def rewind(self) -> None:
        """Take back what was written past the state's clock, which has been set back."""
        if self.active:
            self._close(final=False)
            waiting = self.monitor.unwritten, self.monitor.uploads
            self.monitor = self._monitor(self.state.samples_seen, *waiting)

    def _close(self, *, final: bool) -> None:
        try:
            if not self._background.failed:
                self._write_soon.request()
            self._background.wait()
        finally:
            while self._metrics:  # if the thread has failed
                self.monitor.tick(*self._metrics.popleft())
            # Storage that has just failed for a minute is not asked for another one.
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
        """Samples of the same latents at every tick, in the networks' space, on the CPU."""
        model = self.config.model
        classes = self.dataset.num_classes if model.conditional else 0
        sampler = Sampler(
            self.state.average.network, model.latent_size, classes, self.config.run.seed, "grid"
        )
        positions = torch.arange(self._num_shown, device=self.device)
        return sampler(positions, positions % classes if classes else None).cpu()

    def _real_samples(self) -> Tensor:
        count = min(self._num_shown, self.dataset.num_samples)
        indices = np.linspace(0, self.dataset.num_samples - 1, count).astype(np.int64)
        samples, _ = self.dataset.read(indices)
        seen = self.dataset.sample_format.to_network(torch.from_numpy(samples))
        return seen.to(DTYPES[self.config.precision.dtype])

    @property
    def _num_shown(self) -> int:
        shown = self.config.monitor.grid_samples
        # A cloud of points says little below a few thousand; nobody listens to a hundred sounds.
        return {"points": 4096, "audio": min(shown, 16)}.get(self.dataset.modality, shown)

    def _introduce(self, samples_seen: int) -> None:
        """Show what is shown once."""
        self.monitor.text("configuration", config_table(self.config))
        self.monitor.hparams(self.config)
        self._previews.append((samples_seen, "reals", self._preview(self._real), "samples/reals"))
        self._write_soon.request()

    def _write(self, *, force: bool = False) -> None:
        """In the background: write metrics and previews, unless another attempt has taken over."""
        while self._metrics:
            self.monitor.tick(*self._metrics.popleft())
        try:
            self._directory.require_current()
        except StorageUnavailableError:
            return  # later
        while self._previews:
            self._show(*self._previews.popleft())
        self.monitor.flush(force=force)

    def _show(self, samples_seen: int, tag: str, shown: Preview, path: str) -> None:
        """Have files uploaded to ``path`` and their endings, and show them in TensorBoard."""
        for ending, make in shown.files().items():
            self.monitor.uploads.add(f"{path}{ending}", make())
        self.monitor.preview(samples_seen, f"samples/{tag}", shown.image, shown.audio, shown.text)

    def _preview(self, samples: Tensor) -> Preview:
        return preview(
            self.dataset.sample_format, samples, extent=float(self._real.abs().max()) * 1.5
        )


def _diversity(samples: Tensor) -> float:
    """How far samples differ: the deviation over the batch, averaged over pixels or coordinates."""
    return float(samples.double().std(dim=0).mean())


def config_table(config: Config) -> str:
    """The configuration as a Markdown table a section."""
    from gatdist.config import flatten

    rows = [
        f"| `{key}` | `{json.dumps(value)}` |" for key, value in flatten(config.redacted()).items()
    ]
    return "\n".join(["| key | value |", "| --- | --- |", *rows])

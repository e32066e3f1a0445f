"""Metrics and notes of a log interval, gathered from all workers."""

from __future__ import annotations

import socket
import time
from typing import Any

import torch

from gatdist.config import Config
from gatdist.data.dataset import Dataset, too_many_bad
from gatdist.data.joined import AnyLoader
from gatdist.data.order import WorkerShare
from gatdist.game import UpdateRule
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer, WorkerTimes, find_stragglers
from gatdist.parallel.communicator import Communicator
from gatdist.training.ledger import Ledger
from gatdist.training.progress import Progress
from gatdist.training.recorder import Emit
from gatdist.training.state import TrainState

# How often the workers exchange whether any of them was asked to stop.
_POLL_S = 0.5


class LogInterval:
    """Accumulate what steps measure, and reduce it over the workers in a few collectives.

    Attributes:
        statistics: receives the values of a step.
        timer: times its phases.
        steps_between_polls: steps between checks for a request to stop; identical on every rank.
        is_uneven: whether workers may have made different numbers of steps.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        state: TrainState,
        ledger: Ledger,
        rule: UpdateRule,
        dataset: Dataset,
        emit: Emit,
        progress: Progress,
    ) -> None:
        self._config, self._comm, self._state, self._ledger = config, comm, state, ledger
        self._rule, self._dataset = rule, dataset
        self._emit = emit
        self.statistics = Statistics(comm.device)
        self.timer = PhaseTimer(comm.device, on_enter=progress.enter)
        self.steps_between_polls = 1
        self._notes: list[str] = []
        self._reported: set[str] = set()
        self._bad: dict[int, str] = {}
        self._slow: set[int] = set()
        self.is_uneven = False
        self.start()

    def start(self) -> None:
        self._steps = 0
        self.is_uneven = False
        self._comm.take_communication_s()  # of evaluations and commits
        self._began = time.perf_counter()

    def change_workers(self, seconds: float) -> None:
        """Continue with other workers, who may have made no step in this interval.

        The change took ``seconds``, which are no time of a step.
        """
        self._began += seconds
        self.is_uneven = True
        self.steps_between_polls = 1

    def note(self, message: str) -> None:
        """Show a message at the end of the interval. Any thread of any worker may call it."""
        self._notes.append(message)

    def step(self) -> None:
        self._steps += 1

    def summary(self, loader: AnyLoader) -> dict[str, Any]:
        """Return means since :meth:`start`, identical on every rank; show notes and warnings.

        Empty if no worker has made a step.

        Raises:
            DataError: the workers together found too many bad samples.
        """
        if self.is_uneven and not any(self._comm.all_gather_object(self._steps)):
            return {}
        elapsed_s = time.perf_counter() - self._began
        self._ledger.wall_time_s += elapsed_s
        # Means of the workers' clocks, so that decisions are identical on every rank.
        seconds = {}
        if self._steps:
            seconds = self.timer.collect(self._steps) | {
                "time/step_s": elapsed_s / self._steps,
                "time/communication_s": self._comm.take_communication_s() / self._steps,
            }
        for tag, value in (seconds | loader.take_counts()).items():
            self.statistics.add(
                tag, torch.tensor(value, dtype=torch.float64, device=self._comm.device)
            )
        values = self.statistics.reduce(self._comm, same_names=not self.is_uneven)
        for tag in ("data/bytes_fetched", "data/cache_hits"):
            values[tag] *= self._comm.world_size  # of all workers
        step_s = values["time/step_s"]
        self.steps_between_polls = max(1, min(64, int(_POLL_S / step_s)))
        workers, samples_per_s = self._comm.world_size, self._config.step_samples / step_s
        values |= {
            "throughput/samples_per_s": samples_per_s,
            "throughput/samples_per_s_per_worker": samples_per_s / workers,
            "throughput/workers": float(workers),
        }
        for name, player in self._state.players.items():
            settings = player.hyperparameters(self._state.samples_seen)
            values[f"learning_rate/{name}"] = float(settings.learning_rate)
        for key, schedule in self._config.schedules().items():
            if not key.endswith(".learning_rate"):
                values[f"schedule/{key}"] = schedule.at(self._state.samples_seen)
        if self._state.scaler:
            values["health/loss_scale"] = float(self._state.scaler.scale)
        values |= {
            "samples_seen": self._state.samples_seen,
            "world_size": workers,
            "wall_time_s": self._ledger.wall_time_s,
        }
        self._gather(values, seconds)
        return values

    def _gather(self, values: dict[str, Any], seconds: dict[str, float]) -> None:
        """Gather notes, bad samples and times of all workers; show each once."""
        bad = self._dataset.bad_samples.items()
        notes, self._notes = self._notes, []
        share = WorkerShare.from_config(self._config, self._comm.rank, self._comm.world_size)
        mine = {
            "notes": [*notes, *self._rule.notes, *self._dataset.notes],
            "bad": {str(i): message for i, message in bad if i not in self._bad},
            "host": socket.gethostname(),
            "seconds": seconds,
            "samples": share.local_batch,
        }
        self._rule.notes.clear()
        gathered = self._comm.all_gather_object(mine)
        self._report_bad(values, [one["bad"] for one in gathered])
        if not self.is_uneven:  # else a worker may have waited for one that was lost
            times = [WorkerTimes(one["host"], one["seconds"], one["samples"]) for one in gathered]
            self._report_slow(values, times)
        for note in sorted({note for one in gathered for note in one["notes"]} - self._reported):
            self._reported.add(note)
            self._emit("note", {"message": note})

    def _report_bad(self, values: dict[str, Any], of_workers: list[dict[str, str]]) -> None:
        found = {int(i): message for bad in of_workers for i, message in bad.items()}
        self._bad |= found
        values["health/bad_samples"] = float(len(self._bad))
        if not found:
            return
        budget, last = self._config.data.bad_sample_budget, found[max(found)]
        if len(self._bad) > budget:
            raise too_many_bad(len(self._bad), budget, last)
        message = f"{len(self._bad):,} bad samples so far, replaced by others; the last: {last}"
        self._emit("warning", {"message": message})

    def _report_slow(self, values: dict[str, Any], times: list[WorkerTimes]) -> None:
        """Warn of stragglers, once per worker as long as it is one."""
        slow = find_stragglers(times, self._config.health.straggler_factor)
        values["health/stragglers"] = float(len(slow))
        for straggler in slow:
            if straggler.rank not in self._slow:
                self._emit("warning", {"message": straggler.message})
        self._slow = {straggler.rank for straggler in slow}

"""What a run has done so far, and what it still owes, apart from its tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gatdist.common.errors import DataError
from gatdist.config import Config
from gatdist.data.dataset import Dataset
from gatdist.data.order import SampleOrder
from gatdist.data.unpaired import state_of
from gatdist.evaluation.metrics import higher_is_better
from gatdist.training.checkpoint_interval import CheckpointInterval
from gatdist.training.health import Convergence, Counts
from gatdist.training.state import TrainState

# Rows of metrics, and changes; another worker writes them if worker 0 is lost before it has.
_KEPT_ROWS = 64

Evaluated = list[dict[str, Any]]  # the state of a checkpoint and the outcome of its evaluation


class Ledger:
    """What a run has done so far, and what it still owes, apart from its tensors.

    A checkpoint holds it beside the tensors, and the workers of a new epoch agree on it.

    Args:
        config: of the run.
        state: of the run; has the tensors, and the counters of samples and rollbacks.
        dataset: that the run trains on.
        orders: of its samples, by data set.

    Attributes:
        outcome: what the run returns if it ends here.
        convergence: of the evaluations so far.
        counted: bad events that have been judged.
        wall_time_s: training time over all attempts.
        checkpoint_interval: how often checkpoints are written.
        order: parameters of the samples' order, as JSON values.
        evaluating: values of the log interval whose evaluation is still to be done, else None.
        evaluated_attempt: wrote the checkpoint to evaluate.
        evaluated: the last evaluated checkpoint and the outcome, which worker 0 may not live to
            write.
        over: whether only the last files remain to be written.
        settled: samples seen by the last step that was logged and so on, if that was due.
        owes_checkpoint: whether one is due after this step, whatever the interval.
        rows: the last rows of metrics.
        unwritten_metrics: rows that the files of the run may lack.
        changes: the last changes of workers, as JSON values.
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        dataset: Dataset,
        orders: Mapping[str, SampleOrder],
    ) -> None:
        self._config, self._state, self._dataset = config, state, dataset
        self.order = state_of(orders)
        self.outcome: dict[str, Any] = {
            "status": "new",
            "reason": "",
            "samples_seen": 0,
            "metrics": {},
        }
        higher = higher_is_better(config.run).get("run.convergence.metric", False)
        self.convergence = Convergence(config.run.convergence, higher_is_better=higher)
        self.counted = self.counts()
        self.wall_time_s = 0.0
        self.checkpoint_interval = CheckpointInterval(config)
        self.evaluating: dict[str, Any] | None = None
        self.evaluated_attempt = 0
        self.evaluated: Evaluated | None = None
        self.over = False
        self.settled = 0
        self.owes_checkpoint = False
        self.rows = deque[dict[str, Any]](maxlen=_KEPT_ROWS)
        self.unwritten_metrics: list[dict[str, Any]] = []
        self.changes = deque[dict[str, Any]](maxlen=_KEPT_ROWS)

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint that was found is the end of the run."""
        if self.outcome["status"] == "converged" and self._config.run.convergence:
            return True
        all_seen = self._state.samples_seen >= self._config.run.total_samples
        return self.outcome["status"] == "finished" and all_seen

    @property
    def steps_made(self) -> int:
        """Steps since the run began."""
        return self._state.samples_seen // self._config.step_samples

    @property
    def logged(self) -> int:
        """Samples seen at the last row of metrics."""
        return self.rows[-1]["samples_seen"] if self.rows else -1

    def counts(self) -> Counts:
        """Return the numbers of bad events so far."""
        guard = self._state.guard.tensors
        return Counts(int(guard["nonfinite"]), int(guard["spikes"]), self._state.rollbacks)

    def stands(self, status: str, reason: str) -> None:
        """Take note of the outcome if the run ends after the last step."""
        seen = self._state.samples_seen
        self.outcome |= {"status": status, "reason": reason, "samples_seen": seen}

    def note_evaluation(self, metrics: dict[str, float], status: str, reason: str) -> None:
        """Take note of the outcome with the evaluation that was to be done."""
        self.outcome |= {"status": status, "reason": reason, "metrics": metrics}
        of = {
            "samples_seen": self._state.samples_seen,
            "attempt": self.evaluated_attempt,
            "rollbacks": self._state.rollbacks,
        }
        self.evaluated = [of, self.outcome | {"convergence": self.convergence.state()}]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the tensors and the attempt, as JSON values."""
        return self.outcome | {
            "version": 2,
            "samples_seen": self._state.samples_seen,  # the outcome may be that of the step before
            "evaluating": self.evaluating,
            "config_digest": self._config.digest(),
            "samples": self._dataset.spec.model_dump(mode="json"),
            "order": self.order,
            "wall_time_s": self.wall_time_s,
            "convergence": self.convergence.state(),
            "rollbacks": self._state.rollbacks,
            "counted": asdict(self.counted),
            "checkpoint_every_samples": self.checkpoint_interval.samples,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, which has its ``attempt``, too."""
        before = [row for row in self.rows if row["samples_seen"] <= saved["samples_seen"]]
        self._restore(saved)
        if before:  # else they would count as not logged, after a rollback
            self.rows = deque(before, maxlen=_KEPT_ROWS)
        self.evaluated_attempt = saved["attempt"]
        self.settled = self._state.samples_seen

    def handover(self) -> dict[str, Any]:
        """Return what the workers of a new epoch are to know, as JSON values."""
        return self.state() | {
            "unwritten_metrics": [*self.rows],
            "evaluated_attempt": self.evaluated_attempt,
            "evaluated": self.evaluated,
            "over": self.over,
            "changes": [*self.changes],
        }

    def take_over(self, given: dict[str, Any], settled: int) -> None:
        """Continue from what :meth:`handover` has returned on one of the workers."""
        self._restore(given)
        self.evaluated_attempt, self.evaluated = given["evaluated_attempt"], given["evaluated"]
        self.over, self.settled = given["over"], settled
        self.changes = deque(given["changes"], maxlen=_KEPT_ROWS)

    def require_same_data(self, given: dict[str, Any]) -> None:
        """Raise DataError if the worker that has given its ledger has other data."""
        others = given["order"]
        for key in sorted(others):
            if self.order.get(key) != others[key]:
                rule = f"differs from that of the other workers ({others[key]!r})"
                hint = "Give all hosts the same data"
                raise DataError(f"data.url: {key}", rule, value=self.order.get(key), hint=hint)

    def _restore(self, saved: dict[str, Any]) -> None:
        self._state.samples_seen = saved["samples_seen"]
        self._state.rollbacks = saved["rollbacks"]
        self.counted = Counts(**saved["counted"])
        self.evaluating = saved["evaluating"]
        self.outcome = {key: saved[key] for key in self.outcome}
        self.checkpoint_interval.take_over(saved.get("checkpoint_every_samples"))
        self.convergence.load(saved["convergence"])
        self.wall_time_s = saved["wall_time_s"]
        self.unwritten_metrics = saved.get("unwritten_metrics", [])
        self.rows = deque(self.unwritten_metrics, maxlen=_KEPT_ROWS)

"""What is written to the run directory and read there: checkpoints, attempts, records.

Worker 0 does it, except that all workers write and read files of large checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

from torch.profiler import record_function

from gatdist.common.background import Background
from gatdist.common.position import here
from gatdist.config import Config
from gatdist.data.dataset import Dataset
from gatdist.evaluation.metrics import higher_is_better
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.members import Members
from gatdist.runs import (
    Change,
    Checkpoint,
    Checkpoints,
    Evaluations,
    Retention,
    RunDirectory,
    is_sharded,
    layout_of_each,
    require_same_order,
    require_saved_state,
)
from gatdist.training.epochs import Agreement
from gatdist.training.integrity import Intact, require_equal_replicas
from gatdist.training.ledger import Evaluated, Ledger
from gatdist.training.progress import Progress
from gatdist.training.recorder import Emit, Recorder
from gatdist.training.state import TrainState
from gatdist.training.writers import Commit, Writers, read_newest

_POLL_S = 1.0  # of storage, while waiting for a checkpoint


class RunFiles:
    """The files of a run, of which each worker has this object, since worker 0 may change.

    Args:
        config: of the run.
        comm: the workers.
        directory: the run directory.
        state: the tensors of checkpoints.
        ledger: what they hold beside the tensors.
        dataset: that the run trains on.
        validation: that it is compared with.
        emit: called with events for the user: a kind and JSON values.
        progress: updated with this worker's position.

    Attributes:
        directory: the run directory.
        background: writes in the background.
        writers: write checkpoints with this worker.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        directory: RunDirectory,
        state: TrainState,
        ledger: Ledger,
        dataset: Dataset,
        validation: Dataset,
        emit: Emit,
        progress: Progress,
    ) -> None:
        self._config, self._comm, self.directory = config, comm, directory
        self._state, self._ledger, self._intact = state, ledger, Intact(state)
        self._emit, self._progress = emit, progress
        self.background = Background("run-directory")
        self._new_recorder = partial(
            Recorder, config, comm, directory, dataset, validation, state, emit, self.background
        )
        self._recorder: Recorder | None = None
        self._evaluations = Evaluations(directory.store)
        higher = higher_is_better(config.run).get("run.best_metric", False)
        self._checkpoints = Checkpoints(
            directory.store.child("checkpoints"),
            Retention.from_config(config.run, higher_is_better=higher),
            may_commit=lambda: directory.require_current() if comm.is_main else None,
            background=self.background,
            on_commit=directory.note_commit,
            on_warning=lambda message: emit("warning", {"message": message}),
            measured=self._evaluations.metrics,
        )
        self.writers = Writers(self._checkpoints, comm)
        self._committed = -1  # samples seen by the last checkpoint that worker 0 has begun to write
        self._is_abandoned = False  # whether that one lacks files, as a worker was lost
        self._skips = False  # whether the last checkpoint was skipped, as storage is slow

    @property
    def recorder(self) -> Recorder:
        """Writes metrics and so on, once :meth:`open` was called."""
        assert self._recorder
        return self._recorder

    def open(self) -> None:
        """Open the files of metrics and so on, unless a change of workers has done so."""
        if not self._recorder:
            self._open_recorder()

    def close(self) -> None:
        """Write what is left."""
        with closing(self.background):
            if self._recorder:
                self._recorder.close()

    def resume(self, workers: list[dict[str, Any]], reason: str) -> None:
        """Restore the newest complete checkpoint if there is one, and number this attempt.

        A run that is complete gets no further attempt.

        Args:
            workers: what each runs on, by rank.
            reason: of the start, for ``attempts.jsonl``; "": how the run stood before.
        """
        here.step = 0
        self._progress.start(0)
        resumes = self.load_newest()
        if not resumes:
            self._state.start_from_another_run(self._config, self.directory.store.origin)
        if self._ledger.is_complete:
            return
        if self._comm.is_main:
            resumed_from = self._state.samples_seen if resumes else None
            reason = reason or self._ledger.outcome["status"]
            self._checkpoints.require_room(self._state.tensors())
            # Last: a configuration that can't train must not occupy the folder.
            self.directory.claim(self._config)
            hosts = [worker["host"] for worker in workers]
            self.directory.start_attempt(hosts, resumed_from, reason, workers)
        here.rank = self._comm.rank
        here.attempt = self._comm.broadcast_object(self.directory.attempt)

    def load_newest(self) -> bool:
        """Restore the newest complete checkpoint on every worker; return false without one.

        Each reads and verifies some of its files, and sends their tensors to the others.
        """
        url = self.directory.store.url

        def judge(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
            if checkpoint is None:
                self.directory.require_fresh()
                return None
            saved = self._evaluations.complete(checkpoint.state)
            subject = f"{url}: {checkpoint.name}/state.json"
            require_saved_state(saved, subject, checkpoint.named_samples)
            require_same_order(saved["order"], self._ledger.order, url)
            return saved | {"name": checkpoint.name}

        saved, tensors = read_newest(self._checkpoints, self._comm, judge)
        if saved is None:
            return False
        self._state.load(saved["samples_seen"], tensors, f"{url}: {saved['name']}")
        self._ledger.load(saved)
        here.step = self._ledger.steps_made
        self._progress.start(self._state.samples_seen)
        is_evaluated_next = self._ledger.evaluating is not None
        self._committed = self._state.samples_seen if is_evaluated_next else -1
        return True

    def commit(self, *, must: bool = True) -> None:
        """Pass the state to those who write in the background.

        If the previous checkpoint is still being written, this one is skipped unless ``must``.

        Raises:
            PluginError: user code has made the state unfit to resume from.
            TrainingError: it is no longer finite.
            WorkerLostError: the workers hold different states.
        """
        self._progress.enter("commit")
        with self._ledger.checkpoint_interval.stop():
            self._intact.require()
            require_equal_replicas(self._state.tensors(), self._comm)
            self._save(must=must)
        if isinstance(self._comm, Members) and self._config.health.may_roll_back:
            # All go back to it, whoever is lost before.
            self.await_files()
            with self._progress.lengthy():
                self._comm.of_main(self.await_checkpoint)

    def await_files(self) -> None:
        """Wait until all workers have written their files of a checkpoint; collective."""
        with self._progress.lengthy():
            self.writers.wait_for_all(_POLL_S, self._look_while_waiting)

    def await_checkpoint(self) -> None:
        """Wait until this worker writes no checkpoint, after :meth:`await_files`."""
        self.await_files()
        with self._progress.lengthy():
            while not self._checkpoints.is_written(_POLL_S):
                self._look_while_waiting()
            self._checkpoints.wait()

    def _look_while_waiting(self) -> None:
        self.recorder.look_at_storage(waits=True)

    def choose_interval(self, samples_per_s: float) -> None:
        """Let worker 0 choose when to write checkpoints, at a log step."""
        ledger = self._ledger
        ledger.checkpoint_interval.choose(
            self._comm, samples_per_s, here.attempt, ledger.wall_time_s
        )

    def record_evaluation(self) -> None:
        """Record the last evaluation, if any."""
        if self._ledger.evaluated:
            self.recorder.evaluated(self._evaluations, *self._ledger.evaluated)

    def begin_epoch(
        self, agreement: Agreement, reason: str, logged: int, evaluated: Evaluated | None
    ) -> None:
        """Let worker 0 of a new epoch write what the last epoch has not.

        Args:
            agreement: of the workers.
            reason: why they have changed.
            logged: samples seen at the last row that this worker had logged in the last epoch.
            evaluated: the last evaluation that it had recorded.
        """
        if not agreement.has_writer:
            self._comm.of_main(lambda: self._write_from_now_on(agreement, reason))
        elif self._comm.is_main:
            self._write_what_others_have_done(logged, evaluated)
        self._is_abandoned |= self.writers.abandon()
        here.attempt, is_abandoned = self._comm.broadcast_object(
            [self.directory.attempt, self._is_abandoned]
        )
        if is_abandoned:
            self._committed = -1
        if is_abandoned or not agreement.is_written:
            self._commit_anew()
        elif self._ledger.evaluating is not None:  # perhaps the loss has prevented its checkpoint
            self.commit()
        self._is_abandoned = False  # now, since a further loss may have interrupted the above

    def record_change(self, change: Change) -> None:
        """Let all workers know the change as worker 0 has seen it, which records it."""
        self._ledger.changes.append(self._comm.broadcast_object(asdict(change)))
        if self._comm.is_main:
            self.recorder.changed(change)

    def _write_from_now_on(self, agreement: Agreement, reason: str) -> None:
        self._committed = -1  # what another worker has begun to write may be incomplete
        if self._recorder and self._recorder.active:  # since a change that was itself interrupted
            return
        places = [worker.place for worker in agreement.workers]
        hosts = [place["host"] for place in places]
        self.directory.start_attempt(hosts, self._state.samples_seen, reason, places)
        self._open_recorder()

    def _write_what_others_have_done(self, logged: int, evaluated: Evaluated | None) -> None:
        """Write what follows a step that worker 0 has not completed, but another one has."""
        for row in self._ledger.rows:
            if row["samples_seen"] > logged:
                self.recorder.log(row)
        if self._ledger.evaluated != evaluated:
            self.record_evaluation()

    def _commit_anew(self) -> None:
        """Write a checkpoint, unless worker 0 has begun to: the last one may be incomplete.

        In a run that may be rolled back it is complete, and another one would change where to.
        """
        ledger = self._ledger
        if ledger.evaluating is not None:
            ledger.evaluated_attempt = here.attempt
            self.commit()
        elif not self._config.health.may_roll_back:
            ledger.owes_checkpoint = ledger.settled < self._state.samples_seen
            if not ledger.owes_checkpoint:
                self.commit()

    def _open_recorder(self) -> None:
        ledger, may_change = self._ledger, isinstance(self._comm, Members)
        self._recorder = self._new_recorder(
            ledger.unwritten_metrics,
            # The metrics of an evaluation that is repeated are written again.
            resume_samples=self._state.samples_seen - (ledger.evaluating is not None),
            changes=[Change(**each) for each in ledger.changes] if may_change else None,
        )
        self.record_evaluation()

    def _save(self, *, must: bool) -> None:
        comm, tensors = self._comm, self._state.tensors()
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        files = layout_of_each(sizes, comm.world_size)
        if is_sharded(files):
            name = comm.broadcast_object(self._next(must=must))
        elif comm.is_main and self._committed != self._state.samples_seen:
            name = self._next(must=must)
        else:
            return
        if name:
            self.await_checkpoint()
            commit = self._committing(name) if comm.is_main else None
            with record_function("commit"):
                self.writers.save(name, tensors, files, commit)

    def _next(self, *, must: bool) -> str:
        """Return the name of the checkpoint to write now; "" on workers > 0, or if none is."""
        samples_seen = self._state.samples_seen
        is_new = self._comm.is_main and self._committed != samples_seen
        skips = not must and not self.writers.is_free()
        if skips and is_new and not self._skips:
            at = f"at {samples_seen:,} samples and until further notice"
            message = f"no checkpoint {at}: the previous one is still being written"
            self._emit("warning", {"message": message})
        self._skips = skips
        if skips or not is_new:
            return ""
        return self._checkpoints.next_name(samples_seen, self.directory.attempt)

    def _committing(self, name: str) -> Commit:
        """Return what completes a checkpoint of the present state, given its files' entries."""
        samples_seen = self._committed = self._state.samples_seen
        state = self._ledger.state() | {"attempt": self.directory.attempt}
        self.recorder.before_commit(state)
        since = self._ledger.checkpoint_interval.writes()

        def commit(entries: Mapping[str, Any]) -> None:
            written = self._checkpoints.commit(name, entries, state)
            written.add_done_callback(lambda _: self._written(written, samples_seen, since))

        return commit

    def _written(self, written: Future[None], samples_seen: int, since: float) -> None:
        if not self.background.failed and not written.exception():
            self._ledger.checkpoint_interval.written(since)
            self._progress.saved_samples = samples_seen
            self._emit("checkpoint", {"samples_seen": samples_seen})

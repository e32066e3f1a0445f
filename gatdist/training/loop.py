"""The training loop: steps, and when to log, evaluate, checkpoint, roll back and stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from torch.profiler import record_function

from gatdist.common.errors import TrainingError, is_lost_connection, summary
from gatdist.common.position import here
from gatdist.common.seeding import generators_kept
from gatdist.config import Config, import_plugins, require_deterministic_workspace
from gatdist.data.dataset import open_dataset
from gatdist.data.joined import open_loader
from gatdist.data.unpaired import orders_of
from gatdist.evaluation.validation import open_validation
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.members import Members
from gatdist.parallel.places import places
from gatdist.parallel.recording import cuda_recorder
from gatdist.runs import RunDirectory
from gatdist.storage import Store
from gatdist.training.averaged import Averaged
from gatdist.training.copies import Copies
from gatdist.training.epochs import Epochs
from gatdist.training.faults import attributed
from gatdist.training.graphs import StepGraphs
from gatdist.training.health import decide
from gatdist.training.ledger import Ledger
from gatdist.training.log_interval import LogInterval
from gatdist.training.profiling import Profiler
from gatdist.training.progress import Progress
from gatdist.training.recorder import Emit
from gatdist.training.run_files import RunFiles
from gatdist.training.state import TrainState
from gatdist.training.step import as_configured, to_device, train_step


@generators_kept()
def run(
    config: Config,
    comm: Communicator,
    run_dir: Store,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    emit: Emit = lambda kind, fields: None,
    progress: Progress | None = None,
    reason: str = "",
) -> dict[str, Any]:
    """Train until ``run.total_samples``, convergence, or a request to stop; resume if possible.

    If ``comm`` is a :class:`~gatdist.parallel.members.Members`, workers may leave and join. When
    one is lost, the others undo the step in progress and repeat it without it. A worker that joins
    gets the state of the others at the end of a step.

    Args:
        config: of the run.
        comm: the workers; every one of them calls this function.
        run_dir: the run directory.
        should_stop: true on any worker stops all of them after a checkpoint.
        emit: called on worker 0, whichever that is, with events for the user: a kind and JSON
            values.
        progress: updated with this worker's position.
        reason: for ``attempts.jsonl``: why the run is started; "": how it stood before.

    Returns:
        The outcome, identical on every rank: ``status`` ("finished", "converged" or "interrupted"),
        ``reason``, ``samples_seen``, and ``metrics`` of the last evaluation.

    Raises:
        UserError: the user can fix it.
        TrainingError: too many non-finite steps, or a state that is not finite.
        StaleAttemptError: another attempt has taken over the run.
        WorkerLostError: the workers hold different states.
        PluginError: a user's network, loss, update rule or plugin failed.
    """
    if config.run.reduction == "canonical":
        require_deterministic_workspace()
    try:
        with as_configured(config), places(comm, binds=config.cluster.bind_cpus) as workers:
            loop = _Loop(
                config, comm, run_dir, should_stop, emit, progress or Progress(), reason, workers
            )
            outcome = loop.ledger.outcome
            if loop.ledger.is_complete:
                if comm.is_main:
                    where = {"run_dir": run_dir.url, "tensorboard": config.monitor.tensorboard}
                    emit("done", outcome | where)
                return outcome
            return loop.run()
    except BaseException as error:
        shown = attributed(error, config, comm.device)
        if shown is error:
            raise
        raise shown from error


def _lost(error: RuntimeError) -> str:
    return f"lost connections ({summary(error)})"


class _Loop:
    """Decides what follows a step: :meth:`_train` makes steps, :meth:`_after_step` decides.

    What it decides is done by others: ``files`` write and read, ``averaged`` evaluates, ``epochs``
    changes the workers. Decisions are identical on all workers.

    Attributes:
        state: what steps change.
        ledger: what the run has done so far, and what it still owes.
        rolls_back: whether the run goes back to a checkpoint after this step.
        changes_members: whether the workers change after this step.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        run_dir: Store,
        should_stop: Callable[[], bool],
        emit: Emit,
        progress: Progress,
        reason: str,
        workers: list[dict[str, Any]],
    ) -> None:
        self.config, self.comm, self.should_stop = config, comm, should_stop
        self.emit: Emit = lambda kind, fields: emit(kind, fields) if comm.is_main else None
        self.progress = progress
        config.check_workers(comm.world_size)
        import_plugins(config.plugins)
        directory = RunDirectory(run_dir)
        if comm.is_main:
            directory.require_same(config)
        self.dataset = open_dataset(config.data, comm)
        self.orders = orders_of(config, self.dataset)
        as_read = self.dataset.sample_format
        self.to_device = partial(
            to_device, sample_format=as_read, config=config, copies=Copies(comm.device)
        )
        recorder = cuda_recorder(comm.device) if config.precision.cuda_graphs else None
        self.state = TrainState(
            config, comm, as_read.shape, as_read.num_classes, as_read.metadata, recorder
        )
        self.graphs = StepGraphs(recorder, progress.lengthy) if recorder else None
        self.rule = self.state.rule(config)
        self.ledger = Ledger(config, self.state, self.dataset, self.orders)
        self.interval = LogInterval(
            config, comm, self.state, self.ledger, self.rule, self.dataset, self.emit, progress
        )
        if config.precision.cuda_graphs and not recorder:
            self.interval.note(
                f"precision.cuda_graphs: steps are not recorded: {comm.device} has no CUDA graphs"
            )
        validation = open_validation(config, self.dataset, comm)
        has_inputs = self.state.game.task.has_inputs
        if has_inputs and validation is self.dataset:
            self.interval.note(
                "evaluation and previews use the training data: set data.held_out or evaluate.url"
            )
        data = self.dataset, validation
        self.averaged = Averaged(config, comm, self.state, *data)
        self.files = RunFiles(
            config, comm, directory, self.state, self.ledger, *data, self.emit, progress
        )
        self.rolls_back = False
        self.changes_members = False
        self.epochs: Epochs | None = None
        if isinstance(comm, Members):
            self.epochs = Epochs(comm, self.state, self.ledger, workers[comm.rank], progress)
        if self.epochs is None or self.epochs.is_whole:
            self.files.resume(workers, reason)

    def run(self) -> dict[str, Any]:
        """Train, with other workers after each loss, until the run is over; return the outcome."""
        config = self.config
        with ExitStack() as stack:
            stack.enter_context(closing(self.files))
            if self.epochs:
                if not self.epochs.is_whole:
                    self._change_members()
                self.epochs.writes = self.comm.is_main
            note = self._note if self.comm.is_main else self.interval.note
            self.profiler = Profiler(config, self.comm, self.interval.timer, note)
            self.files.open()
            stack.enter_context(closing(self.profiler))
            if config.precision.compile:
                stack.enter_context(self.progress.compiling())
            while True:
                try:
                    self.ledger.over = self.ledger.over or self._advance()
                    if self.ledger.over:
                        self._end(stack)
                        break
                except RuntimeError as error:
                    if self.epochs is None or not is_lost_connection(error):
                        raise
                    self._change_members(_lost(error))
        self.files.recorder.finish(self.ledger.outcome)
        return self.ledger.outcome

    def _advance(self) -> bool:
        """Make what is due next. Return whether the run is over."""
        is_first = not (self.state.samples_seen or self.state.rollbacks)
        if is_first and self.config.health.may_roll_back:
            self.files.commit()  # there must be something to go back to
        return (self.ledger.evaluating is not None and self._evaluate()) or self._train()

    def _train(self) -> bool:
        """Train until the run is over (return true) or has been rolled back (return false)."""
        self.loader = open_loader(
            self.dataset, self.orders, self.config, self.comm, position=self.state.samples_seen
        )
        with self.loader as batches:
            if not self.interval.is_uneven:
                self.interval.start()
            statistics, timer = self.interval.statistics, self.interval.timer
            # After a change of workers, what followed the last step may be still to be done.
            over = self.ledger.settled < self.state.samples_seen and self._settle()
            over = over or (not self.rolls_back and self._stops_between_epochs())
            while not (over or self.changes_members or self.rolls_back):
                if self.epochs:
                    self.epochs.step_start.begin()
                with self.profiler.step(self.ledger.steps_made):
                    with timer("data"):
                        batch = self.to_device(
                            next(batches), step=self.ledger.steps_made, noise=self.state.rollbacks
                        )
                    train_step(
                        self.state, self.rule, batch, self.config, statistics, timer, self.graphs
                    )
                    if self.epochs:
                        self.epochs.step_start.end()
                    self.interval.step()
                    here.step += 1
                    self.progress.step(self.state.samples_seen)
                    over = self._settle()
                if self.profiler.is_due(self.ledger.steps_made):
                    self._write_profile()
        if self.rolls_back:
            self._roll_back()
            return False
        if self.changes_members and not over:
            self._change_members()
        return over

    def _settle(self) -> bool:
        """Do what is due after a step, and note that it is done. Return whether the run is over."""
        over = self._after_step()
        if not self.rolls_back:  # else all is to be done again if a worker is lost before
            self.ledger.settled = self.state.samples_seen
            self.ledger.owes_checkpoint = False
        return over

    def _after_step(self) -> bool:
        """Log, evaluate and checkpoint when due. Return whether the run is over."""
        self.rolls_back = False
        self.files.recorder.look_at_storage()
        run, samples_seen = self.config.run, self.state.samples_seen
        finished = samples_seen >= run.total_samples
        stops = not finished and self._interrupted()
        over = finished or stops
        evaluates = bool(self.config.evaluate.metrics) and (
            finished or self._due(self.config.evaluate.every_samples)
        )
        status, reason = ("interrupted", "asked to stop") if stops else ("running", "")
        if finished:
            status, reason = "finished", self._all_seen
        if evaluates:
            status = "interrupted" if stops else "running"  # until it is evaluated
        self.ledger.stands(status, reason)
        is_log_step = finished or evaluates or self._due(self.config.log_every_samples)
        interval = self.ledger.checkpoint_interval
        chosen = interval.is_chosen
        commits = over or evaluates or self.ledger.owes_checkpoint
        commits = commits or (not chosen and self._due(interval.samples))
        if commits or is_log_step:
            self.averaged.recompute_statistics()
        if over or is_log_step:
            values = self.interval.summary(self.loader)
            if values:
                self._judge_health(values, decides=is_log_step)
                if self.rolls_back:
                    self.files.recorder.log(values)
                    return False
                if evaluates:
                    self.ledger.evaluating = values
                    self.ledger.evaluated_attempt = here.attempt
                    self.files.commit()
                    return stops or self._evaluate()
                self._log(values)
                if chosen and is_log_step:
                    self.files.choose_interval(values["throughput/samples_per_s"])
        if commits or (chosen and self._due(interval.samples)):
            self.files.commit(must=over or self.config.health.may_roll_back)
        return over

    def _due(self, interval: int) -> bool:
        """Return whether the last step reached a multiple of ``interval`` samples (0: never)."""
        seen = self.state.samples_seen
        return bool(interval) and seen // interval > (seen - self.config.step_samples) // interval

    def _interrupted(self) -> bool:
        """Return whether any worker was asked to stop; all learn it after the same step.

        They also learn whether the workers are to change after this step, and complete a checkpoint
        that all have written.
        """
        if self.ledger.steps_made % self.interval.steps_between_polls:
            return False
        is_due = isinstance(self.comm, Members) and self.comm.is_due()
        stops, self.changes_members, any_writes = self.comm.any_of(
            self.should_stop(), is_due, self.files.writers.is_writing
        )
        self.files.writers.complete(any_writes=any_writes)
        return stops

    def _stops_between_epochs(self) -> bool:
        """Return whether the workers of a new epoch, perhaps too few to train, are to stop."""
        if not self.epochs or not self.comm.any(self.should_stop()):
            return False
        self.ledger.stands("interrupted", "asked to stop")
        self.averaged.recompute_statistics()
        self.files.commit()
        return True

    def _judge_health(self, values: dict[str, Any], *, decides: bool) -> None:
        """Report skipped steps, and decide what follows unless the run is only interrupted.

        Raises:
            TrainingError: the run must stop.
        """
        counts = self.ledger.counts()
        values["health/skipped_steps"] = float(counts.nonfinite + counts.spikes)
        values["health/rollbacks"] = float(counts.rollbacks)
        if not decides:
            return
        decision = decide(self.config.health, counts, counts.since(self.ledger.counted))
        self.rolls_back = decision.action == "rollback"
        if not self.rolls_back:
            self.ledger.counted = counts
        if decision.action == "stop":
            raise TrainingError(decision.message)
        if decision.message and self.comm.is_main:
            self.emit("warning", {"message": decision.message})
        self.rule.reconsider()

    def _log(self, values: dict[str, Any]) -> None:
        """Log a row, unless that was done before a loss, and start the next log interval."""
        self.progress.enter("log")
        if values["samples_seen"] > self.ledger.logged:
            self.ledger.rows.append(values)
            with record_function("log"):
                self.files.recorder.log(values)
                self.profiler.retry()
        self.interval.start()

    def _evaluate(self) -> bool:
        """Evaluate the averaged generator on all workers. Return whether the run is over.

        Its checkpoint is complete: a run that ends here repeats the evaluation when it resumes.
        """
        values, samples_seen = self.ledger.evaluating, self.state.samples_seen
        assert values is not None
        self.files.await_checkpoint()
        self.progress.enter("evaluation")
        began = time.perf_counter()
        evaluation = self.averaged.evaluate()
        values |= {f"metric/{name}": value for name, value in evaluation.metrics.items()}
        values["protocol"] = evaluation.protocol
        values["time/evaluation_s"] = time.perf_counter() - began
        self.files.recorder.evaluation(evaluation.metrics, values["time/evaluation_s"])
        self._log(values)
        finished = samples_seen >= self.config.run.total_samples
        converged = self.ledger.convergence.update(samples_seen, evaluation.metrics)
        status, reason = ("converged", converged) if converged else ("running", "")
        if finished:
            status, reason = "finished", self._all_seen
        self.ledger.note_evaluation(evaluation.metrics, status, reason)
        self.files.record_evaluation()
        self.ledger.evaluating = None
        self.ledger.settled = samples_seen
        return status != "running"

    @property
    def _all_seen(self) -> str:
        return f"run.total_samples = {self.config.run.total_samples:,} reached"

    def _roll_back(self) -> None:
        """Return to the newest checkpoint, and continue from there with other noise."""
        rollbacks = self.state.rollbacks + 1
        self.files.await_files()
        if self.comm.is_main:
            self.files.background.wait()
        if self.epochs:
            self.epochs.step_start.begin(whole=True)  # a rollback that is interrupted is undone
        with self.progress.lengthy():
            self.files.load_newest()
        if self.epochs:
            self.epochs.step_start.end()
        self.rolls_back = False
        self.state.rollbacks = rollbacks
        self.ledger.counted = self.ledger.counts()
        self.interval.statistics.clear()
        self.files.recorder.rewind()
        if self.comm.is_main:
            self._note(
                f"back at {self.state.samples_seen:,} samples, with noise stream {rollbacks}"
            )

    def _change_members(self, reason: str = "") -> None:
        """Continue with other workers, from the last step that one of those that stay has made.

        Args:
            reason: why the last epoch ended, as far as this worker knows; "": by agreement at the
                end of a step. What the membership knows takes its place.

        Raises:
            RetryableError: this worker can't continue.
        """
        assert self.epochs is not None
        self.epochs.end()
        while True:
            try:
                self._begin_epoch(reason)
                return
            except RuntimeError as error:  # one more was lost meanwhile
                if not is_lost_connection(error):
                    raise
                reason = _lost(error)

    def _begin_epoch(self, reason: str) -> None:
        """Agree with the other workers on a state, and on who writes from now on."""
        assert self.epochs is not None
        transition = self.epochs.transition
        logged, evaluated = self.ledger.logged, self.ledger.evaluated
        agreement = self.epochs.begin()
        reason = transition.cause(reason)
        here.step = self.ledger.steps_made
        self.progress.begin_epoch()
        self.progress.step(self.state.samples_seen)
        self.changes_members = False
        self.interval.change_workers(transition.seconds)
        self.averaged.begin_epoch()
        if self.graphs:
            self.graphs.clear()
            self.state.reduction.comm.follow()
        if not agreement.is_written:
            self.averaged.recompute_statistics()  # for a checkpoint
        self.files.begin_epoch(agreement, reason, logged, evaluated)
        self.epochs.writes = self.comm.is_main
        self.files.record_change(
            transition.change(self.state.samples_seen, self.comm.world_size, reason)
        )

    def _write_profile(self) -> None:
        self.progress.enter("profile")
        with self.progress.lengthy():
            self.profiler.write(
                self.ledger.steps_made, self.files.directory.store, self.files.background
            )

    def _end(self, stack: ExitStack) -> None:
        """Write the last files, which other workers wait for: worker 0 may be lost meanwhile."""
        self._write_profile()
        self.progress.is_ending = True
        with self.progress.lengthy():
            self.files.await_files()
            if self.epochs:
                self.comm.of_main(stack.close)
            stack.close()

    def _note(self, message: str) -> None:
        self.emit("note", {"message": message})

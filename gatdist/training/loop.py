"""The training loop: steps, and when to log, evaluate, checkpoint, roll back and stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor
from torch.profiler import record_function

from gatdist.common.background import Background
from gatdist.common.errors import (
    ConfigError,
    DataError,
    GatdistError,
    Interruption,
    PluginError,
    TrainingError,
    is_lost_connection,
    summary,
)
from gatdist.common.numerics import nondeterministic_operator
from gatdist.common.position import here
from gatdist.common.registry import described, is_machines_fault, users_frame
from gatdist.common.seeding import generators_kept
from gatdist.config import BOTH, Config, import_plugins, require_deterministic_workspace
from gatdist.data.dataset import open_dataset
from gatdist.data.joined import open_loader
from gatdist.data.unpaired import orders_of, state_of
from gatdist.evaluation import Evaluator
from gatdist.evaluation.metrics import higher_is_better
from gatdist.evaluation.validation import open_validation
from gatdist.models import is_built_in
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.members import Members
from gatdist.parallel.places import places
from gatdist.parallel.recording import cuda_recorder
from gatdist.runs import (
    Change,
    Checkpoints,
    Evaluations,
    Mapped,
    Retention,
    RunDirectory,
    Sampler,
    require_same_order,
    require_saved_state,
)
from gatdist.storage import Store
from gatdist.training.batch_norm import recompute
from gatdist.training.checkpoint_interval import CheckpointInterval
from gatdist.training.copies import Copies
from gatdist.training.epochs import Agreement, Epochs, Transition
from gatdist.training.graphs import StepGraphs
from gatdist.training.health import Convergence, Counts, decide
from gatdist.training.integrity import Intact, require_equal_replicas
from gatdist.training.log_interval import LogInterval
from gatdist.training.profiling import Profiler
from gatdist.training.progress import Progress
from gatdist.training.recorder import Emit, Recorder
from gatdist.training.state import TrainState
from gatdist.training.step import as_configured, to_device, train_step

_POLL_S = 1.0  # of storage, while waiting for a checkpoint
# Of metrics, and of changes; another worker writes them if worker 0 is lost before it has.
_KEPT_ROWS = 64

Evaluated = list[dict[str, Any]]  # the state of a checkpoint and the outcome of its evaluation


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
        with (
            as_configured(config),
            places(comm, binds=config.cluster.bind_cpus) as workers,
        ):
            loop = _Loop(
                config, comm, run_dir, should_stop, emit, progress or Progress(), reason, workers
            )
            if loop.is_over():
                if comm.is_main:
                    where = {"run_dir": run_dir.url, "tensorboard": config.monitor.tensorboard}
                    emit("done", loop.outcome | where)
                return loop.outcome
            return loop.run()
    except BaseException as error:
        if operator := nondeterministic_operator(error):
            rule = f"needs deterministic operators; on {comm.device}, {operator} has no such kernel"
            hint = "Use another operator in your network, or run.reduction = 'fast'"
            raise ConfigError("run.reduction", rule, value="canonical", hint=hint) from error
        if isinstance(error, (GatdistError, KeyboardInterrupt, Interruption)):
            raise
        is_users = users_frame(error, config.plugins) is not None
        if is_machines_fault(error) or not (is_users or _has_user_code(config)):
            raise
        rule = f"failed during the run ({described(error)})"
        if not is_users:
            rule += ", perhaps by a value that a network, loss or rule returned"
        hint = "gatdist train --local --debug prints the whole traceback"
        raise PluginError("user code", rule, hint=hint) from error


def _lost(error: RuntimeError) -> str:
    return f"lost connections ({summary(error)})"


def _has_user_code(config: Config) -> bool:
    return bool(config.plugins) or not all(is_built_in(config, player) for player in BOTH)


class _Loop:
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
        self.progress, self.reason, self.workers = progress, reason, workers
        config.check_workers(comm.world_size)
        import_plugins(config.plugins)
        self.directory = RunDirectory(run_dir)
        if comm.is_main:
            self.directory.require_same(config)
        self.dataset = open_dataset(config.data, comm)
        self.orders = orders_of(config, self.dataset)
        sample_format = self.dataset.sample_format
        self.to_device = partial(
            to_device, sample_format=sample_format, config=config, copies=Copies(comm.device)
        )
        recorder = cuda_recorder(comm.device) if config.precision.cuda_graphs else None
        self.state = TrainState(
            config,
            comm,
            sample_format.shape,
            sample_format.num_classes,
            sample_format.metadata,
            recorder,
        )
        self.graphs = StepGraphs(recorder, progress.lengthy) if recorder else None
        self.rule = self.state.rule(config)
        self.intact = Intact(self.state)
        higher = higher_is_better(config.run)
        self.convergence = Convergence(
            config.run.convergence, higher_is_better=higher.get("run.convergence.metric", False)
        )
        self.interval = LogInterval(
            config, comm, self.state, self.rule, self.dataset, self.emit, progress
        )
        if config.precision.cuda_graphs and not recorder:
            self.interval.note(
                f"precision.cuda_graphs: steps are not recorded: {comm.device} has no CUDA graphs"
            )
        self.validation = open_validation(config, self.dataset, comm)
        has_inputs = self.state.game.task.has_inputs
        if has_inputs and self.validation is self.dataset:
            self.interval.note(
                "evaluation and previews use the training data: set data.held_out or evaluate.url"
            )
        self.evaluator = self._new_evaluator()
        self.outcome: dict[str, Any] = {
            "status": "new",
            "reason": "",
            "samples_seen": 0,
            "metrics": {},
        }
        self.counted = self._counts()
        self.rolls_back = False
        self.changes_members = False
        self.over = False
        self.checkpoint_interval = CheckpointInterval(config.run)
        self.owes_checkpoint = False  # whether one is due after this step, whatever the interval
        self._recorder: Recorder | None = None
        self.epochs: Epochs | None = None
        if isinstance(comm, Members):
            self.epochs = Epochs(comm, self.state, workers[comm.rank], progress)
        self.settled = 0  # samples seen by the last step that was logged and so on, if that was due
        self.rows = deque[dict[str, Any]](maxlen=_KEPT_ROWS)
        self.changes = deque[dict[str, Any]](maxlen=_KEPT_ROWS)
        self.committed = -1  # samples seen by the last checkpoint that worker 0 has begun to write
        self.background = Background("run-directory")
        self.skips, self.unwritten_metrics = False, list[dict[str, Any]]()
        self.evaluations = Evaluations(run_dir)
        # Values of the log interval whose evaluation is still to be done.
        self.evaluating: dict[str, Any] | None = None
        self.evaluated_attempt = 0  # wrote the checkpoint to evaluate
        # The last evaluated checkpoint and the outcome, which worker 0 may not live to write.
        self.evaluated: Evaluated | None = None
        self.checkpoints = Checkpoints(
            run_dir.child("checkpoints"),
            Retention.from_config(
                config.run, higher_is_better=higher.get("run.best_metric", False)
            ),
            may_commit=self.directory.require_current,
            background=self.background,
            on_commit=self.directory.note_commit,
            on_warning=lambda message: self.emit("warning", {"message": message}),
            measured=self.evaluations.metrics,
        )
        if self.epochs is None or self.epochs.is_whole:
            self._resume()

    def _new_evaluator(self) -> Evaluator:
        config = self.config
        return Evaluator(
            config.evaluate,
            self.validation,
            self.comm,
            self.comm.device,
            conditional=config.model.conditional,
            exact=config.run.reduction == "canonical",
            at_once=config.at_once(self.comm.world_size, self.comm.device.type),
            training=self.dataset,
            has_pairs=self.state.game.task.has_inputs,
        )

    def is_over(self) -> bool:
        """Return whether the checkpoint that was found is the end of the run."""
        if self.outcome["status"] == "converged" and self.config.run.convergence:
            return True
        all_seen = self.state.samples_seen >= self.config.run.total_samples
        return self.outcome["status"] == "finished" and all_seen

    def run(self) -> dict[str, Any]:
        config = self.config
        with ExitStack() as stack:
            stack.enter_context(closing(self.background))
            stack.callback(self._close_recorder)
            if self.epochs:
                if not self.epochs.is_whole:
                    self._change_members()
                self.epochs.writes = self.comm.is_main
            note = self._note if self.comm.is_main else self.interval.note
            self.profiler = Profiler(config, self.comm, self.interval.timer, note)
            if not self._recorder:
                self._open_recorder()
            stack.enter_context(closing(self.profiler))
            if config.precision.compile:
                stack.enter_context(self.progress.compiling())
            while True:
                try:
                    self.over = self.over or self._advance()
                    if self.over:
                        self._end(stack)
                        break
                except RuntimeError as error:
                    if self.epochs is None or not is_lost_connection(error):
                        raise
                    self._change_members(_lost(error))
        self.recorder.finish(self.outcome)
        return self.outcome

    def _advance(self) -> bool:
        """Make what is due next. Return whether the run is over."""
        if self.config.health.may_roll_back and not (
            self.state.samples_seen or self.state.rollbacks
        ):
            self._commit()  # there must be something to go back to
        return (self.evaluating is not None and self._evaluate()) or self._train()

    def _end(self, stack: ExitStack) -> None:
        """Write the last files, which other workers wait for: worker 0 may be lost meanwhile."""
        self._write_profile()
        self.progress.is_ending = True
        with self.progress.lengthy():
            if self.epochs:
                self.comm.of_main(stack.close)
            stack.close()

    @property
    def recorder(self) -> Recorder:
        assert self._recorder
        return self._recorder

    def _open_recorder(self) -> None:
        self._recorder = Recorder(
            self.config,
            self.comm,
            self.directory,
            self.dataset,
            self.validation,
            self.state,
            self.emit,
            self.background,
            self.unwritten_metrics,
            # The metrics of an evaluation that is repeated are written again.
            resume_samples=self.state.samples_seen - (self.evaluating is not None),
            changes=[Change(**each) for each in self.changes] if self.epochs else None,
        )
        if self.evaluated:
            self._recorder.evaluated(self.evaluations, *self.evaluated)

    def _close_recorder(self) -> None:
        if self._recorder:
            self._recorder.close()

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
            over = self.settled < self.state.samples_seen and self._settle()
            over = over or self._stops_between_epochs()
            while not over and not self.changes_members:
                if self.epochs:
                    self.epochs.step_start.begin()
                with self.profiler.step(self._steps_made):
                    with timer("data"):
                        batch = self.to_device(
                            next(batches), step=self._steps_made, noise=self.state.rollbacks
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
                if self.profiler.is_due(self._steps_made):
                    self._write_profile()
                if self.rolls_back:
                    self._roll_back()
                    return False
        if self.changes_members and not over:
            self._change_members()
        return over

    def _stops_between_epochs(self) -> bool:
        """Return whether the workers of a new epoch, perhaps too few to train, are to stop."""
        if not self.epochs or not self.comm.any(self.should_stop()):
            return False
        seen = self.state.samples_seen
        self.outcome |= {"status": "interrupted", "reason": "asked to stop", "samples_seen": seen}
        self._commit()
        return True

    @property
    def _steps_made(self) -> int:
        return self.state.samples_seen // self.config.step_samples

    def _write_profile(self) -> None:
        self.progress.enter("profile")
        with self.progress.lengthy():
            self.profiler.write(self._steps_made, self.directory.store, self.background)

    def _note(self, message: str) -> None:
        self.emit("note", {"message": message})

    def _settle(self) -> bool:
        over = self._after_step()
        if not self.rolls_back:  # else all is to be done again if a worker is lost before
            self.settled = self.state.samples_seen
            self.owes_checkpoint = False
        return over

    def _after_step(self) -> bool:
        """Log, evaluate and checkpoint when due. Return whether the run is over."""
        self.rolls_back = False
        self.recorder.look_at_storage()
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
        self.outcome |= {"status": status, "reason": reason, "samples_seen": samples_seen}
        is_log_step = finished or evaluates or self._due(run.log_every_samples)
        chosen = self.checkpoint_interval.is_chosen
        commits = over or evaluates or self.owes_checkpoint
        commits = commits or (not chosen and self._due(self.checkpoint_interval.samples))
        if (commits or is_log_step) and self.config.game.ema_batch_norm == "recomputed":
            self._recompute_statistics()
        if over or is_log_step:
            values = self.interval.summary(self.loader)
            if values:
                self._judge_health(values, decides=is_log_step)
                if self.rolls_back:
                    self.recorder.log(values)
                    return False
                if evaluates:
                    self.evaluating = values
                    self.evaluated_attempt = here.attempt
                    self._commit()
                    return stops or self._evaluate()
                self._log(values)
                if chosen and is_log_step:
                    self._choose_checkpoint_interval(values["throughput/samples_per_s"])
        if commits or (chosen and self._due(self.checkpoint_interval.samples)):
            self._commit(must=over or self.config.health.may_roll_back)
        return over

    def _recompute_statistics(self) -> None:
        self.progress.enter("batch_norm")
        sampler = self._average_sampler("batch_norm")
        assert isinstance(sampler, Sampler)
        recompute(sampler, self.config.generator_batch, self.comm)

    @property
    def _all_seen(self) -> str:
        return f"run.total_samples = {self.config.run.total_samples:,} reached"

    def _log(self, values: dict[str, Any]) -> None:
        self.progress.enter("log")
        if values["samples_seen"] > self._logged:  # else before another worker was lost
            self.rows.append(values)
            with record_function("log"):
                self.recorder.log(values)
                self.profiler.retry()
        self.interval.start()

    @property
    def _logged(self) -> int:
        """Samples seen at the last row of metrics."""
        return self.rows[-1]["samples_seen"] if self.rows else -1

    def _due(self, interval: int) -> bool:
        """Return whether the last step reached a multiple of ``interval`` samples (0: never)."""
        seen = self.state.samples_seen
        return bool(interval) and seen // interval > (seen - self.config.step_samples) // interval

    def _choose_checkpoint_interval(self, samples_per_s: float) -> None:
        trained_s = self.interval.wall_time_s
        self.checkpoint_interval.choose(self.comm, samples_per_s, here.attempt, trained_s)

    def _interrupted(self) -> bool:
        """Return whether any worker was asked to stop; all learn it after the same step.

        They also learn whether the workers are to change after this step.
        """
        if self._steps_made % self.interval.steps_between_polls:
            return False
        is_due = isinstance(self.comm, Members) and self.comm.is_due()
        stops, self.changes_members = self.comm.any_of(self.should_stop(), is_due)
        return stops

    def _judge_health(self, values: dict[str, Any], *, decides: bool) -> None:
        """Report skipped steps, and decide what follows unless the run is only interrupted.

        Raises:
            TrainingError: the run must stop.
        """
        counts = self._counts()
        values["health/skipped_steps"] = float(counts.nonfinite + counts.spikes)
        values["health/rollbacks"] = float(counts.rollbacks)
        if not decides:
            return
        decision = decide(self.config.health, counts, counts.since(self.counted))
        self.rolls_back = decision.action == "rollback"
        if not self.rolls_back:
            self.counted = counts
        if decision.action == "stop":
            raise TrainingError(decision.message)
        if decision.message and self.comm.is_main:
            self.emit("warning", {"message": decision.message})
        self.rule.reconsider()

    def _counts(self) -> Counts:
        guard = self.state.guard.tensors
        return Counts(int(guard["nonfinite"]), int(guard["spikes"]), self.state.rollbacks)

    def _evaluate(self) -> bool:
        """Evaluate the averaged generator on all workers. Return whether the run is over.

        Its checkpoint is complete: a run that ends here repeats the evaluation when it resumes.
        """
        values, samples_seen = self.evaluating, self.state.samples_seen
        assert values is not None
        self._await_checkpoint()
        self.progress.enter("evaluation")
        began = time.perf_counter()
        discriminator = self.state.players["discriminator"].bare
        with record_function("evaluation"):
            evaluation = self.evaluator(self._average_sampler("evaluation"), discriminator)
        values |= {f"metric/{name}": value for name, value in evaluation.metrics.items()}
        values["protocol"] = evaluation.protocol
        values["time/evaluation_s"] = time.perf_counter() - began
        self.recorder.evaluation(evaluation.metrics, values["time/evaluation_s"])
        self._log(values)
        finished = samples_seen >= self.config.run.total_samples
        converged = self.convergence.update(samples_seen, evaluation.metrics)
        status, reason = ("converged", converged) if converged else ("running", "")
        if finished:
            status, reason = "finished", self._all_seen
        self.outcome |= {"status": status, "reason": reason, "metrics": evaluation.metrics}
        of = {
            "samples_seen": samples_seen,
            "attempt": self.evaluated_attempt,
            "rollbacks": self.state.rollbacks,
        }
        self.evaluated = [of, self.outcome | {"convergence": self.convergence.state()}]
        self.recorder.evaluated(self.evaluations, *self.evaluated)
        self.evaluating = None
        self.settled = samples_seen
        return status != "running"

    def _average_sampler(self, stream: str) -> Sampler | Mapped:
        network, classes = self.state.average.network, self.dataset.num_classes
        task = self.state.game.task
        at_once = self.config.at_once(self.comm.world_size, self.comm.device.type)
        if task.has_inputs:
            return Mapped(self.config, task, network, self.validation, stream, at_once)
        return Sampler.from_config(self.config, network, classes, stream, at_once=at_once)

    def _commit(self, *, must: bool = True) -> None:
        """Pass the state to the background writer (worker 0).

        If the previous checkpoint is still being written, this one is skipped unless ``must``.

        Raises:
            PluginError: user code has made the state unfit to resume from.
            TrainingError: it is no longer finite.
            WorkerLostError: the workers hold different states.
        """
        self.progress.enter("commit")
        with self.checkpoint_interval.stop():
            self.intact.require()
            require_equal_replicas(self.state.tensors(), self.comm)
            if self.comm.is_main and self.committed != self.state.samples_seen:
                self._save(must=must)
        if self.epochs and self.config.health.may_roll_back:
            # All go back to it, whoever is lost before.
            with self.progress.lengthy():
                self.comm.of_main(self._await_checkpoint)

    def _save(self, *, must: bool) -> None:
        if not must and not self.checkpoints.is_free():
            if not self.skips:
                at = f"at {self.state.samples_seen:,} samples and until further notice"
                message = f"no checkpoint {at}: the previous one is still being written"
                self.emit("warning", {"message": message})
            self.skips = True
            return
        self.skips = False
        samples_seen = self.state.samples_seen
        self._await_checkpoint()
        state = self._checkpoint_state()
        self.committed = samples_seen
        self.recorder.before_commit(state)
        since = self.checkpoint_interval.writes()
        with record_function("commit"):
            written = self.checkpoints.save(
                samples_seen,
                self.state.tensors(),
                state,
                attempt=self.directory.attempt,
            )
        written.add_done_callback(lambda _: self._committed(written, samples_seen, since))

    def _await_checkpoint(self) -> None:
        """Wait until no checkpoint is being written; warn if that takes long."""
        with self.progress.lengthy():
            while not self.checkpoints.is_written(_POLL_S):
                self.recorder.look_at_storage(waits=True)
            self.checkpoints.wait()

    def _committed(self, written: Future[None], samples_seen: int, since: float) -> None:
        if not self.background.failed and not written.exception():
            self.checkpoint_interval.written(since)
            self.progress.saved_samples = samples_seen
            self.emit("checkpoint", {"samples_seen": samples_seen})

    def _checkpoint_state(self) -> dict[str, Any]:
        return self.outcome | {
            "version": 2,
            "samples_seen": self.state.samples_seen,  # the outcome may be that of the step before
            "attempt": self.directory.attempt,
            "evaluating": self.evaluating,
            "config_digest": self.config.digest(),
            "samples": self.dataset.spec.model_dump(mode="json"),
            "order": state_of(self.orders),
            "wall_time_s": self.interval.wall_time_s,
            "convergence": self.convergence.state(),
            "rollbacks": self.state.rollbacks,
            "counted": asdict(self.counted),
            "checkpoint_every_samples": self.checkpoint_interval.samples,
        }

    def _roll_back(self) -> None:
        """Return to the newest checkpoint, and continue from there with other noise."""
        rollbacks = self.state.rollbacks + 1
        if self.comm.is_main:
            self.background.wait()
        if self.epochs:
            self.epochs.step_start.begin()  # a rollback that is interrupted is undone
        with self.progress.lengthy():
            self._load_newest()
        if self.epochs:
            self.epochs.step_start.end()
        self.state.rollbacks = rollbacks
        self.counted = self._counts()
        self.interval.statistics.clear()
        self.recorder.rewind()
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
        assert self.epochs is not None
        agreement = self.epochs.begin(
            self.settled,
            lambda: (
                self._checkpoint_state()
                | {
                    "unwritten_metrics": [*self.rows],
                    "evaluated": self.evaluated,
                    "over": self.over,
                    "changes": [*self.changes],
                }
            ),
            self._require_same_data,
        )
        transition = self.epochs.transition
        reason = transition.cause(reason)
        logged, evaluated = self._logged, self.evaluated
        self._take_over(agreement.state)
        self.evaluated, self.over = agreement.state["evaluated"], agreement.state["over"]
        self.settled = agreement.settled
        self.changes.clear()
        self.changes.extend(agreement.state["changes"])
        here.step = self._steps_made
        self.progress.step(self.state.samples_seen)
        self.changes_members = False
        self.interval.change_workers(transition.seconds)
        self.evaluator = self._new_evaluator()  # what it has prepared, a worker that joins has not
        if self.graphs:
            self.graphs.clear()
            self.state.reduction.comm.follow()
        if not agreement.has_writer:
            self.comm.of_main(lambda: self._write_from_now_on(agreement, reason))
        elif self.comm.is_main:
            self._write_what_others_have_done(logged, evaluated)
        here.attempt = self.comm.broadcast_object(self.directory.attempt)
        if not agreement.is_written:
            self._write_checkpoint_anew()
        self.epochs.writes = self.comm.is_main
        self._record_change(transition, reason)

    def _record_change(self, transition: Transition, reason: str) -> None:
        """Let all workers know the change as worker 0 has seen it, which records it."""
        change = Change(
            attempt=here.attempt,
            samples_seen=self.state.samples_seen,
            before=transition.before,
            workers=self.comm.world_size,
            steps_undone=transition.steps_undone,
            seconds=round(transition.seconds, 3),
            lost_s=round(transition.lost_s, 3),
            reason=reason,
        )
        self.changes.append(self.comm.broadcast_object(asdict(change)))
        if self.comm.is_main:
            self.recorder.changed(change)

    def _require_same_data(self, state: dict[str, Any]) -> None:
        mine, others = state_of(self.orders), state["order"]
        for key in sorted(others):
            if mine.get(key) != others[key]:
                rule = f"differs from that of the other workers ({others[key]!r})"
                hint = "Give all hosts the same data"
                raise DataError(f"data.url: {key}", rule, value=mine.get(key), hint=hint)

    def _write_checkpoint_anew(self) -> None:
        """Write a checkpoint, since the last one may be incomplete.

        In a run that may be rolled back it is complete, and another one would change where to.
        """
        self.committed = -1
        if self.evaluating is not None:
            self.evaluated_attempt = here.attempt
            self._commit()
        elif not self.config.health.may_roll_back:
            self.owes_checkpoint = self.settled < self.state.samples_seen
            if not self.owes_checkpoint:
                self._commit()

    def _write_from_now_on(self, agreement: Agreement, reason: str) -> None:
        if self._recorder and self._recorder.active:  # since a change that was itself interrupted
            return
        places = [worker.place for worker in agreement.workers]
        hosts = [place["host"] for place in places]
        self.directory.start_attempt(hosts, self.state.samples_seen, reason, places)
        self._open_recorder()

    def _write_what_others_have_done(self, logged: int, evaluated: Evaluated | None) -> None:
        """Write what follows a step that worker 0 has not completed, but another one has."""
        for row in self.rows:
            if row["samples_seen"] > logged:
                self.recorder.log(row)
        if self.evaluated and self.evaluated != evaluated:
            self.recorder.evaluated(self.evaluations, *self.evaluated)

    def _load_newest(self) -> bool:
        """Restore the newest complete checkpoint on every worker; return false without one.

        Worker 0 reads and verifies it, and sends it to the others.
        """
        tensors: dict[str, Tensor] = {}

        def read() -> dict[str, Any] | None:
            checkpoint = self.checkpoints.newest()
            if checkpoint is None:
                self.directory.require_fresh()
                return None
            url = self.directory.store.url
            saved = self.evaluations.complete(checkpoint.state)
            subject = f"{url}: {checkpoint.name}/state.json"
            require_saved_state(saved, subject, checkpoint.named_samples)
            require_same_order(saved["order"], state_of(self.orders), url)
            tensors.update(checkpoint.tensors)
            return saved | {"name": checkpoint.name}

        saved = self.comm.of_main(read)
        if saved is None:
            return False
        subject = f"{self.directory.store.url}: {saved['name']}"
        self.state.load(saved["samples_seen"], tensors, subject)
        self._take_over(saved)
        self.evaluated_attempt = saved["attempt"]
        here.step = self._steps_made
        self.progress.start(self.state.samples_seen)
        self.settled, self.committed = self.state.samples_seen, -1
        return True

    def _take_over(self, saved: dict[str, Any]) -> None:
        """Restore what :meth:`_checkpoint_state` has returned, beside the tensors."""
        self.state.samples_seen = saved["samples_seen"]
        self.state.rollbacks = saved["rollbacks"]
        self.counted = Counts(**saved["counted"])
        self.evaluating = saved["evaluating"]
        self.outcome = {key: saved[key] for key in self.outcome}
        self.checkpoint_interval.take_over(saved.get("checkpoint_every_samples"))
        self.convergence.load(saved["convergence"])
        self.interval.wall_time_s = saved["wall_time_s"]
        self.unwritten_metrics = saved.get("unwritten_metrics", [])
        self.rows = deque(self.unwritten_metrics, maxlen=_KEPT_ROWS)

    def _resume(self) -> None:
        """Restore the newest complete checkpoint if there is one, and number this attempt."""
        here.step = 0
        self.progress.start(0)
        resumes = self._load_newest()
        if not resumes:
            self.state.start_from_another_run(self.config, self.directory.store.origin)
        if self.is_over():
            return
        if self.comm.is_main:
            resumed_from = self.state.samples_seen if resumes else None
            reason = self.reason or self.outcome["status"]
            self.checkpoints.require_room(self.state.tensors())
            # Last: a configuration that can't train must not occupy the folder.
            self.directory.claim(self.config)
            hosts = [worker["host"] for worker in self.workers]
            self.directory.start_attempt(hosts, resumed_from, reason, self.workers)
        here.rank = self.comm.rank
        here.attempt = self.comm.broadcast_object(self.directory.attempt)

"""What all workers do together with the averaged generator, the one that a run is for."""

from __future__ import annotations

from torch.profiler import record_function

from gatdist.config import Config
from gatdist.data.dataset import Dataset
from gatdist.evaluation import Evaluation, Evaluator
from gatdist.parallel.communicator import Communicator
from gatdist.runs import Mapped, Sampler
from gatdist.training.batch_norm import recompute
from gatdist.training.state import TrainState


class Averaged:
    """Evaluates the averaged generator, and recomputes its batch-norm statistics.

    Args:
        config: of the run.
        comm: the workers.
        state: of the run.
        dataset: that the run trains on.
        validation: that it is compared with.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        state: TrainState,
        dataset: Dataset,
        validation: Dataset,
    ) -> None:
        self._config, self._comm, self._state = config, comm, state
        self._dataset, self._validation = dataset, validation
        self._evaluator = self._new_evaluator()

    def begin_epoch(self) -> None:
        """Forget what the workers have prepared together: one that joins has not."""
        self._evaluator = self._new_evaluator()

    def evaluate(self) -> Evaluation:
        """Measure ``evaluate.metrics``."""
        discriminator = self._state.players["discriminator"].bare
        with record_function("evaluation"):
            return self._evaluator(self._sampler("evaluation"), discriminator)

    def recompute_statistics(self) -> None:
        """Recompute the statistics of its batch-norm layers, if ``game.ema_batch_norm`` says so."""
        if self._config.game.ema_batch_norm != "recomputed":
            return
        sampler = self._sampler("batch_norm")
        assert isinstance(sampler, Sampler)
        recompute(sampler, self._config.generator_batch, self._comm)

    def _new_evaluator(self) -> Evaluator:
        config = self._config
        return Evaluator(
            config.evaluate,
            self._validation,
            self._comm,
            self._comm.device,
            conditional=config.model.conditional,
            exact=config.run.reduction == "canonical",
            at_once=config.at_once(self._comm.world_size, self._comm.device.type),
            training=self._dataset,
            has_pairs=self._state.game.task.has_inputs,
        )

    def _sampler(self, stream: str) -> Sampler | Mapped:
        network, classes = self._state.average.network, self._dataset.num_classes
        task = self._state.game.task
        at_once = self._config.at_once(self._comm.world_size, self._comm.device.type)
        if task.has_inputs:
            return Mapped(self._config, task, network, self._validation, stream, at_once)
        return Sampler.from_config(self._config, network, classes, stream, at_once=at_once)

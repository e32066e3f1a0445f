"""What a generator makes of the samples of a data set."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gatdist.config import Config
from gatdist.data.dataset import Dataset
from gatdist.game.tasks import Draws, Fields, Record, Task
from gatdist.models import DTYPES
from gatdist.models.buffers import buffers_kept
from gatdist.models.layers import latents_from
from gatdist.parallel import draws

_MAX_VALUES = 2**20  # that are generated at once


class Mapped:
    """Outputs for the samples of a data set by number; latents and noise by position.

    Args:
        config: Of the run.
        task: Of the run.
        network: The generator, on its device.
        dataset: With the fields that the task needs.
        stream: Name of the draws.
        at_once: Samples that the network is called with, at most; see
            :meth:`~gatdist.config.Config.at_once`.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        network: nn.Module,
        dataset: Dataset,
        stream: str,
        at_once: int | None = None,
    ) -> None:
        self.task, self.network, self.dataset = task, network, dataset
        self._dtype = DTYPES[config.precision.dtype]
        self._seed, self._stream, self._model = config.run.seed, stream, config.model
        fitting = max(1, _MAX_VALUES // math.prod(dataset.sample_format.shape))
        self._at_once = min(fitting, at_once or fitting)

    def fields(self, positions: Tensor) -> Fields:
        """Return the fields of samples int64 [n], [n, …] each, on the network's device."""
        samples, _ = self.dataset.read((positions % self.dataset.num_samples).cpu().numpy())
        device = next(self.network.parameters()).device
        read = torch.from_numpy(samples).to(device)
        form = self.dataset.sample_format
        found = {self.task.target: form.to_network(read), **form.inputs(read)}
        drawn = Draws(self._seed, f"/{self._stream}", positions, is_training=False)
        with torch.no_grad():
            given = Record({name: field.to(self._dtype) for name, field in found.items()})
            return Record(self.task.prepare(given, drawn))

    def labels(self, positions: Tensor) -> Tensor | None:
        """Return the classes of samples, int64 [n]; None unless the run is class-conditional."""
        if not self._model.conditional:
            return None
        _, labels = self.dataset.read((positions % self.dataset.num_samples).cpu().numpy())
        return None if labels is None else torch.from_numpy(labels).to(positions.device)

    @torch.no_grad()
    def of_fields(self, fields: Fields, positions: Tensor) -> Tensor:
        """Return the generated field."""
        arguments, labels, made = self.task.inputs(fields), self.labels(positions), []
        for start in range(0, len(positions), self._at_once):
            rows = slice(start, start + self._at_once)
            given = tuple(each[rows] for each in arguments)
            classes = None if labels is None else labels[rows]
            made.append(self._call(given, classes, positions[rows]))
        return torch.cat(made)

    def _call(
        self, arguments: tuple[Tensor, ...], labels: Tensor | None, positions: Tensor
    ) -> Tensor:
        key = self._seed, self._stream, positions
        if self.task.takes_latents:
            drawn = draws.normal(*key, (self._model.latent_size,), self._dtype)
            arguments = latents_from(drawn, self._model.latent_distribution), *arguments
        noise = draws.of_network(self.network, *key, self._dtype)
        with buffers_kept(self.network):
            output = self.network(*arguments, labels, *noise)
        made: Tensor = output[self.task.target] if isinstance(output, dict) else output
        return made

    def __call__(self, positions: Tensor) -> Tensor:
        return self.of_fields(self.fields(positions), positions)

    def targets(self, positions: Tensor) -> Tensor:
        """Return what should be generated, [n, …]."""
        return self.fields(positions)[self.task.target]

    def pairs(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and targets, [n, …] both."""
        fields = self.fields(positions)
        return self.of_fields(fields, positions), fields[self.task.target]

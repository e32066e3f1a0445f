"""What a generator makes of the samples of a data set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatdist.config import Config
from gatdist.data.dataset import Dataset
from gatdist.game.tasks import Draws, Fields, Task
from gatdist.models import DTYPES
from gatdist.models.buffers import buffers_kept
from gatdist.parallel import draws


class Mapped:
    """Outputs for the samples of a data set by number; latents and noise by position.

    Args:
        config: Of the run.
        task: Of the run.
        network: The generator, on its device.
        dataset: With the fields that the task needs.
        stream: Name of the draws.
    """

    def __init__(
        self, config: Config, task: Task, network: nn.Module, dataset: Dataset, stream: str
    ) -> None:
        self.task, self.network, self.dataset = task, network, dataset
        self._dtype = DTYPES[config.precision.dtype]
        self._seed, self._stream = config.run.seed, stream

    def fields(self, positions: Tensor) -> Fields:
        """Return the fields of samples int64 [n], [n, …] each, on the network's device."""
        samples, _ = self.dataset.read((positions % self.dataset.num_samples).cpu().numpy())
        device = next(self.network.parameters()).device
        read = torch.from_numpy(samples).to(device)
        form = self.dataset.sample_format
        found = {self.task.target: form.to_network(read), **form.inputs(read)}
        drawn = Draws(self._seed, f"/{self._stream}", positions, is_training=False)
        with torch.no_grad():
            return self.task.prepare({k: t.to(self._dtype) for k, t in found.items()}, drawn)

    @torch.no_grad()
    def of_fields(self, fields: Fields, positions: Tensor) -> Tensor:
        """Return the generated field."""
        noise = draws.of_network(self.network, self._seed, self._stream, positions, self._dtype)
        with buffers_kept(self.network):
            output = self.network(*self.task.inputs(fields), None, *noise)
        made: Tensor = output[self.task.target] if isinstance(output, dict) else output
        return made

    def __call__(self, positions: Tensor) -> Tensor:
        return self.of_fields(self.fields(positions), positions)

"""What the loader gives, as the networks want it."""

from __future__ import annotations

import torch

from gatdist.config import Config
from gatdist.data import Batch as LoadedBatch
from gatdist.data.sample_format import SampleFormat
from gatdist.models import DTYPES
from gatdist.parallel.batch import Batch


def to_device(
    loaded: LoadedBatch,
    sample_format: SampleFormat,
    config: Config,
    device: torch.device,
    *,
    step: int,
    noise: int,
) -> Batch:
    """A batch on its way to the device: the host does not wait for it.

    Args:
        loaded: this worker's share of a step's samples.
        sample_format: what they are.
        config: says in which dtype and layout networks want them.
        device: where these compute.
        step: index of the step.
        noise: number of the noise stream.
    """
    real = sample_format.to_network(loaded.samples.to(device, non_blocking=True))
    images = config.precision.channels_last and real.dim() == 4
    layout = torch.channels_last if images else torch.contiguous_format
    labels = loaded.labels if config.model.conditional else None
    return Batch(
        real=real.to(DTYPES[config.precision.dtype]).contiguous(memory_format=layout),
        labels=None if labels is None else labels.to(device, non_blocking=True),
        positions=loaded.positions.to(device, non_blocking=True),
        step=step,
        noise=noise,
        host_positions=loaded.positions if device.type != "cpu" else None,
    )

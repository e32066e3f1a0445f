"""Fakes from a trained generator, as a pure function of their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatdist.config import Config, import_plugins
from gatdist.errors import CheckpointError
from gatdist.models import build_networks
from gatdist.parallel import draws
from gatdist.runs.checkpoint import Checkpoint
from gatdist.runs.checkpoints import Checkpoints
from gatdist.runs.directory import read_config
from gatdist.storage import Store


class Sampler:
    """Sample number i of a stream, whoever asks for it and in what company.

    Args:
        network: a generator, in evaluation mode.
        latent_size: of its latents.
        num_classes: that it is conditioned on; 0 if it is not.
        seed: of the noise.
        stream: names the noise; different streams of one seed are independent.
    """

    def __init__(
        self, network: nn.Module, latent_size: int, num_classes: int, seed: int, stream: str
    ) -> None:
        self.network = network
        self.latent_size = latent_size
        self.num_classes = num_classes
        self.seed = seed
        self.stream = stream

    @torch.no_grad()
    def __call__(self, positions: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples [n, *sample_shape] for int64 numbers [n]; labels are drawn unless given."""
        dtype = next(self.network.parameters()).dtype
        latents = draws.normal(self.seed, self.stream, positions, (self.latent_size,), dtype)
        if not self.num_classes:
            labels = None
        elif labels is None:
            labels = draws.integers(self.seed, f"{self.stream}/labels", positions, self.num_classes)
        samples: Tensor = self.network(latents, labels)
        return samples


@dataclass(frozen=True)
class TrainedGenerator:
    """The averaged generator of a run's newest checkpoint, with what is known of it.

    Attributes:
        network: in evaluation mode.
        config: of the run.
        checkpoint: where it is from.
        sample_shape: of one sample.
        num_classes: of the run's data; 0 if unlabelled.
    """

    network: nn.Module
    config: Config
    checkpoint: Checkpoint
    sample_shape: tuple[int, ...]
    num_classes: int

    def sampler(self, seed: int, stream: str) -> Sampler:
        """See :class:`Sampler`."""
        classes = self.num_classes if self.config.model.conditional else 0
        return Sampler(self.network, self.config.model.latent_size, classes, seed, stream)


def load_generator(run: Store, device: torch.device) -> TrainedGenerator:
    """The averaged generator of the run in the folder ``run``.

    Raises:
        CheckpointError: no run there, no whole checkpoint, or one of other networks.
    """
    config = read_config(run)
    if config is None:
        raise CheckpointError(
            run.url, "is no run directory (it has no config.json)", mend="Check the path"
        )
    checkpoint = Checkpoints(run.child("checkpoints")).newest()
    if checkpoint is None:
        raise CheckpointError(
            run.url, "has no checkpoint yet", mend="Let the run reach run.checkpoint_samples"
        )
    import_plugins(config.plugins)
    sample_shape = tuple(checkpoint.state["sample_shape"])
    num_classes = checkpoint.state["num_classes"]
    network, _ = build_networks(config, sample_shape, num_classes)
    weights = {
        k.removeprefix("average/"): v
        for k, v in checkpoint.tensors.items()
        if k.startswith("average/")
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(run.url, f"holds the weights of other networks ({error})") from None
    network = network.to(device).eval().requires_grad_(False)
    return TrainedGenerator(network, config, checkpoint, sample_shape, num_classes)

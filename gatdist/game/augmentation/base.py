"""Augmentation of all that the discriminator sees, differentiable, keyed by sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.common.registry import Registry, call_with_options
from gatdist.config import Config


class Augmentation(ABC):
    """Changes samples in a way that the generator must not learn to imitate.

    It is a :class:`~gatdist.game.adaptive_state.AdaptiveState`; most learn nothing.
    """

    tags: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = {}

    @abstractmethod
    def __call__(self, samples: Tensor, seed: int, stream: str, positions: Tensor) -> Tensor:
        """Augmented samples, a differentiable function of ``samples`` (twice).

        Args:
            samples: pictures [n, C, H, W] in about [−1, 1].
            seed: of the run.
            stream: names the draws.
            positions: int64 [n]; sample i's draws are a function of (seed, stream, positions[i]).
        """

    def observe(self, real_logits: Tensor) -> dict[str, Tensor]:
        """What to report of the discriminator's logits of real samples [n], by tag, [n] each."""
        return {}

    def update(  # noqa: B027 - most learn nothing
        self, means: Mapping[str, Tensor], step: int, num_samples: int
    ) -> None:
        """See :meth:`gatdist.game.adaptive_state.AdaptiveState.update`."""


augmentations: Registry[type[Augmentation]] = Registry("game.augmentation.name")


def build_augmentation(
    config: Config, sample_shape: tuple[int, ...], device: torch.device
) -> Augmentation | None:
    """The augmentation that ``game.augmentation`` names; None for none.

    Args:
        config: of the run.
        sample_shape: of one sample.
        device: where the samples will be.

    Raises:
        ConfigError: an unknown name or option, or samples that are no pictures.
    """
    requested = config.game.augmentation
    if requested is None:
        return None
    kind = augmentations[requested.name]
    if len(sample_shape) != 3:
        raise ConfigError(
            "game.augmentation",
            f"needs pictures (C, H, W); these samples are {sample_shape}",
            value=requested.name,
            hint="Leave it out",
        )
    return call_with_options(
        kind, requested.options, "game.augmentation", sample_shape=sample_shape, device=device
    )

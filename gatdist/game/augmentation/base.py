"""The interface of augmentations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError, nearest
from gatdist.common.registry import Registry, call_with_options
from gatdist.config import Config


class Augmentation(ABC):
    """Changes samples in a way that the generator must not learn to imitate.

    It is a :class:`~gatdist.game.adaptive_state.AdaptiveState`; most have no state.
    """

    tags: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = {}

    @abstractmethod
    def __call__(self, samples: Tensor, seed: int, stream: str, positions: Tensor) -> Tensor:
        """Return augmented samples, twice differentiable by ``samples``.

        Args:
            samples: Images [n, C, H, W] in about [−1, 1].
            seed: Seed of the run.
            stream: Name of the draws.
            positions: int64 [n]; draws of sample i are a function of (seed, stream, positions[i]),
                whatever the policy.
        """

    def observe(self, real_logits: Tensor) -> dict[str, Tensor]:
        """Return observations [n] by tag, from the logits of real samples [n]."""
        return {}

    def update(  # noqa: B027  (most have no state)
        self, means: Mapping[str, Tensor], step: int, num_samples: int
    ) -> None:
        """See :meth:`gatdist.game.adaptive_state.AdaptiveState.update`."""


augmentations: Registry[type[Augmentation]] = Registry("game.augmentation.name")


def build_augmentation(
    config: Config, sample_shape: tuple[int, ...], device: torch.device
) -> Augmentation | None:
    """Return the augmentation that ``game.augmentation`` names; None for none.

    Raises:
        ConfigError: An unknown name or option, or samples that are not images.
    """
    requested = config.game.augmentation
    if requested is None:
        return None
    kind = augmentations[requested.name]
    if len(sample_shape) != 3:
        raise ConfigError(
            "game.augmentation",
            f"needs images (C, H, W); samples are {sample_shape}",
            value=requested.name,
            hint="Leave it out",
        )
    return call_with_options(
        kind, requested.options, "game.augmentation", sample_shape=sample_shape, device=device
    )


def require_policy(policy: Sequence[str], known: Collection[str]) -> None:
    """Refuse a policy that is empty or has unknown names."""
    if not policy:
        raise ConfigError(
            "game.augmentation.policy",
            f"must name at least one of {', '.join(known)}",
            value=policy,
            hint="Leave out game.augmentation for none",
        )
    for name in policy:
        if name not in known:
            raise ConfigError(
                "game.augmentation.policy", f"not known. {nearest(name, known)}", value=name
            )

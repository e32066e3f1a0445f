"""The interface of augmentations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
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

    def follow(self, samples_seen: int) -> None:  # noqa: B027
        """Set what follows a schedule, before a step, without waiting for the device."""

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


def _by_name(policy: Any) -> Any:
    if isinstance(policy, list) and all(isinstance(name, str) for name in policy):
        return dict.fromkeys(policy, 1.0)
    if not isinstance(policy, dict):
        rule = "must be a list of names, or a table of names and strengths"
        raise PydanticCustomError("policy", rule)
    return policy


# Transformations and their strengths, factors of their probability; a list of names means 1 each.
Strengths = Annotated[
    dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], BeforeValidator(_by_name)
]


def require_policy(policy: Collection[str], known: Collection[str]) -> None:
    """Refuse a policy that is empty or has unknown names."""
    if not policy:
        raise ConfigError(
            "game.augmentation.policy",
            f"must name at least one of {', '.join(known)}",
            value=list(policy),
            hint="Leave out game.augmentation for none",
        )
    for name in policy:
        if name not in known:
            raise ConfigError(
                "game.augmentation.policy", f"not known. {nearest(name, known)}", value=name
            )

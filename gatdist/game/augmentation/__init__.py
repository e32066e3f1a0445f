"""Augmentation of the discriminator's inputs: differentiable and keyed by sample."""

from gatdist.game.augmentation.ada import AdaptiveAugmentation
from gatdist.game.augmentation.base import Augmentation, augmentations, build_augmentation
from gatdist.game.augmentation.diffaugment import DiffAugment

__all__ = [
    "AdaptiveAugmentation",
    "Augmentation",
    "DiffAugment",
    "augmentations",
    "build_augmentation",
]

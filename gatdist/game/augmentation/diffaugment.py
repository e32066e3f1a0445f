"""DiffAugment: the same kinds of change at all times (Zhao et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError, nearest
from gatdist.game.augmentation.base import Augmentation, augmentations
from gatdist.game.augmentation.warp import take
from gatdist.parallel import draws

_POLICY = ["color", "translation", "cutout"]
_NUM_DRAWS = 7  # brightness, saturation, contrast; translation and cutout along x and along y


@augmentations.register("diffaugment")
class DiffAugment(Augmentation):
    """Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training".

    In this order, whatever that of the policy, with uniform draws:

    * ``color``: x + b, b in (−0.5, 0.5); then saturation, the distance from the mean over the
      channels times s in (0, 2); then contrast, the distance from the picture's mean times c in
      (0.5, 1.5).
    * ``translation``: by whole pixels, up to an eighth of each side; what comes in is 0.
    * ``cutout``: a box of half of each side, wherever its middle falls in the picture, becomes 0.

    One channel has no saturation.

    Args:
        sample_shape: (C, H, W).
        device: where the samples will be.
        policy: some of these names.

    Raises:
        ConfigError: an unknown name, or none.
    """

    def __init__(
        self, *, sample_shape: tuple[int, ...], device: torch.device, policy: list[str] = _POLICY
    ) -> None:
        if not policy:
            raise ConfigError(
                "game.augmentation.policy",
                f"must name at least one of {', '.join(_POLICY)}",
                value=policy,
                hint="Leave out game.augmentation for none",
            )
        for name in policy:
            if name not in _POLICY:
                raise ConfigError(
                    "game.augmentation.policy", f"not known. {nearest(name, _POLICY)}", value=name
                )
        self._policy = frozenset(policy)

    def __call__(self, samples: Tensor, seed: int, stream: str, positions: Tensor) -> Tensor:
        """See :meth:`Augmentation.__call__`. Draws do not depend on the policy."""
        # In double precision, where a draw is never rounded to 1.
        drawn = draws.uniform(seed, stream, positions, (_NUM_DRAWS,), torch.float64)
        found = samples if samples.dtype == torch.float64 else samples.float()
        if "color" in self._policy:
            found = _recolour(found, drawn[:, :3].to(found.dtype))
        if "translation" in self._policy:
            index, beyond = _translation(drawn[:, 3:5], *samples.shape[2:])
            found = torch.where(beyond[:, None], 0, take(found, index))
        if "cutout" in self._policy:
            box = _cutout(drawn[:, 5:7], *samples.shape[2:])
            found = torch.where(box[:, None], 0, found)
        return found.to(samples.dtype)


def _recolour(images: Tensor, drawn: Tensor) -> Tensor:
    """Brightness, saturation and contrast in one: both means are known in advance.

    Args:
        images: [n, C, H, W].
        drawn: [n, 3] uniform in (0, 1).
    """
    brightness, saturation, contrast = drawn.T[..., None, None, None]  # [n, 1, 1, 1]
    brightness, saturation, contrast = brightness - 0.5, 2 * saturation, contrast + 0.5
    grey = images.mean(1, keepdim=True)
    # One axis after the other: a mean over all that is left would depend on the size of the batch.
    mean = grey.mean(3, keepdim=True).mean(2, keepdim=True)
    base = brightness + (1 - contrast) * mean
    if images.shape[1] == 1:
        return torch.addcmul(base, images, contrast)
    base = torch.addcmul(base, grey, contrast * (1 - saturation))
    return torch.addcmul(base, images, contrast * saturation)


def _translation(drawn: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Which pixel each one shows, int64 [n, H, W], and where it shows none, [n, H, W].

    Args:
        drawn: [n, 2] uniform in (0, 1), for x and for y.
        height: H.
        width: W.
    """

    def along(uniform: Tensor, size: int) -> tuple[Tensor, Tensor]:
        most = int(size / 8 + 0.5)
        moved = (uniform * (2 * most + 1)).long() - most
        source = torch.arange(size, device=drawn.device) - moved[:, None]
        inside = source.clamp(0, size - 1)
        return inside, inside != source

    x, beyond_x = along(drawn[:, 0], width)
    y, beyond_y = along(drawn[:, 1], height)
    return (y * width)[:, :, None] + x[:, None], beyond_y[:, :, None] | beyond_x[:, None]


def _cutout(drawn: Tensor, height: int, width: int) -> Tensor:
    """The boxes that are cut out, [n, H, W]; see :func:`_translation`."""

    def along(uniform: Tensor, size: int) -> Tensor:
        length = int(size / 2 + 0.5)
        start = (uniform * (size + 1 - length % 2)).long()[:, None] - length // 2
        place = torch.arange(size, device=drawn.device)
        return (place >= start) & (place < start + length)

    return along(drawn[:, 1], height)[:, :, None] & along(drawn[:, 0], width)[:, None]

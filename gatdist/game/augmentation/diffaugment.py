"""DiffAugment: fixed augmentation (Zhao et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from gatdist.game.augmentation.base import Augmentation, augmentations, require_policy
from gatdist.game.augmentation.warp import take
from gatdist.parallel import draws

_POLICY = ["color", "translation", "cutout"]
_NUM_DRAWS = 7  # brightness, saturation, contrast; translation and cutout along x and along y


@augmentations.register("diffaugment")
class DiffAugment(Augmentation):
    """Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training".

    Applies the transformations of the policy in this order, with uniform draws.

    * ``color``: brightness x + b, b in (−0.5, 0.5); then saturation (not for one channel), the
      distance from the mean over the channels times s in (0, 2); then contrast, the distance from
      the image's mean times c in (0.5, 1.5).
    * ``translation``: by whole pixels, up to an eighth of each side, filled with 0.
    * ``cutout``: a box of half of each side, with its middle anywhere in the image, becomes 0.
    """

    def __init__(
        self, *, sample_shape: tuple[int, ...], device: torch.device, policy: list[str] = _POLICY
    ) -> None:
        require_policy(policy, _POLICY)
        self._policy = frozenset(policy)

    def __call__(self, samples: Tensor, seed: int, stream: str, positions: Tensor) -> Tensor:
        # In double precision, where a draw is never rounded to 1.
        drawn = draws.uniform(seed, stream, positions, (_NUM_DRAWS,), torch.float64)
        found = samples if samples.dtype == torch.float64 else samples.float()
        if "color" in self._policy:
            found = _recolor(found, drawn[:, :3].to(found.dtype))
        if "translation" in self._policy:
            index, beyond = _translation(drawn[:, 3:5], *samples.shape[2:])
            found = torch.where(beyond[:, None], 0, take(found, index))
        if "cutout" in self._policy:
            box = _cutout(drawn[:, 5:7], *samples.shape[2:])
            found = torch.where(box[:, None], 0, found)
        return found.to(samples.dtype)


def _recolor(images: Tensor, drawn: Tensor) -> Tensor:
    """Change brightness, saturation and contrast at once, by draws [n, 3] uniform in (0, 1)."""
    brightness, saturation, contrast = drawn.T[..., None, None, None]  # [n, 1, 1, 1]
    brightness, saturation, contrast = brightness - 0.5, 2 * saturation, contrast + 0.5
    gray = images.mean(1, keepdim=True)
    # One axis after the other: a mean over several may depend on the size of the batch.
    mean = gray.mean(3, keepdim=True).mean(2, keepdim=True)
    base = brightness + (1 - contrast) * mean
    if images.shape[1] == 1:
        return torch.addcmul(base, images, contrast)
    base = torch.addcmul(base, gray, contrast * (1 - saturation))
    return torch.addcmul(base, images, contrast * saturation)


def _translation(drawn: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Source of each pixel, int64 [n, H, W], and where it lies outside the image, [n, H, W].

    ``drawn`` is [n, 2] uniform in (0, 1), for x and y.
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
    """Masks of the boxes, [n, H, W]; ``drawn`` as in :func:`_translation`."""

    def along(uniform: Tensor, size: int) -> Tensor:
        length = int(size / 2 + 0.5)
        start = (uniform * (size + 1 - length % 2)).long()[:, None] - length // 2
        place = torch.arange(size, device=drawn.device)
        return (place >= start) & (place < start + length)

    return along(drawn[:, 1], height)[:, :, None] & along(drawn[:, 0], width)[:, None]

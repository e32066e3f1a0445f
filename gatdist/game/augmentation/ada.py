"""ADA: augmentation that adapts to the overfitting of the discriminator (Karras et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from gatdist.game.augmentation import warp
from gatdist.game.augmentation.base import Augmentation, augmentations, require_policy
from gatdist.parallel import draws

# Transformations in the order of the paper, each with its own draws.
_GEOMETRIC = (
    "flip",
    "quarter_turn",
    "integer_translation",
    "scale",
    "pre_rotation",
    "stretch",
    "post_rotation",
    "fractional_translation",
)
_COLOR = ("brightness", "contrast", "luma_flip", "hue", "saturation")
_ALL = _GEOMETRIC + _COLOR
_GROUPS = {"blit": _GEOMETRIC[:3], "geometry": _GEOMETRIC[3:], "color": _COLOR}
_POLICY = list(_GROUPS)

_SIGN = "augmentation/sign_real"


@augmentations.register("ada")
class AdaptiveAugmentation(Augmentation):
    """Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data".

    Each transformation is applied with probability p. With r the mean sign of the logits of real
    samples, which approaches 1 as the discriminator overfits, every ``interval_steps`` steps
    p ← p + sign(r − target) · (samples since then) / ``adjust_samples``, in [0, 1].

    By group, with N a standard normal and U a uniform draw from (−1, 1):

    * ``blit``: ``flip`` along x; ``quarter_turn`` by 0 to 3 quarters; ``integer_translation`` by
      U / 8 of each side, in whole pixels.
    * ``geometry``: ``scale`` by 2^(0.2 N); ``pre_rotation`` by π U; ``stretch`` by 2^(0.2 N) along
      x and its inverse along y; ``post_rotation`` by π U; ``fractional_translation`` by N / 8 of
      each side. At least one of the two rotations is applied with probability p.
    * ``color``: ``brightness`` + 0.2 N; ``contrast`` · 2^(0.5 N); ``luma_flip``, its sign; ``hue``
      rotated by π U; ``saturation`` · 2^N.

    The geometry is one bilinear resampling of the mirrored image; the paper filters with wavelets
    at twice the resolution and so aliases less. Without three channels there is no hue and no
    saturation, and with other numbers than 1 and 3 no luma flip. At p = 0 samples are unchanged bit
    for bit.

    Args:
        sample_shape: (C, H, W).
        device: Device of the samples.
        target: Target of r, in (−1, 1).
        initial_p: Initial p, in [0, 1].
        adjust_samples: Samples in which p can go from 0 to 1.
        interval_steps: Steps between changes of p.
        fixed: Whether p is constant.
        policy: Names of groups or of single transformations.

    Attributes:
        tensors: ``p``; the ``sum`` and the ``count`` of the mean signs of the interval so far.
    """

    tags = (_SIGN,)

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        device: torch.device,
        target: Annotated[float, Field(gt=-1, lt=1)] = 0.6,
        initial_p: Annotated[float, Field(ge=0, le=1)] = 0.0,
        adjust_samples: PositiveInt = 500_000,
        interval_steps: PositiveInt = 4,
        fixed: bool = False,
        policy: list[str] = _POLICY,
    ) -> None:
        known = _GROUPS | {name: (name,) for name in _ALL}
        require_policy(policy, known)
        requested = {each for name in policy for each in known[name]}
        self._target = target
        self._adjust_samples = adjust_samples
        self._interval_steps = interval_steps
        self._fixed = fixed
        self._has_geometry = not requested.isdisjoint(_GEOMETRIC)
        self._has_color = not requested.isdisjoint(_COLOR)
        self._requested = torch.tensor([name in requested for name in _ALL], device=device)
        self._rotates = torch.tensor([name.endswith("_rotation") for name in _ALL], device=device)
        self.tensors = {
            "p": torch.full((), initial_p, device=device),
            "sum": torch.zeros((), device=device),
            "count": torch.zeros((), device=device),
        }

    def __call__(self, samples: Tensor, seed: int, stream: str, positions: Tensor) -> Tensor:
        # In double precision, where a draw is never rounded to 1.
        drawn = draws.uniform(seed, stream, positions, (len(_ALL), 3), torch.float64)
        applied = drawn[:, :, 0] < self._probabilities()  # [n, transformations]
        uniform = _by_name((2 * drawn[:, :, 1:] - 1) * applied[:, :, None])  # in (−1, 1)
        normal = _by_name(torch.special.ndtri(drawn[:, :, 1:]) * applied[:, :, None])
        found = samples if samples.dtype == torch.float64 else samples.float()
        # The last bit of a double's cosine depends on its place in the batch, so the maps are
        # rounded to single precision.
        if self._has_geometry:
            sources = _source_maps(uniform, normal, *samples.shape[2:]).float()
            found = warp.resample(found, sources.to(found.dtype))
        if self._has_color:
            color_map = _color_map(uniform, normal, samples.shape[1])
            matrix, offset = (each.float() for each in color_map)
            found = _recolor(found, matrix.to(found.dtype), offset.to(found.dtype))
        touched = applied.any(1)[:, None, None, None]
        return torch.where(touched, found.to(samples.dtype), samples)

    def observe(self, real_logits: Tensor) -> dict[str, Tensor]:
        p = self.tensors["p"].clone()  # an update changes it in place
        return {_SIGN: real_logits.sign(), "augmentation/p": p.expand(len(real_logits))}

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        """Change p at the last step of each interval. Missing and non-finite means are skipped."""
        if self._fixed:
            return
        p, total, count = (self.tensors[name] for name in ("p", "sum", "count"))
        if _SIGN in means:
            mean = means[_SIGN].to(total.dtype)
            finite = mean.isfinite()
            total.add_(mean.where(finite, 0))
            count.add_(finite)
        if (step + 1) % self._interval_steps == 0:
            # Compares sums, so that an interval without any mean leaves p unchanged.
            direction = (total - self._target * count).sign()
            p.add_(direction * (self._interval_steps * num_samples / self._adjust_samples))
            p.clamp_(0, 1)
            total.zero_()
            count.zero_()

    def _probabilities(self) -> Tensor:
        p = self.tensors["p"].double()
        return torch.where(self._rotates, 1 - (1 - p).sqrt(), p) * self._requested


_Draws = Mapping[str, Tensor]  # [2, n] by transformation; 0 where it is not applied


def _by_name(drawn: Tensor) -> _Draws:
    return dict(zip(_ALL, drawn.permute(1, 2, 0), strict=True))


def _source_maps(uniform: _Draws, normal: _Draws, height: int, width: int) -> Tensor:
    """Return the maps from pixels of the result to the image: the inverse of the geometry."""
    mirror = torch.where(uniform["flip"][0] < 0, -1.0, 1.0).double()
    blit_x, blit_y = uniform["integer_translation"] / 8
    scale = (-0.2 * normal["scale"][0]).exp2()
    stretch = (-0.2 * normal["stretch"][0]).exp2()
    move_x, move_y = normal["fractional_translation"] / 8
    # The last of the paper's transformations is inverted first, so it stands on the right.
    factors = [
        warp.scaling(mirror, torch.ones_like(mirror)),
        # −2, −1, 0 or 1 quarters; 0 where it is not applied.
        warp.quarter_turn((2 * uniform["quarter_turn"][0]).floor(), height, width),
        warp.translation((blit_x * width).round(), (blit_y * height).round()),
        warp.scaling(scale, scale),
        warp.rotation(torch.pi * uniform["pre_rotation"][0]),
        warp.scaling(stretch, 1 / stretch),
        warp.rotation(torch.pi * uniform["post_rotation"][0]),
        warp.translation(move_x * width, move_y * height),
    ]
    return reduce(torch.matmul, factors)


def _color_map(uniform: _Draws, normal: _Draws, channels: int) -> tuple[Tensor, Tensor]:
    """Return the color transformations of each sample as one affine map of its channels.

    With three channels, each of them keeps the gray axis, and rotates or scales the plane
    orthogonal to it. So the product of the paper's 4 × 4 matrices is, with L the projection onto
    the axis and K the cross product with its direction,

        x ↦ M x + luma · brightness, M = luma · L + chroma · (cos(hue) · (1 − L) + sin(hue) · K).

    Returns:
        M, [n, 3, 3], or the factor of all channels, [n, 1, 1]; and the offset, [n, 1, 1].
    """
    contrast = (0.5 * normal["contrast"][0]).exp2()[:, None, None]
    luma = contrast
    if channels in (1, 3):
        luma = torch.where((uniform["luma_flip"][0] < 0)[:, None, None], -contrast, contrast)
    offset = luma * 0.2 * normal["brightness"][0][:, None, None]
    if channels != 3:
        return luma, offset
    hue = torch.pi * uniform["hue"][0][:, None, None]
    chroma = contrast * normal["saturation"][0].exp2()[:, None, None]
    # M is circulant: entry (i, j) depends on j − i.
    place = torch.arange(3, device=hue.device, dtype=hue.dtype)
    angle = hue + 2 * torch.pi / 3 * (place - place[:, None])
    return (luma + 2 * chroma * angle.cos()) / 3, offset


def _recolor(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Apply the map that :func:`_color_map` returns."""
    flat = images.flatten(2)
    if matrix.shape[1] == 1:
        return torch.addcmul(offset, flat, matrix).view(images.shape)
    return torch.baddbmm(offset, matrix, flat).view(images.shape)

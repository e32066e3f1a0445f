"""ADA: augmentation that adapts to the overfitting of the discriminator (Karras et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.common.numerics import cached_tensors
from gatdist.config.schedule import NonNegativeSchedule, SingleFloat
from gatdist.game.augmentation import filters, warp
from gatdist.game.augmentation.base import (
    Augmentation,
    Strengths,
    augmentations,
    require_policy,
)
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
_BANDS = ("band_1", "band_2", "band_3", "band_4")
_ALL = (*_GEOMETRIC, *_COLOR, *_BANDS, "noise", "cutout")
_GROUPS = {
    "blit": _GEOMETRIC[:3],
    "geometry": _GEOMETRIC[3:],
    "rotation": ("pre_rotation", "post_rotation"),
    "color": _COLOR,
    "filter": _BANDS,
}
_MEMBERS = _GROUPS | {name: (name,) for name in _ALL}
_POLICY = {"blit": 1.0, "geometry": 1.0, "color": 1.0}

_EXPECTED_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # of images, by frequency band
_CUTOUT_SIZE = 0.5

_SIGN = "augmentation/sign_real"


@augmentations.register("ada")
class AdaptiveAugmentation(Augmentation):
    """Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data".

    Each transformation is applied with probability min(1, strength · p). With r the mean sign of
    the logits of real samples, which approaches 1 as the discriminator overfits, every
    ``interval_steps`` steps p ← max(0, p + sign(r − target) · (samples since then) /
    ``adjust_samples``). As published, p may exceed 1.

    By group and in this order, with N a standard normal and U a uniform draw from (−1, 1):

    * ``blit``: ``flip`` along x, or not; ``quarter_turn`` by 0 to 3 quarters;
      ``integer_translation`` by U / 8 of each side, in whole pixels.
    * ``geometry``: ``scale`` by 2^(0.2 N); ``pre_rotation`` by π U; ``stretch`` by 2^(0.2 N) along
      x and its inverse along y; ``post_rotation`` by π U; ``fractional_translation`` by N / 8 of
      each side. ``rotation`` names both rotations; at least one of them is applied with the
      probability of a transformation.
    * ``color``: ``brightness`` + 0.2 N; ``contrast`` · 2^(0.5 N); ``luma_flip``, its sign, or not;
      ``hue`` rotated by π U; ``saturation`` · 2^N.
    * ``filter``: the frequency bands ``band_1`` (lowest) to ``band_4``, each amplified by 2^N, then
      all scaled so that the expected power stays the same.
    * ``noise``: Gaussian noise whose standard deviation is 0.1 times the magnitude of N.
    * ``cutout``: a box of half of each side, with its middle anywhere in the image, becomes 0.

    The geometry is one resampling of the mirrored image at twice the resolution, with wavelet
    filters (:func:`gatdist.game.augmentation.warp.resample`), so that even a flip is not exact. Of
    images with other than 3 channels, hue and saturation stay; luma flips need 1 or 3. A sample to
    which no transformation is applied is unchanged bit for bit.

    Args:
        sample_shape: (C, H, W).
        device: Device of the samples.
        target: Target of r, in (−1, 1).
        p: p as a number or a schedule, at least 0. None adapts it.
        initial_p: Initial p if it adapts, at least 0.
        adjust_samples: Samples in which p can rise by 1.
        interval_steps: Steps between changes of p.
        policy: Names of groups or of single transformations, as a list, or as a table with a
            strength for each, at least 0. A single one takes precedence over its group.

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
        p: NonNegativeSchedule | None = None,
        initial_p: Annotated[SingleFloat, Field(ge=0)] = 0.0,
        adjust_samples: PositiveInt = 500_000,
        interval_steps: PositiveInt = 4,
        policy: Strengths = _POLICY,
    ) -> None:
        require_policy(policy, _MEMBERS)
        if p is not None and initial_p:
            rule = "is the start of an adaptive p, and game.augmentation.p is set"
            raise ConfigError(
                "game.augmentation.initial_p", rule, value=initial_p, hint="Remove it"
            )
        strengths: dict[str, float] = {}
        for name in sorted(policy, key=lambda name: -len(_MEMBERS[name])):
            strengths |= dict.fromkeys(_MEMBERS[name], policy[name])
        self._requested = frozenset(name for name, strength in strengths.items() if strength)
        self._target = target
        self._schedule = p
        self._adjust_samples = adjust_samples
        self._interval_steps = interval_steps
        each = [strengths.get(name, 0.0) for name in _ALL]
        self._strengths = {
            precision: torch.tensor(each, device=device, dtype=precision)
            for precision in (torch.float64, torch.float32)
        }
        self._rotates = torch.tensor([name.endswith("_rotation") for name in _ALL], device=device)
        self.tensors = {
            "p": torch.full((), p.at(0) if p else initial_p, device=device),
            "sum": torch.zeros((), device=device),
            "count": torch.zeros((), device=device),
        }

    def follow(self, samples_seen: int) -> None:
        if self._schedule is not None:
            self.tensors["p"].fill_(self._schedule.at(samples_seen))

    def __call__(self, samples: Tensor, seed: int, stream: str, positions: Tensor) -> Tensor:
        # The last bit of a cosine on a CPU depends on its place in the batch, so it is computed in
        # double precision, and rounded below. On other devices each place computes the same.
        exact = samples.dtype == torch.float64 or draws.is_readable(positions)
        precision = torch.float64 if exact else torch.float32
        drawn = draws.uniform(seed, stream, positions, (len(_ALL), 3), precision)
        applied = drawn[:, :, 0] < self._probabilities(precision)  # [n, transformations]
        uniform = _by_name((2 * drawn[:, :, 1:] - 1) * applied[:, :, None])  # in (−1, 1)
        normal = _by_name(torch.special.ndtri(drawn[:, :, 1:]) * applied[:, :, None])
        found = samples if samples.dtype == torch.float64 else samples.float()
        dtype, size = found.dtype, samples.shape[2:]
        if not self._requested.isdisjoint(_GEOMETRIC):
            sources = _source_maps(uniform, normal, *size).float()
            found = warp.resample(found, sources.to(dtype))
        if not self._requested.isdisjoint(_COLOR):
            color_map = _color_map(uniform, normal, samples.shape[1])
            matrix, offset = (each.float() for each in color_map)
            found = _recolor(found, matrix.to(dtype), offset.to(dtype))
        if not self._requested.isdisjoint(_BANDS):
            found = _amplify(found, _band_gains(normal).float().to(dtype))
        if "noise" in self._requested:
            sigma = (0.1 * normal["noise"][0].abs()).float().to(dtype)
            noise = draws.normal(seed, f"{stream}/noise", positions, samples.shape[1:])
            found = torch.addcmul(found, noise.to(dtype), sigma[:, None, None, None])
        if "cutout" in self._requested:
            box = _cutout_box(drawn[:, -1, 1:], *size) & applied[:, -1, None, None]
            found = found.masked_fill(box[:, None], 0)
        touched = applied.any(1)[:, None, None, None]
        return torch.where(touched, found.to(samples.dtype), samples)

    def observe(self, real_logits: Tensor) -> dict[str, Tensor]:
        p = self.tensors["p"].clone()  # an update changes it in place
        return {_SIGN: real_logits.sign(), "augmentation/p": p.expand(len(real_logits))}

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        """Change p at the last step of each interval. Missing and non-finite means are skipped."""
        if self._schedule is not None:
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
            p.clamp_(min=0)
            total.zero_()
            count.zero_()

    def _probabilities(self, precision: torch.dtype) -> Tensor:
        each = self.tensors["p"].to(precision) * self._strengths[precision]  # above 1: always
        return torch.where(self._rotates, 1 - (1 - each).clamp(min=0).sqrt(), each)


_Draws = Mapping[str, Tensor]  # [2, n] by transformation; 0 where it is not applied


def _by_name(drawn: Tensor) -> _Draws:
    return dict(zip(_ALL, drawn.permute(1, 2, 0), strict=True))


def _source_maps(uniform: _Draws, normal: _Draws, height: int, width: int) -> Tensor:
    """Return the maps from pixels of the result to the image: the inverse of the geometry."""
    flipped = uniform["flip"][0] < 0
    mirror = torch.where(flipped, -1.0, 1.0).to(uniform["flip"].dtype)
    blit_x, blit_y = -uniform["integer_translation"] / 8
    scale = (-0.2 * normal["scale"][0]).exp2()
    stretch = (-0.2 * normal["stretch"][0]).exp2()
    move_x, move_y = -normal["fractional_translation"] / 8
    # The last of the paper's transformations is inverted first, so it stands on the right.
    factors = [
        warp.scaling(mirror, torch.ones_like(mirror)),
        # −2, −1, 0 or 1 quarters; 0 where it is not applied.
        warp.rotation(torch.pi / 2 * (2 * uniform["quarter_turn"][0]).floor()),
        warp.translation((blit_x * width).round(), (blit_y * height).round()),
        warp.scaling(scale, scale),
        warp.rotation(torch.pi * uniform["pre_rotation"][0]),
        warp.scaling(stretch, 1 / stretch),
        warp.rotation(torch.pi * uniform["post_rotation"][0]),
        warp.translation(move_x * width, move_y * height),
    ]
    return reduce(warp.product, warp.matrices(factors))


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


def _band_gains(normal: _Draws) -> Tensor:
    """Return the gain of each frequency band, [n, 4]."""
    gains, scale = [normal[name][0].exp2() for name in _BANDS], torch.ones(())
    for power, gain in zip(_EXPECTED_POWER, gains, strict=True):
        # This amplification alone changes the expected power from 1 to 1 + power · (gain² − 1).
        scale = scale * (1 + power * (gain.square() - 1)).rsqrt()
    return torch.stack(gains, 1) * scale[:, None]


def _amplify(images: Tensor, gains: Tensor) -> Tensor:
    """Amplify the frequency bands by gains [n, 4], along both axes."""

    def matrix(size: int) -> Tensor:
        found = torch.zeros((), dtype=images.dtype, device=images.device)
        bands = filters.on(images.device, images.dtype, filters.bands, size)
        for band, gain in zip(bands, gains.T, strict=True):
            found = torch.addcmul(found, band, gain[:, None, None])
        return found[:, None]  # [n, 1, size, size], with the zeros that `on` appends

    height, width = images.shape[2:]
    found = filters.along_axes(images, matrix(height), matrix(width))
    return found[..., :height, :width]


def _cutout_box(center: Tensor, height: int, width: int) -> Tensor:
    """Return where the boxes are, [n, H, W], with centers (x, y) [n, 2] in (0, 1)."""

    def along(middle: Tensor, size: int) -> Tensor:
        place = _pixels(middle.device, middle.dtype, size)
        return (place - middle[:, None]).abs() < _CUTOUT_SIZE / 2

    return along(center[:, 1], height)[:, :, None] & along(center[:, 0], width)[:, None]


@cached_tensors
def _pixels(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """Return where the pixels of an axis are, in (0, 1)."""
    return (torch.arange(size, dtype=dtype, device=device) + 0.5) / size

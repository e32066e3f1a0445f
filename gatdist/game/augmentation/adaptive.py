"""ADA: augmentation that grows with the discriminator's overfitting (Karras et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError, nearest
from gatdist.game.augmentation import warp
from gatdist.game.augmentation.base import Augmentation, augmentations
from gatdist.parallel import draws

# Transformations in the paper's order, each with draws of its own.
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
_COLOURING = ("brightness", "contrast", "luma_flip", "hue", "saturation")
_ALL = _GEOMETRIC + _COLOURING
_GROUPS = {"blit": _GEOMETRIC[:3], "geometry": _GEOMETRIC[3:], "color": _COLOURING}
_POLICY = list(_GROUPS)

_SIGN = "augmentation/sign_real"


@augmentations.register("ada")
class AdaptiveAugmentation(Augmentation):
    """Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data".

    Each transformation is applied with probability p. With r the mean sign of the discriminator's
    logits of real samples, which nears 1 as it overfits, every so many steps
    p ← p + sign(r − target) · (samples seen since) / ``adjust_samples``, in [0, 1].

    By group, with N a standard normal and U a uniform draw from (−1, 1):

    * ``blit``: ``flip`` along x; ``quarter_turn``, none to three; ``integer_translation`` by U / 8
      of each side, in whole pixels.
    * ``geometry``: ``scale`` by 2^(0.2 N); ``pre_rotation`` by π U; ``stretch`` by 2^(0.2 N) along
      x and its inverse along y; ``post_rotation`` by π U; ``fractional_translation`` by N / 8 of
      each side. At least one of the two rotations happens with probability p.
    * ``color``: ``brightness`` + 0.2 N; ``contrast`` · 2^(0.5 N); ``luma_flip``, its sign; ``hue``
      turned by π U; ``saturation`` · 2^N.

    All of the geometry is one bilinear resampling over the mirrored picture; the paper filters with
    wavelets at twice the resolution, and so aliases less where it shrinks. One channel has only a
    luma, and of channels that are neither one nor three only brightness and contrast change. At
    p = 0 samples stay as they are, bit for bit.

    Args:
        sample_shape: (C, H, W).
        device: where the samples will be.
        target: for r, in (−1, 1).
        initial_p: p at the beginning, in [0, 1].
        adjust_samples: p goes from 0 to 1 in so many samples at least.
        interval_steps: p changes every so many steps.
        fixed: p stays as it is.
        policy: names of groups, or of single transformations.

    Attributes:
        tensors: ``p``; the ``sum`` and the ``count`` of the interval's mean signs so far.

    Raises:
        ConfigError: an option is out of range, or a name unknown.
    """

    tags = (_SIGN,)

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        device: torch.device,
        target: float = 0.6,
        initial_p: float = 0.0,
        adjust_samples: int = 500_000,
        interval_steps: int = 4,
        fixed: bool = False,
        policy: list[str] = _POLICY,
    ) -> None:
        _require(-1 < target < 1, "target", "must lie between −1 and 1", target)
        _require(0 <= initial_p <= 1, "initial_p", "must be from 0 to 1", initial_p)
        _require(adjust_samples >= 1, "adjust_samples", "must be at least 1", adjust_samples)
        _require(interval_steps >= 1, "interval_steps", "must be at least 1", interval_steps)
        requested = _requested(policy)
        self._target = target
        self._adjust_samples = adjust_samples
        self._interval_steps = interval_steps
        self._fixed = fixed
        self._moves = not requested.isdisjoint(_GEOMETRIC)
        self._colours = not requested.isdisjoint(_COLOURING)
        self._requested = torch.tensor([name in requested for name in _ALL], device=device)
        self._rotates = torch.tensor([name.endswith("_rotation") for name in _ALL], device=device)
        self.tensors = {
            "p": torch.full((), initial_p, device=device),
            "sum": torch.zeros((), device=device),
            "count": torch.zeros((), device=device),
        }

    def __call__(self, samples: Tensor, seed: int, stream: str, positions: Tensor) -> Tensor:
        """See :meth:`Augmentation.__call__`. Draws do not depend on the policy."""
        # In double precision, where a draw is never rounded to 1.
        drawn = draws.uniform(seed, stream, positions, (len(_ALL), 3), torch.float64)
        applied = drawn[:, :, 0] < self._chances()  # [n, transformations]
        changes = _Changes(drawn[:, :, 1:], applied)
        found = samples if samples.dtype == torch.float64 else samples.float()
        # The last bit of a double's cosine depends on its place in the batch; so all that is made
        # of the draws is rounded to single precision before it meets the samples.
        if self._moves:
            sources = _sources(changes, *samples.shape[2:]).float()
            found = warp.resample(found, sources.to(found.dtype))
        if self._colours:
            matrix, offset = (each.float() for each in _colours(changes, samples.shape[1]))
            found = _recolour(found, matrix.to(found.dtype), offset.to(found.dtype))
        touched = applied.any(1)[:, None, None, None]
        return torch.where(touched, found.to(samples.dtype), samples)

    def observe(self, real_logits: Tensor) -> dict[str, Tensor]:
        """The signs of the logits, and p."""
        p = self.tensors["p"].clone()  # learning changes it in place
        return {_SIGN: real_logits.sign(), "augmentation/p": p.expand(len(real_logits))}

    def update(self, means: Mapping[str, Tensor], step: int, num_samples: int) -> None:
        """Move p at the last step of each interval; see the class.

        A step whose mean is not finite, or not there, counts for nothing.
        """
        if self._fixed:
            return
        p, total, count = (self.tensors[name] for name in ("p", "sum", "count"))
        if _SIGN in means:
            mean = means[_SIGN].to(total.dtype)
            finite = mean.isfinite()
            total.add_(mean.where(finite, 0))
            count.add_(finite)
        if (step + 1) % self._interval_steps == 0:
            # Compares sums, so that an interval without any mean moves nothing.
            direction = (total - self._target * count).sign()
            p.add_(direction * (self._interval_steps * num_samples / self._adjust_samples))
            p.clamp_(0, 1)
            total.zero_()
            count.zero_()

    def _chances(self) -> Tensor:
        """Each transformation's probability, [transformations]."""
        p = self.tensors["p"].double()
        return torch.where(self._rotates, 1 - (1 - p).sqrt(), p) * self._requested


class _Changes:
    """What the transformations draw, by name; all 0 where one is not applied.

    Args:
        drawn: float64 [n, transformations, 2], uniform in (0, 1).
        applied: [n, transformations].
    """

    def __init__(self, drawn: Tensor, applied: Tensor) -> None:
        applied = applied[:, :, None]
        self._uniform = (2 * drawn - 1) * applied
        self._normal = torch.special.ndtri(drawn) * applied

    def uniform(self, name: str) -> Tensor:
        """[2, n] in (−1, 1)."""
        return self._uniform[:, _ALL.index(name)].T

    def normal(self, name: str) -> Tensor:
        """[2, n], standard normal."""
        return self._normal[:, _ALL.index(name)].T

    def heads(self, name: str) -> Tensor:
        """Whether a coin shows heads, [n]."""
        return self.uniform(name)[0] < 0


def _sources(changes: _Changes, height: int, width: int) -> Tensor:
    """Where each pixel of the result looks, a map [n, 3, 3]: the geometry's inverse."""
    uniform, normal = changes.uniform, changes.normal
    mirrored = torch.where(changes.heads("flip"), -1.0, 1.0).double()
    blit_x, blit_y = uniform("integer_translation") / 8
    scale = (-0.2 * normal("scale")[0]).exp2()
    stretch = (-0.2 * normal("stretch")[0]).exp2()
    move_x, move_y = normal("fractional_translation") / 8
    # The last of the paper's transformations is undone first, so it stands on the right.
    factors = [
        warp.scaling(mirrored, torch.ones_like(mirrored)),
        # Four intervals of the draw for −2, −1, 0 and 1 quarters; 0 where it is not applied.
        warp.quarter_turn((2 * uniform("quarter_turn")[0]).floor(), height, width),
        warp.translation((blit_x * width).round(), (blit_y * height).round()),
        warp.scaling(scale, scale),
        warp.rotation(torch.pi * uniform("pre_rotation")[0]),
        warp.scaling(stretch, 1 / stretch),
        warp.rotation(torch.pi * uniform("post_rotation")[0]),
        warp.translation(move_x * width, move_y * height),
    ]
    return reduce(torch.matmul, factors)


def _colours(changes: _Changes, channels: int) -> tuple[Tensor, Tensor]:
    """All of the colour's transformations, one affine map of the channels for each sample.

    In three channels every one of them keeps the axis of greys, and turns or scales the plane
    across it. So the product of the paper's 4 × 4 matrices is, with L the projection onto the axis
    and K the cross product with its direction,

        x ↦ M x + luma · brightness, M = luma · L + chroma · (cos(hue) · (1 − L) + sin(hue) · K).

    Args:
        changes: for n samples.
        channels: how many.

    Returns:
        M, [n, 3, 3], or the one number that multiplies all channels, [n, 1, 1]; and what is added
        to each, [n, 1, 1].
    """
    contrast = (0.5 * changes.normal("contrast")[0]).exp2()[:, None, None]
    luma = contrast
    if channels in (1, 3):
        luma = torch.where(changes.heads("luma_flip")[:, None, None], -contrast, contrast)
    offset = luma * 0.2 * changes.normal("brightness")[0][:, None, None]
    if channels != 3:
        return luma, offset
    hue = torch.pi * changes.uniform("hue")[0][:, None, None]
    chroma = contrast * changes.normal("saturation")[0].exp2()[:, None, None]
    # M looks the same from each channel: entry (i, j) depends on how many places j is after i.
    place = torch.arange(3, device=hue.device, dtype=hue.dtype)
    angle = hue + 2 * torch.pi / 3 * (place - place[:, None])
    return (luma + 2 * chroma * angle.cos()) / 3, offset


def _recolour(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Pictures [n, C, H, W] with their channels mapped as :func:`_colours` says."""
    flat = images.flatten(2)
    if matrix.shape[1] == 1:
        return torch.addcmul(offset, flat, matrix).view(images.shape)
    return torch.baddbmm(offset, matrix, flat).view(images.shape)


def _requested(policy: list[str]) -> set[str]:
    """The transformations that a policy names, by group or one by one."""
    _require(bool(policy), "policy", f"must name at least one of {', '.join(_POLICY)}", policy)
    known = _GROUPS | {name: (name,) for name in _ALL}
    for name in policy:
        _require(name in known, "policy", f"not known. {nearest(name, known)}", name)
    return {each for name in policy for each in known[name]}


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"game.augmentation.{name}", rule, value=value)

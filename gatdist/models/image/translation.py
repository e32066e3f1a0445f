"""Networks of pix2pix (Isola et al. 2017) and pix2pixHD (Wang et al. 2018).

Legend: n samples, c channels, h × w pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.layers import uniform
from gatdist.models.registry import (
    discriminators,
    generators,
    require_input,
    require_no_labels,
    require_rank,
)
from gatdist.nn import Conv2d, ConvTranspose2d

_SLOPE = 0.2
_STD = 0.02  # of initial weights
Norm = Literal["batch", "instance", "instance_affine"]
_NORMS: dict[Norm, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": nn.InstanceNorm2d,
    # Batch normalization of single images, as published for pix2pix, at any batch size.
    "instance_affine": partial(nn.InstanceNorm2d, affine=True),
}
_WITHOUT_DROPOUT = 5  # levels: the innermost one, and the outermost four
_MOST = 8  # times the width


@generators.register("unet")
class UNetGenerator(nn.Module):
    """U-Net: images [n, c, h, w] → images [n, c′, h, w] in [−1, 1].

    Each of ``levels`` halves the sides and is skipped by a connection; 8 for 256 × 256 as
    published, with ``width`` 64. Its noise is dropout at inner levels, with masks from ``noise``,
    so that a sample's mask is its own. Sides of larger images are multiples of those in training,
    over which the masks are repeated.
    """

    def __init__(
        self,
        *,
        input_shapes: tuple[tuple[int, ...], ...],
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: PositiveInt = 64,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 3, "unet")
        require_no_labels(num_classes, "unet")
        inputs, *size = require_input(input_shapes, 3, "image [channels, height, width]", "unet")
        outputs, side = sample_shape[0], sample_shape[1]
        if size != [side, side] or sample_shape[2] != side or side < 2 or side.bit_count() != 1:
            rule = "'unet' takes square images whose side is a power of two, equal for both fields"
            raise ConfigError("model.generator.name", rule, value=[size, list(sample_shape[1:])])
        levels = side.bit_length() - 1
        widths = [min(2**level, _MOST) * width for level in range(levels)]
        bias = norm == "instance"  # the others have their own
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (before, after) in enumerate(pairwise([inputs, *widths])):
            normalized = 0 < level < levels - 1
            self.downs.append(_down(before, after, bias, norm if normalized else None))
        for level in reversed(range(levels)):
            before = widths[level] * (1 if level == levels - 1 else 2)
            after = widths[level - 1] if level else outputs
            up = ConvTranspose2d(before, after, 4, 2, padding=1, bias=bias or level == 0)
            self.ups.append(
                nn.Sequential(_normal(up), _NORMS[norm](after) if level else nn.Identity())
            )
        # Channels and sides of the maps that are dropped out, 4 pixels wide and wider.
        count = max(levels - _WITHOUT_DROPOUT, 0)
        self.dropped = [(widths[levels - 2 - i], 2 ** (i + 1)) for i in range(1, count + 1)]
        self.noise_size = sum(channels * side**2 for channels, side in self.dropped)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """``noise`` is [n, noise_size]; None drops nothing."""
        skips: list[Tensor] = []
        x = images
        for level, down in enumerate(self.downs):
            x = down(functional.leaky_relu(x, _SLOPE) if level else x)
            skips.append(x)
        skips.pop()
        start = 0
        for i, up in enumerate(self.ups):
            x = up(functional.relu(x))
            if noise is not None and 0 < i <= len(self.dropped):
                channels, side = self.dropped[i - 1]
                masks = noise[:, start : start + channels * side**2]
                x, start = _drop(x, masks.view(-1, channels, side, side)), start + masks.shape[1]
            if skips:
                x = torch.cat([skips.pop(), x], 1)
        return torch.tanh(x)


def _drop(x: Tensor, noise: Tensor) -> Tensor:
    """Set half of the numbers to 0 and double the others; larger maps repeat the mask."""
    side = noise.shape[2]
    tiles = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [n, c, rows, h, columns, w]
    kept = uniform(noise) < 0.5
    return (tiles * (2 * kept[:, :, None, :, None])).flatten(4, 5).flatten(2, 3)


@discriminators.register("patchgan")
class PatchGANDiscriminator(nn.Module):
    """PatchGAN: images [n, c, h, w] → features, and a logit for each patch of 70 × 70 pixels.

    ``layers``: strided convolutions after the first; 3 is the published number. ``scales``: number
    of sub-discriminators, 2 or 3 in pix2pixHD; each sees images of half the size of the one before.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        width: PositiveInt = 64,
        layers: PositiveInt = 3,
        norm: Norm = "batch",
        scales: PositiveInt = 1,
    ) -> None:
        super().__init__()
        require_rank(sample_shape, 3, "patchgan")
        require_no_labels(num_classes, "patchgan")
        side = min(sample_shape[1:])
        for key, value, last in (("layers", layers, 1), ("scales", scales, scales)):
            if _patches(side, layers, last) < 1:
                rule = f"leaves no patch of images with sides of {side} pixels"
                hint = "Lower it, or use larger images"
                raise ConfigError(f"model.discriminator.{key}", rule, value=value, hint=hint)
        self.parts = nn.ModuleList(
            _Patches(sample_shape[0], width, layers, norm) for _ in range(scales)
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> list[list[Tensor]]:
        """Return the features of each sub-discriminator, with its logits [n, 1, h′, w′] last."""
        found = []
        for scale, part in enumerate(self.parts):
            if scale:
                images = functional.avg_pool2d(images, 3, 2, 1, count_include_pad=False)
            found.append(part(images))
        return found


def _patches(side: int, layers: int, scales: int) -> int:
    """Return the number of patches along a side of the last scale; below 1, there is none."""
    for _ in range(scales - 1):
        side = (side - 1) // 2 + 1
    return side // 2**layers - 2


class _Patches(nn.Module):
    def __init__(self, inputs: int, width: int, layers: int, norm: Norm) -> None:
        super().__init__()
        widths = [min(2**level, _MOST) * width for level in range(layers + 1)]
        bias = norm == "instance"
        first = nn.Sequential(_normal(Conv2d(inputs, width, 4, 2, padding=1)))
        self.layers = nn.ModuleList([first])
        for level, (before, after) in enumerate(pairwise(widths), 1):
            stride = 2 if level < layers else 1
            convolution = Conv2d(before, after, 4, stride, padding=1, bias=bias)
            self.layers.append(nn.Sequential(_normal(convolution), _NORMS[norm](after)))
        self.finish = _normal(Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = functional.leaky_relu(layer(x), _SLOPE)
            found.append(x)
        return [*found, self.finish(x)]


def _down(inputs: int, outputs: int, bias: bool, norm: Norm | None) -> nn.Module:
    layers = [_normal(Conv2d(inputs, outputs, 4, 2, padding=1, bias=bias))]
    return nn.Sequential(*layers, *([_NORMS[norm](outputs)] if norm else []))


def _normal(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.weight, std=_STD)  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer

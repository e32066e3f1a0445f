"""StyleGAN2 (Karras et al. 2020) in plain torch, so that every derivative there is exists.

A mapping network turns latents z into styles w; the synthesis network starts from a constant and
scales its channels by styles, layer by layer, with noise added at every pixel. The discriminator is
residual. Both have equalized learning rates: weights are drawn with unit variance and scaled where
they are used (Karras et al. 2018).

The generator is random beside its latents: ``noise_size`` normal numbers a sample give the pixels'
noise and, in training, a second latent to mix styles with. Without them it adds none and mixes
none.

Legend: n samples, c channels, h × w pixels, s numbers in a style.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.conditioning import to_logits
from gatdist.models.image.equalized import Blur, EqualizedConv2d, EqualizedLinear
from gatdist.models.image.sizes import require_halvings
from gatdist.models.noise import uniform
from gatdist.models.registry import discriminators, generators

_SLOPE = 0.2
EPSILON = 1e-8


def _activate(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, _SLOPE) * math.sqrt(2)


def _channels(values: Tensor) -> Tensor:
    """[n, c] as a factor or an addend of [n, c, h, w]."""
    return values[:, :, None, None]


class StyledConv2d(nn.Module):
    """A 3×3 convolution whose inputs are scaled by a style, and its outputs back to unit variance.

    [n, inputs, h, w] → [n, outputs, h, w], or 2h × 2w with ``up``. Scaling weights by sample, as
    the paper has it, is the same as scaling what goes in and what comes out, and needs no
    convolution of its own for each sample.
    """

    def __init__(self, inputs: int, outputs: int, style_size: int, *, up: bool) -> None:
        super().__init__()
        self.style = EqualizedLinear(style_size, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.gain, self.up = 1 / math.sqrt(inputs * 9), up
        self.blur = Blur(1, gain=4.0) if up else nn.Identity()

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x, styles w [n, s], and noise [n, 1, h, w] of the output's size, or None."""
        x = self.convolve(x, w)
        if noise is not None:
            x = x + self.noise_strength * noise
        return _activate(x + self.bias[:, None, None])

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        """Without noise, bias and activation."""
        style, weight = self.style(w), self.weight * self.gain
        # Σ over inputs and taps of (weight · style)², [n, outputs].
        power = style.square() @ weight.square().sum(dim=(2, 3)).T
        x = x * _channels(style)
        if self.up:  # [n, outputs, 2h + 1, 2w + 1], which the blur makes 2h × 2w
            x = self.blur(functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        else:
            x = functional.conv2d(x, weight, padding=1)
        return x * _channels((power + EPSILON).rsqrt())


class ToImage(nn.Module):
    """A 1×1 convolution whose inputs are scaled by a style: [n, inputs, h, w] → [n, C, h, w]."""

    def __init__(self, inputs: int, channels: int, style_size: int) -> None:
        super().__init__()
        self.style = EqualizedLinear(style_size, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.gain = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Takes x and styles w [n, s]."""
        return functional.conv2d(x * _channels(self.style(w)), self.weight * self.gain, self.bias)


class Mapping(nn.Module):
    """Latents z [n, latent_size] and labels → styles w [n, s].

    Args:
        latent_size: numbers in a latent.
        num_classes: 0 for none.
        style_size: s.
        layers: how many.
        rate: multiplies their learning rate.
    """

    def __init__(
        self, latent_size: int, num_classes: int, style_size: int, layers: int, rate: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, latent_size) if num_classes else None
        inputs = latent_size * (2 if num_classes else 1)
        sizes = [inputs, *[style_size] * layers]
        self.layers = nn.ModuleList(
            EqualizedLinear(before, after, rate=rate) for before, after in pairwise(sizes)
        )

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """See the class."""
        x = _to_unit_variance(latents)
        if self.embedding is not None:
            assert labels is not None
            x = torch.cat([x, _to_unit_variance(self.embedding(labels))], dim=1)
        for layer in self.layers:
            x = _activate(layer(x))
        return x


def _to_unit_variance(x: Tensor) -> Tensor:
    """Each row over its root mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


class StyleGAN2Generator(nn.Module):
    """Latents [n, latent_size] → pictures [n, C, H, W], unbounded, in about [−1, 1].

    Args:
        latent_size: numbers in a latent.
        sample_shape: (C, H, W).
        num_classes: 0 for none.
        widths: channels from coarse to fine, one more than the picture is doubled.
        style_size: s.
        mapping_layers: of the mapping network.
        pixel_noise: whether noise is added at every pixel.
        style_mixing: share of the samples, in training, whose finer layers get the styles of a
            second latent.

    Attributes:
        noise_size: standard normal numbers that :meth:`forward` takes of each sample; may be 0.
        mapping: gives the styles, at which path lengths are measured.
    """

    def __init__(
        self,
        latent_size: int,
        sample_shape: tuple[int, ...],
        num_classes: int,
        widths: list[int],
        style_size: int,
        mapping_layers: int,
        pixel_noise: bool,
        style_mixing: float,
    ) -> None:
        super().__init__()
        channels, height, width = sample_shape
        times = len(widths) - 1
        self.mapping = Mapping(latent_size, num_classes, style_size, mapping_layers, rate=0.01)
        coarsest = height >> times, width >> times
        self.constant = nn.Parameter(torch.randn(widths[0], *coarsest))
        # One layer at the coarsest size, two at each other, the first of which doubles it.
        layers = [StyledConv2d(widths[0], widths[0], style_size, up=False)]
        sizes = [coarsest]
        for level, (before, after) in enumerate(pairwise(widths), start=1):
            layers.append(StyledConv2d(before, after, style_size, up=True))
            layers.append(StyledConv2d(after, after, style_size, up=False))
            sizes += [(coarsest[0] << level, coarsest[1] << level)] * 2
        self.layers = nn.ModuleList(layers)
        self.to_image = nn.ModuleList(ToImage(c, channels, style_size) for c in widths)
        self.style_mixing, self.latent_size = style_mixing, latent_size
        self._noise_shapes = [(1, *size) for size in sizes] if pixel_noise else []
        self._mixing_size = latent_size + 1 if style_mixing else 0
        self.noise_size = self._mixing_size + sum(map(math.prod, self._noise_shapes))

    def forward(
        self, latents: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Pictures [n, C, H, W].

        Args:
            latents: [n, latent_size].
            labels: int64 [n] if conditional.
            noise: standard normal [n, noise_size], or None.
        """
        styles = self.mapping(latents, labels)
        w = [styles] * (len(self.layers) + 1)  # of each layer, and of the last ToPicture
        pixels: list[Tensor | None] = [None] * len(self.layers)
        if noise is not None:
            mixing, rest = noise.split([self._mixing_size, noise.shape[1] - self._mixing_size], 1)
            if self.training and self.style_mixing:
                w = self._mixed(w, mixing, labels)
            if self._noise_shapes:
                parts = rest.split([*map(math.prod, self._noise_shapes)], dim=1)
                pixels = [
                    part.unflatten(1, shape)
                    for part, shape in zip(parts, self._noise_shapes, strict=True)
                ]
        x = self.constant.expand(latents.shape[0], -1, -1, -1)
        x = self.layers[0](x, w[0], pixels[0])
        image = self.to_image[0](x, w[1])
        for level, to_image in enumerate(self.to_image[1:], start=1):
            for i in (2 * level - 1, 2 * level):
                x = self.layers[i](x, w[i], pixels[i])
            image = functional.interpolate(image, scale_factor=2, mode="bilinear")
            image = image + to_image(x, w[2 * level + 1])
        return image

    def _mixed(self, w: list[Tensor], mixing: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Styles by layer, from some layer on those of a second latent.

        ``mixing``: standard normal [n, latent_size + 1].
        """
        second = self.mapping(mixing[:, 1:], labels)
        # Uniform below ``style_mixing`` becomes a layer from 1 on; above it, none.
        first_layer = 1 + uniform(mixing[:, :1]) / self.style_mixing * (len(w) - 1)
        return [torch.where(i >= first_layer.floor(), second, mine) for i, mine in enumerate(w)]


class _Block(nn.Module):
    """[n, inputs, h, w] → [n, outputs, h/2, w/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = EqualizedConv2d(inputs, inputs, 3)
        self.second = EqualizedConv2d(inputs, outputs, 3, down=True)
        self.skip = EqualizedConv2d(inputs, outputs, 1, bias=False, down=True)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        change = _activate(self.second(_activate(self.first(x))))
        return (self.skip(x) + change) / math.sqrt(2)


class StyleGAN2Discriminator(nn.Module):
    """Pictures [n, C, H, W] → logits [n]; labels by projection (Miyato & Koyama 2018).

    Args:
        sample_shape: (C, H, W).
        num_classes: 0 for none.
        widths: channels from fine to coarse.
        minibatch_deviation: whether a last feature map tells how far the samples differ, which
            couples them.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int,
        widths: list[int],
        minibatch_deviation: bool,
    ) -> None:
        super().__init__()
        channels, height, width = sample_shape
        times = len(widths) - 1
        places = (height >> times) * (width >> times)
        last = widths[-1]
        self.start = EqualizedConv2d(channels, widths[0], 1)
        self.blocks = nn.Sequential(*(_Block(before, after) for before, after in pairwise(widths)))
        self.deviation = MinibatchDeviation() if minibatch_deviation else nn.Identity()
        self.mix = EqualizedConv2d(last + (1 if minibatch_deviation else 0), last, 3)
        self.gather = EqualizedLinear(last * places, last)
        self.finish = EqualizedLinear(last, 1)
        self.embedding = nn.Embedding(num_classes, last) if num_classes else None

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Pictures [n, C, H, W], labels int64 [n] if conditional → logits [n]."""
        x = self.blocks(_activate(self.start(samples)))
        x = _activate(self.mix(self.deviation(x)))
        features = _activate(self.gather(x.flatten(1)))
        return to_logits(features, labels, self.finish, self.embedding)


class MinibatchDeviation(nn.Module):
    """One more feature map: the samples' standard deviation, averaged over all features.

    Karras et al. 2018, over the whole batch. [n, c, h, w] → [n, c + 1, h, w]. It couples the
    samples of a batch.
    """

    couples_samples = True

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        deviation = (x.var(dim=0, correction=0) + EPSILON).sqrt().mean()
        return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], dim=1)


def _widths(sample_shape: tuple[int, ...], capacity: int, max_width: int) -> list[int]:
    """Channels from fine to coarse: ``capacity`` over the shorter side, at most ``max_width``."""
    times = require_halvings(sample_shape, "stylegan2", least=1)
    side = min(sample_shape[1:])
    return [min(capacity // (side >> level), max_width) for level in range(times + 1)]


@generators.register("stylegan2")
def stylegan2_generator(
    *,
    latent_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
    capacity: int = 16384,
    max_width: int = 512,
    style_size: int = 512,
    mapping_layers: int = 8,
    pixel_noise: bool = True,
    style_mixing: float = 0.0,
) -> nn.Module:
    """``capacity``/side channels where the pictures' shorter side is that, at most ``max_width``.

    The defaults are the paper's for 256 × 256, with ``latent_size = 512``; ``style_mixing`` is 0.9
    there. ``pixel_noise`` draws a number for every pixel of every layer.
    """
    widths = _widths(sample_shape, capacity, max_width)[::-1]
    return StyleGAN2Generator(
        latent_size,
        sample_shape,
        num_classes,
        widths,
        style_size,
        mapping_layers,
        pixel_noise,
        style_mixing,
    )


@discriminators.register("stylegan2")
def stylegan2_discriminator(
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    capacity: int = 16384,
    max_width: int = 512,
    minibatch_deviation: bool = False,
) -> nn.Module:
    """``capacity``/side channels where the pictures' shorter side is that, at most ``max_width``.

    ``minibatch_deviation``, which the paper has, can't be split over workers.
    """
    widths = _widths(sample_shape, capacity, max_width)
    return StyleGAN2Discriminator(sample_shape, num_classes, widths, minibatch_deviation)

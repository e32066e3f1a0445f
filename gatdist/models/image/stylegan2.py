"""StyleGAN2 (Karras et al. 2020) in plain torch, so that all second derivatives exist.

A mapping network turns latents z into styles w. The synthesis network starts from a constant and
scales its channels by styles, layer by layer, with noise added per pixel. Learning rates are
equalized: weights have unit variance and are scaled in the forward (Karras et al. 2018).

Legend: n samples, c channels, h × w pixels, s numbers in a style.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.layers import label_embedding, to_logits, uniform
from gatdist.models.registry import discriminators, generators, require_halvings

_SLOPE = 0.2
_TAPS = (1.0, 3.0, 3.0, 1.0)
EPSILON = 1e-8


class EqualizedLinear(nn.Module):
    """W x + b, [n, inputs] → [n, outputs], from b = ``bias``; learning rates × ``rate``."""

    def __init__(self, inputs: int, outputs: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.gain, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.gain, self.bias * self.rate)


class EqualizedConv2d(nn.Module):
    """A convolution, [n, inputs, h, w] → [n, outputs, h, w], or half of h and w with ``down``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, down: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain, self.down = 1 / math.sqrt(inputs * kernel**2), down
        self.blur = Blur(kernel // 2 + 1) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        padding = 0 if self.down else self.weight.shape[2] // 2
        stride = 2 if self.down else 1
        return functional.conv2d(self.blur(x), self.weight * self.gain, self.bias, stride, padding)


class Blur(nn.Module):
    """The filter [1, 3, 3, 1] both ways, with sum ``gain`` and zero padding p.

    [n, c, h, w] → [n, c, h + 2p − 3, w + 2p − 3].
    """

    taps: Tensor

    def __init__(self, padding: int, gain: float = 1.0) -> None:
        super().__init__()
        taps = torch.tensor(_TAPS)
        taps = taps[:, None] * taps
        self.register_buffer("taps", taps * (gain / taps.sum()), persistent=False)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        taps = self.taps.to(x.dtype).expand(channels, 1, -1, -1)
        return functional.conv2d(x, taps, padding=self.padding, groups=channels)


class StyledConv2d(nn.Module):
    """Modulated 3×3 convolution: inputs are scaled by a style, outputs to unit variance.

    [n, inputs, h, w] → [n, outputs, h, w], or 2h × 2w with ``up``. Scales inputs and outputs, which
    equals the paper's scaling of the weights by sample and needs no grouped convolution.
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
        x = self.convolve(x, w)
        if noise is not None:  # [n, 1, h, w] of the output's size
            x = x + self.noise_strength * noise
        return _activate(x + self.bias[:, None, None])

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        """Apply the modulated convolution alone, without noise, bias and activation."""
        style, weight = self.style(w), self.weight * self.gain
        # Σ over inputs and taps of (weight · style)², [n, outputs].
        power = style.square() @ weight.square().sum(dim=(2, 3)).T
        x = x * style[:, :, None, None]
        if self.up:  # [n, outputs, 2h + 1, 2w + 1], which the blur makes 2h × 2w
            x = self.blur(functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        else:
            x = functional.conv2d(x, weight, padding=1)
        return x * (power + EPSILON).rsqrt()[:, :, None, None]


class ToImage(nn.Module):
    """A 1×1 convolution whose inputs are scaled by a style: [n, inputs, h, w] → [n, C, h, w]."""

    def __init__(self, inputs: int, channels: int, style_size: int) -> None:
        super().__init__()
        self.style = EqualizedLinear(style_size, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.gain = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.style(w)[:, :, None, None]
        return functional.conv2d(x * style, self.weight * self.gain, self.bias)


class Mapping(nn.Module):
    """Latents z [n, latent_size] and labels → styles w [n, s], with learning rates × ``rate``."""

    def __init__(
        self, latent_size: int, num_classes: int, style_size: int, layers: int, rate: float
    ) -> None:
        super().__init__()
        self.embedding = label_embedding(num_classes, latent_size)
        inputs = latent_size * (2 if num_classes else 1)
        sizes = [inputs, *[style_size] * layers]
        self.layers = nn.ModuleList(
            EqualizedLinear(before, after, rate=rate) for before, after in pairwise(sizes)
        )

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        x = _to_unit_variance(latents)
        if self.embedding is not None:
            assert labels is not None
            x = torch.cat([x, _to_unit_variance(self.embedding(labels))], dim=1)
        for layer in self.layers:
            x = _activate(layer(x))
        return x


def _activate(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, _SLOPE) * math.sqrt(2)


def _to_unit_variance(x: Tensor) -> Tensor:
    """Divide each row by its root mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


def _widths(sample_shape: tuple[int, ...], capacity: int, max_width: int) -> list[int]:
    """Return channels from fine to coarse: ``capacity``/side, at most ``max_width``."""
    times = require_halvings(sample_shape, "stylegan2", least=1)
    side = min(sample_shape[1:])
    return [min(capacity // (side >> level), max_width) for level in range(times + 1)]


@generators.register("stylegan2")
class StyleGAN2Generator(nn.Module):
    """StyleGAN2 (Karras et al. 2020): latents [n, latent_size] → images [n, C, H, W], unbounded.

    ``capacity``/side channels where the shorter side is that, at most ``max_width``; styles of
    ``style_size`` from ``mapping_layers`` layers. The defaults are the paper's for 256 × 256, with
    ``latent_size = 512``, except ``style_mixing``: the share of training samples whose finer layers
    get the styles of a second latent, 0.9 in the paper. ``pixel_noise`` adds noise per pixel and
    layer.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        widths = _widths(sample_shape, capacity, max_width)[::-1]
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
        """``noise`` is [n, noise_size]; None adds none and mixes no styles."""
        styles = self.mapping(latents, labels)
        w = [styles] * (len(self.layers) + 1)  # of each layer, and of the last ToImage
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
        """Return styles by layer, from a random layer on those of a second latent."""
        second = self.mapping(mixing[:, 1:], labels)
        # A uniform number below ``style_mixing`` gives a layer from 1 on; one above it, none.
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
        change = _activate(self.second(_activate(self.first(x))))
        return (self.skip(x) + change) / math.sqrt(2)


@discriminators.register("stylegan2")
class StyleGAN2Discriminator(nn.Module):
    """StyleGAN2 (Karras et al. 2020): images [n, C, H, W] → logits [n].

    ``capacity`` and ``max_width`` as for the generator. ``minibatch_deviation``, which the paper
    uses, couples samples, so that the batch can't be split over workers.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        capacity: int = 16384,
        max_width: int = 512,
        minibatch_deviation: bool = False,
    ) -> None:
        super().__init__()
        widths = _widths(sample_shape, capacity, max_width)
        channels, *size = sample_shape
        places = math.prod(side >> (len(widths) - 1) for side in size)
        last = widths[-1]
        self.start = EqualizedConv2d(channels, widths[0], 1)
        self.blocks = nn.Sequential(*(_Block(before, after) for before, after in pairwise(widths)))
        self.deviation = MinibatchDeviation() if minibatch_deviation else nn.Identity()
        self.mix = EqualizedConv2d(last + (1 if minibatch_deviation else 0), last, 3)
        self.gather = EqualizedLinear(last * places, last)
        self.finish = EqualizedLinear(last, 1)
        self.embedding = label_embedding(num_classes, last)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.blocks(_activate(self.start(samples)))
        x = _activate(self.mix(self.deviation(x)))
        features = _activate(self.gather(x.flatten(1)))
        return to_logits(features, labels, self.finish, self.embedding)


class MinibatchDeviation(nn.Module):
    """Append the samples' standard deviation, averaged over all features, as a feature map.

    Karras et al. 2018, over the whole batch: [n, c, h, w] → [n, c + 1, h, w].
    """

    couples_samples = True

    def forward(self, x: Tensor) -> Tensor:
        deviation = (x.var(dim=0, correction=0) + EPSILON).sqrt().mean()
        return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], dim=1)

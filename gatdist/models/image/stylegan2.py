"""StyleGAN2 (Karras et al. 2020) in plain torch, so that all second derivatives exist.

A mapping network turns latents z into styles w. The synthesis network starts from a constant and
scales its channels by styles, layer by layer, with noise added per pixel. Learning rates are
equalized: weights have unit variance and are scaled in the forward (Karras et al. 2018). Operators
and initial weights are those of StyleGAN2-ADA's published code, but for what serves its mixed
precision (``conv_clamp``, scaling of styles and weights by their largest).

Legend: n samples, c channels, h × w pixels, s numbers in a style.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.models.image.resampling import blur, downsample, upsample
from gatdist.models.layers import to_conditional_logits, uniform, without_autocast
from gatdist.models.registry import discriminators, generators, require_halvings
from gatdist.nn import (
    conv2d,
    conv2d_leaky_relu,
    conv_transpose2d,
    fuses,
    leaky_relu,
    styled_leaky_relu,
)

_SLOPE = 0.2
# Of activations, and applied before them: gain · leaky_relu(x) = leaky_relu(gain · x).
_GAIN = math.sqrt(2)
_LABEL_LAYERS = 8  # of the discriminator's mapping of labels
_RATE = 0.01  # of mapping networks
EPSILON = 1e-8


class EqualizedLinear(nn.Module):
    """(W x + b) · ``gain``, [n, inputs] → [n, outputs], from b = ``bias``.

    Learning rates are multiplied by ``rate``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: float = 0.0,
        rate: float = 1.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.bias_scale = gain * rate / math.sqrt(inputs), gain * rate

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.T, beta=self.bias_scale, alpha=self.scale)


class LabelEmbedding(EqualizedLinear):
    """W x + b of one-hot labels x: int64 [n] → [n, outputs]."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.weight.T) * self.scale + self.bias


class EqualizedConv2d(nn.Module):
    """A convolution times ``gain``, [n, inputs, h, w] → [n, outputs, h, w] without a stride."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain, self.scale = gain, gain / math.sqrt(inputs * kernel**2)

    def forward(self, x: Tensor, *, stride: int = 1, activates: bool = False) -> Tensor:
        """``stride`` does without padding; ``activates`` adds a leaky ReLU."""
        padding = self.weight.shape[2] // 2 if stride == 1 else 0
        bias = self.bias if self.bias is None or self.gain == 1 else self.bias * self.gain
        layer = x, self.weight * self.scale, bias, stride, padding
        return conv2d_leaky_relu(*layer, negative_slope=_SLOPE) if activates else conv2d(*layer)


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
        self.up = up

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        x, scale = self.convolve(x, self.style(w))
        if fuses(x):
            strength = None if noise is None else self.noise_strength
            return styled_leaky_relu(x, scale, self.bias, noise, strength, _SLOPE, _GAIN)
        x = torch.addcmul((_GAIN * self.bias)[:, None, None], x, (_GAIN * scale)[:, :, None, None])
        if noise is not None:  # [n, 1, h, w] of the output's size
            x = x + (_GAIN * self.noise_strength) * noise
        return leaky_relu(x, _SLOPE)

    def convolve(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """Return the convolution, and factors [n, outputs] that give it unit variance."""
        # Σ over inputs and taps of (weight · style)², [n, outputs].
        power = style.square() @ self.weight.square().sum(dim=(2, 3)).T
        scale = (power + EPSILON).rsqrt()
        x = x * style[:, :, None, None]
        if self.up:  # [n, outputs, 2h + 1, 2w + 1], which the blur makes 2h × 2w
            x = conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)
            return blur(x, padding=1), 4 * scale
        return conv2d(x, self.weight, padding=1), scale


class ToImage(nn.Module):
    """A 1×1 convolution modulated by a style: [n, inputs, h, w] → [n, C, h, w].

    One matrix product per sample, which reads its input once and is several times as fast on CPUs.
    """

    def __init__(self, inputs: int, channels: int, style_size: int) -> None:
        super().__init__()
        self.style = EqualizedLinear(style_size, inputs, bias=1.0, gain=1 / math.sqrt(inputs))
        self.weight = nn.Parameter(torch.randn(channels, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        weight = self.weight.flatten(1) * self.style(w)[:, None]  # [n, C, inputs]
        pixels = x.flatten(2)  # [n, inputs, hw]
        if x.stride(1) == 1:  # channels last, as the image then is
            image = torch.baddbmm(self.bias, pixels.mT, weight.mT).mT
        else:
            image = torch.baddbmm(self.bias[:, None], weight, pixels)
        return image.unflatten(2, x.shape[2:])


class Mapping(nn.Module):
    """Latents z [n, latent_size] and labels → styles w [n, s], with learning rates × 0.01.

    ``latent_size`` is 0, and z None, for styles of labels alone. Computed in the dtype of the
    weights, also under autocast.
    """

    def __init__(self, latent_size: int, num_classes: int, style_size: int, layers: int) -> None:
        super().__init__()
        self.embedding = LabelEmbedding(num_classes, style_size) if num_classes else None
        inputs = latent_size + (style_size if num_classes else 0)
        sizes = [inputs, *[style_size] * layers]
        self.layers = nn.ModuleList(
            EqualizedLinear(before, after, rate=_RATE, gain=_GAIN)
            for before, after in pairwise(sizes)
        )

    def forward(self, latents: Tensor | None, labels: Tensor | None) -> Tensor:
        weight = next(self.parameters())
        with without_autocast(weight.device.type):
            inputs = [] if latents is None else [_to_unit_variance(latents.to(weight.dtype))]
            if self.embedding is not None:
                inputs.append(_to_unit_variance(self.embedding(labels)))
            x = torch.cat(inputs, dim=1)
            for layer in self.layers:
                x = leaky_relu(layer(x), _SLOPE)
            return x


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
    layer. Labels are embedded as in StyleGAN2-ADA (Karras et al. 2020).
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
        self.mapping = Mapping(latent_size, num_classes, style_size, mapping_layers)
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
        # Its output [n, layers + 1, s] is what the penalty path_length differentiates by. The last
        # style is of the last ToImage; others share that of the layer after them.
        self.styles = nn.Identity()
        self.style_mixing, self.latent_size = style_mixing, latent_size
        self._noise_shapes = [(1, *size) for size in sizes] if pixel_noise else []
        self._mixing_size = latent_size + 1 if style_mixing else 0
        self.noise_size = self._mixing_size + sum(map(math.prod, self._noise_shapes))

    def forward(
        self, latents: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """``noise`` is [n, noise_size]; None adds none and mixes no styles."""
        styles = self.mapping(latents, labels)[:, None].expand(-1, len(self.layers) + 1, -1)
        pixels: list[Tensor | None] = [None] * len(self.layers)
        if noise is not None:
            mixing, rest = noise.split([self._mixing_size, noise.shape[1] - self._mixing_size], 1)
            if self.training and self.style_mixing:
                styles = self._mixed(styles, mixing, labels)
            if self._noise_shapes:
                parts = rest.split([*map(math.prod, self._noise_shapes)], dim=1)
                pixels = [
                    part.unflatten(1, shape)
                    for part, shape in zip(parts, self._noise_shapes, strict=True)
                ]
        w = self.styles(styles).unbind(1)
        x = self.constant.expand(latents.shape[0], -1, -1, -1)
        x = self.layers[0](x, w[0], pixels[0])
        image = self.to_image[0](x, w[1])
        for level, to_image in enumerate(self.to_image[1:], start=1):
            for i in (2 * level - 1, 2 * level):
                x = self.layers[i](x, w[i], pixels[i])
            image = upsample(image) + to_image(x, w[2 * level + 1])
        return image

    def _mixed(self, styles: Tensor, mixing: Tensor, labels: Tensor | None) -> Tensor:
        """Return styles [n, layers + 1, s], from a random layer on those of a second latent.

        The layer is drawn per sample, by the published code once per worker and batch.
        """
        second = self.mapping(mixing[:, 1:], labels)[:, None]
        # A uniform number below ``style_mixing`` gives a layer from 1 on; one above it, none.
        count = styles.shape[1]
        first_layer = 1 + uniform(mixing[:, :1]) / self.style_mixing * (count - 1)
        layer = torch.arange(count, device=styles.device)
        return torch.where((layer >= first_layer.floor())[:, :, None], second, styles)


class _Block(nn.Module):
    """[n, inputs, h, w] → [n, outputs, h/2, w/2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = EqualizedConv2d(inputs, inputs, 3, gain=_GAIN)
        self.second = EqualizedConv2d(inputs, outputs, 3)  # · √2, then the mean over √2
        self.skip = EqualizedConv2d(inputs, outputs, 1, bias=False, gain=1 / math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        change = blur(self.first(x, activates=True), 2)
        change = self.second(change, stride=2, activates=True)
        return self.skip(downsample(x)) + change


@discriminators.register("stylegan2")
class StyleGAN2Discriminator(nn.Module):
    """StyleGAN2 (Karras et al. 2020): images [n, C, H, W] → logits [n].

    ``capacity`` and ``max_width`` as for the generator. ``minibatch_deviation``: samples per group
    of the minibatch standard deviation, 4 or 8 in the paper's recipes; 0: none. Labels go through a
    mapping network, as in StyleGAN2-ADA (Karras et al. 2020).
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        capacity: int = 16384,
        max_width: int = 512,
        minibatch_deviation: int = 0,
    ) -> None:
        super().__init__()
        widths = _widths(sample_shape, capacity, max_width)
        channels, *size = sample_shape
        places = math.prod(side >> (len(widths) - 1) for side in size)
        last = widths[-1]
        outputs = last if num_classes else 1
        self.start = EqualizedConv2d(channels, widths[0], 1, gain=_GAIN)
        # From coarse to fine, so that the same weights have the same names at any resolution.
        self.blocks = nn.ModuleList(
            _Block(before, after) for after, before in pairwise(widths[::-1])
        )
        self.deviation: nn.Module = nn.Identity()
        if minibatch_deviation:
            self.deviation = MinibatchDeviation(minibatch_deviation)
        self.mix = EqualizedConv2d(last + (1 if minibatch_deviation else 0), last, 3, gain=_GAIN)
        self.gather = EqualizedLinear(last * places, last, gain=_GAIN)
        self.finish = EqualizedLinear(last, outputs)
        self.embedding = Mapping(0, num_classes, last, _LABEL_LAYERS) if num_classes else None

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.start(samples, activates=True)
        for block in reversed(self.blocks):
            x = block(x)
        with without_autocast(x.device.type):  # as published, and on few pixels
            x = self.deviation(x.to(self.mix.weight.dtype))
            x = self.mix(x, activates=True)
            features = leaky_relu(self.gather(x.flatten(1)), _SLOPE)
        embedded = None if self.embedding is None else self.embedding(None, labels)
        return to_conditional_logits(features, embedded, self.finish, features.shape[1] ** -0.5)


class MinibatchDeviation(nn.Module):
    """Append the standard deviation within groups of samples, averaged over features, as a map.

    Karras et al. 2018: [n, c, h, w] → [n, c + 1, h, w]. Of m groups, sample i is in group i mod m.
    If ``group`` does not divide n, the last n mod ``group`` samples form a group of their own.
    """

    def __init__(self, group: int) -> None:
        super().__init__()
        if group < 2:
            raise ConfigError(
                "model.discriminator.minibatch_deviation",
                "must be at least 2 samples, or 0 for none",
                value=group,
                hint="Use 4",
            )
        self.couples_samples = group

    def forward(self, x: Tensor) -> Tensor:
        rest = len(x) % self.couples_samples
        deviations = [
            self._deviations(part, min(len(part), self.couples_samples))
            for part in x.split([len(x) - rest, rest])
            if len(part)
        ]
        places = torch.cat(deviations)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return torch.cat([x, places], dim=1)

    @staticmethod
    def _deviations(x: Tensor, group: int) -> Tensor:
        """Return each sample's deviation within its group, [n]; n is a multiple of ``group``."""
        variances = x.unflatten(0, (group, -1)).var(dim=0, correction=0)  # [n / group, c, h, w]
        return (variances + EPSILON).sqrt().mean(dim=(1, 2, 3)).repeat(group)

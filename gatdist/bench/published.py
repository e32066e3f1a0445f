"""Networks that compute with the operators of their authors' published code, for comparisons.

They share the parameters of a network of gatdist, and compute the same function: torch's own
convolutions with their own derivatives, zeros, padding and depthwise convolutions for resampling,
and separate operators for bias, activation and gain. Those are the plain torch operators of R3GAN
and StyleGAN2-ADA-PyTorch; the CUDA extensions that the authors' code compiles are not here.

Legend: n samples, c channels, h × w pixels.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist import nn as own
from gatdist.models.image.r3gan import R3GANDiscriminator, R3GANGenerator
from gatdist.models.image.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from gatdist.models.layers import to_conditional_logits, uniform, without_autocast

_SLOPE = 0.2
_EPSILON = 1e-8
_MAPPING_RATE = 0.01
_TAPS = (1.0, 3.0, 3.0, 1.0)


def with_published_operators(network: nn.Module, *, by_sample: bool = False) -> nn.Module:
    """Return a network with the parameters of ``network`` and the operators of published code.

    Other networks than R3GAN and StyleGAN2 get torch's own convolutions.

    Args:
        network: Of gatdist; the result shares its parameters.
        by_sample: Whether StyleGAN2's modulated convolutions are grouped convolutions with weights
            by sample, as in the paper. StyleGAN2-ADA-PyTorch scales inputs and outputs in training.
    """
    match network:
        case R3GANGenerator():
            return _R3GANGenerator(network)
        case R3GANDiscriminator():
            return _R3GANDiscriminator(network)
        case StyleGAN2Generator():
            return _StyleGAN2Generator(network, by_sample=by_sample)
        case StyleGAN2Discriminator():
            return _StyleGAN2Discriminator(network)
    network = copy.deepcopy(network)
    for module in network.modules():
        for kind in ("Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"):
            if type(module) is getattr(own, kind):
                module.__class__ = getattr(nn, kind)
    return network


# Operators


def resample(
    x: Tensor, *, up: int = 1, down: int = 1, padding: tuple[int, int], gain: float = 1.0
) -> Tensor:
    """Insert zeros, pad both axes, apply the filter [1, 3, 3, 1] with sum 1, skip pixels."""
    n, c, h, w = x.shape
    if up > 1:
        x = x.reshape(n, c, h, 1, w, 1)
        x = functional.pad(x, [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    x = functional.pad(x, [*padding, *padding])
    kernel = _kernel(x.device, x.dtype, gain).repeat(c, 1, 1, 1)
    return functional.conv2d(x, kernel, groups=c)[:, :, ::down, ::down]


_kernels: dict[tuple[torch.device, torch.dtype, float], Tensor] = {}


def _kernel(device: torch.device, dtype: torch.dtype, gain: float) -> Tensor:
    key = device, dtype, gain
    if key not in _kernels:
        taps = torch.tensor(_TAPS, dtype=torch.float64) / sum(_TAPS)
        _kernels[key] = (gain * torch.outer(taps, taps))[None, None].to(device, dtype)
    return _kernels[key]


def biased(x: Tensor, bias: Tensor, gain: float = 1.0) -> Tensor:
    """Add the bias of each channel, apply the leaky ReLU, multiply by ``gain``."""
    x = functional.leaky_relu(x + bias.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2)), _SLOPE)
    return x if gain == 1 else x * gain


# R3GAN


def _block(block: Any, x: Tensor) -> Tensor:
    y = biased(functional.conv2d(x, block.widen.weight), block.widen.bias)
    grouped = block.grouped
    y = functional.conv2d(y, grouped.weight, padding=1, groups=grouped.groups)
    return x + functional.conv2d(biased(y, grouped.bias), block.narrow.weight)


def _blocks(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = _block(block, x)
    return x


def _transition(layer: Any, x: Tensor) -> Tensor:
    return x if isinstance(layer, nn.Identity) else functional.conv2d(x, layer.weight)


class _Network(nn.Module):
    """Shares the parameters of a network."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        if hasattr(network, "noise_size"):
            self.noise_size = network.noise_size


class _R3GANGenerator(_Network):
    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        net = self.network
        if net.embedding is not None:
            latents = torch.cat([latents, net.embedding(labels)], dim=1)
        x = net.basis * net.at(0, net.start, latents)[:, :, None, None]
        x = net.at(0, partial(_blocks, net.stages[0]), x)
        for i, layer in enumerate(net.transitions, 1):
            x = net.at(i, partial(_transition, layer), x)
            x = net.at(i, lambda x: resample(x, up=2, padding=(2, 1), gain=4), x)
            x = net.at(i, partial(_blocks, net.stages[i]), x)
        return functional.conv2d(x, net.finish.weight)


class _R3GANDiscriminator(_Network):
    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        net = self.network
        x = functional.conv2d(samples, net.start.weight)
        for i in reversed(range(1, len(net.stages))):
            x = net.at(i, partial(_blocks, net.stages[i]), x)
            x = net.at(i, lambda x: resample(x, down=2, padding=(1, 1)), x)
            x = net.at(i, partial(_transition, net.transitions[i - 1]), x)
        x = net.at(0, partial(_blocks, net.stages[0]), x)
        features = (x * net.basis).sum(dim=(2, 3))
        embedded = None if net.embedding is None else net.embedding(labels)
        return to_conditional_logits(features, embedded, net.finish)


# StyleGAN2


def _normalized(x: Tensor) -> Tensor:
    return x * (x.square().mean(dim=1, keepdim=True) + _EPSILON).rsqrt()


def _linear(layer: Any, x: Tensor, rate: float = 1.0) -> Tensor:
    """Apply a layer with an equalized learning rate, times ``rate``."""
    weight = layer.weight * (rate / math.sqrt(layer.weight.shape[1]))
    return torch.addmm(layer.bias * rate, x, weight.t())


def _activated_linear(layer: Any, x: Tensor, rate: float = 1.0) -> Tensor:
    weight = layer.weight * (rate / math.sqrt(layer.weight.shape[1]))
    return biased(x.matmul(weight.t()), layer.bias * rate, math.sqrt(2))


def _mapped(mapping: Any, latents: Tensor | None, labels: Tensor | None) -> Tensor:
    weight = mapping.layers[0].weight
    with without_autocast(weight.device.type):
        inputs = [] if latents is None else [_normalized(latents.to(weight.dtype))]
        if mapping.embedding is not None:
            layer = mapping.embedding
            one_hot = functional.one_hot(_labels(labels), layer.weight.shape[1]).to(weight.dtype)
            inputs.append(_normalized(_linear(layer, one_hot)))
        x = torch.cat(inputs, dim=1)
        for layer in mapping.layers:
            x = _activated_linear(layer, x, _MAPPING_RATE)
        return x


def _labels(labels: Tensor | None) -> Tensor:
    assert labels is not None
    return labels


def _styled(layer: Any, x: Tensor, w: Tensor, noise: Tensor | None, *, by_sample: bool) -> Tensor:
    """Apply a modulated convolution with noise, bias and activation."""
    style, weight, up = _linear(layer.style, w), layer.weight, layer.up
    n, c, h, width = x.shape
    modulated = weight[None] * style[:, None, :, None, None]  # [n, outputs, c, 3, 3]
    scale = (modulated.square().sum(dim=(2, 3, 4)) + _EPSILON).rsqrt()
    if by_sample:
        modulated = modulated * scale[:, :, None, None, None]
        x = x.reshape(1, n * c, h, width)
        if up:
            kernels = modulated.transpose(1, 2).flatten(0, 1)  # [n · c, outputs, 3, 3]
            x = functional.conv_transpose2d(x, kernels, stride=2, groups=n)
        else:
            x = functional.conv2d(x, modulated.flatten(0, 1), padding=1, groups=n)
        x = x.reshape(n, -1, *x.shape[2:])
        x = resample(x, padding=(1, 1), gain=4) if up else x
    else:
        x = x * style[:, :, None, None]
        if up:
            x = functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            x = resample(x, padding=(1, 1), gain=4)
        else:
            x = functional.conv2d(x, weight, padding=1)
        x = x * scale[:, :, None, None]
    if noise is not None:
        x = x + noise * layer.noise_strength
    return biased(x, layer.bias, math.sqrt(2))


def _to_image(layer: Any, x: Tensor, w: Tensor) -> Tensor:
    style = _linear(layer.style, w) * (1 / math.sqrt(layer.weight[0].numel()))
    x = functional.conv2d(x * style[:, :, None, None], layer.weight)
    return x + layer.bias.to(x.dtype)[:, None, None]


class _StyleGAN2Generator(_Network):
    def __init__(self, network: Any, *, by_sample: bool) -> None:
        super().__init__(network)
        self.by_sample = by_sample
        self.styles = nn.Identity()  # whose outputs the penalty path_length differentiates by
        sizes = [network.constant.shape[1:]]
        for layer in network.layers[1:]:
            factor = 2 if layer.up else 1
            sizes.append(torch.Size(factor * side for side in sizes[-1]))
        self.mixing_size = network.latent_size + 1 if network.style_mixing else 0
        has_noise = self.noise_size > self.mixing_size
        self.shapes = [(1, *size) for size in sizes] if has_noise else []

    def forward(
        self, latents: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        net = self.network
        count = len(net.layers) + 1
        styles = _mapped(net.mapping, latents, labels)[:, None].repeat(1, count, 1)
        pixels: list[Tensor | None] = [None] * len(net.layers)
        if noise is not None:
            mixing, *rest = noise.split([self.mixing_size, *map(math.prod, self.shapes)], 1)
            if self.training and net.style_mixing:
                first = 1 + uniform(mixing[:, :1]) / net.style_mixing * (count - 1)
                layers = torch.arange(count, device=styles.device)
                second = _mapped(net.mapping, mixing[:, 1:], labels)[:, None]
                styles = torch.where((layers >= first.floor())[:, :, None], second, styles)
            for i, (part, shape) in enumerate(zip(rest, self.shapes, strict=True)):
                pixels[i] = part.unflatten(1, shape)
        w = self.styles(styles).unbind(1)
        x = net.constant[None].repeat(len(latents), 1, 1, 1)
        x = _styled(net.layers[0], x, w[0], pixels[0], by_sample=self.by_sample)
        image = _to_image(net.to_image[0], x, w[1])
        for level, layer in enumerate(net.to_image[1:], start=1):
            for i in (2 * level - 1, 2 * level):
                x = _styled(net.layers[i], x, w[i], pixels[i], by_sample=self.by_sample)
            image = resample(image, up=2, padding=(2, 1), gain=4)
            image = image + _to_image(layer, x, w[2 * level + 1])
        return image


def _convolved(layer: Any, x: Tensor, *, down: bool = False) -> Tensor:
    weight = layer.weight * (1 / math.sqrt(layer.weight[0].numel()))
    size = weight.shape[2]
    if not down:
        return functional.conv2d(x, weight, padding=size // 2)
    if size == 1:
        return functional.conv2d(resample(x, down=2, padding=(1, 1)), weight)
    return functional.conv2d(resample(x, padding=(2, 2)), weight, stride=2)


class _StyleGAN2Discriminator(_Network):
    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        net, gain = self.network, math.sqrt(2)
        x = biased(_convolved(net.start, samples), net.start.bias, gain)
        for block in reversed(net.blocks):
            skip = _convolved(block.skip, x, down=True) * math.sqrt(0.5)
            x = biased(_convolved(block.first, x), block.first.bias, gain)
            # The gain is √2 of the activation times √½ of the mean of both ways.
            x = skip + biased(_convolved(block.second, x, down=True), block.second.bias)
        with without_autocast(x.device.type):
            x = net.deviation(x.to(net.mix.weight.dtype))
            x = biased(_convolved(net.mix, x), net.mix.bias, gain)
            features = _activated_linear(net.gather, x.flatten(1))
            outputs = _linear(net.finish, features)
            if net.embedding is None:
                return outputs[:, 0]
            embedded = _mapped(net.embedding, None, labels)
            return (outputs * embedded).sum(1) / math.sqrt(features.shape[1])

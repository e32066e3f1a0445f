"""Networks as one writes them who trains in one process: what hand-written loops train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from gatdist.config import Config
from gatdist.models import build_networks
from gatdist.models.image.stylegan2 import EPSILON, StyledConv2d
from gatdist.models.layers import normalizable


def reference_networks(config: Config, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """The configured networks, without classes, by the most obvious means.

    * Spectral normalization is torch's own, which iterates in every forward.
    * StyleGAN2's convolutions have weights of each sample, as the paper has them.
    * Noise is drawn where it is needed, from torch's generator.

    Args:
        config: names them.
        shape: of a sample.

    Returns:
        Generator and discriminator.
    """
    plain = config.model.model_copy(update={"spectral_norm": []})
    generator, discriminator = build_networks(config.model_copy(update={"model": plain}), shape, 0)
    for player, network in (("generator", generator), ("discriminator", discriminator)):
        if player in config.model.spectral_norm:
            for module in normalizable(network):
                spectral_norm(module)
        _convolve_by_sample(network)
    return with_noise(generator), with_noise(discriminator)


def with_noise(network: nn.Module) -> nn.Module:
    """The network, called without the noise that it takes, if any: it is drawn for it."""
    return _WithNoise(network) if getattr(network, "noise_size", 0) else network


class _WithNoise(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        noise = torch.randn(x.shape[0], self.network.noise_size, device=x.device)  # type: ignore[call-overload]
        return self.network(x, None, noise)


def _convolve_by_sample(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, StyledConv2d):
                outputs, inputs = child.weight.shape[:2]
                style_size = child.style.weight.shape[1]
                replacement = _WeightsBySample(inputs, outputs, style_size, up=child.up)
                replacement.load_state_dict(child.state_dict())
                setattr(parent, name, replacement)


class _WeightsBySample(StyledConv2d):
    """One grouped convolution whose groups are the samples (Karras et al. 2020)."""

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        """As its base class."""
        n, inputs = x.shape[:2]
        weight = self.weight * self.gain * self.style(w)[:, None, :, None, None]  # [n, o, i, 3, 3]
        weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + EPSILON).rsqrt()
        together = x.reshape(1, n * inputs, *x.shape[2:])
        if self.up:
            turned = weight.transpose(1, 2).flatten(0, 1)  # [n·i, o, 3, 3]
            x = functional.conv_transpose2d(together, turned, stride=2, groups=n)
        else:
            x = functional.conv2d(together, weight.flatten(0, 1), padding=1, groups=n)
        blurred: Tensor = self.blur(x.unflatten(1, (n, -1))[0])
        return blurred

"""Networks as one writes them who trains in one process: what hand-written loops train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from gatdist.config import Config
from gatdist.models import build_networks
from gatdist.models.pictures.stylegan2 import StyledConv2d
from gatdist.models.spectral import normalizable


def straightforward_networks(config: Config, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
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
    found = {"generator": generator, "discriminator": discriminator}
    for player, network in found.items():
        if player in config.model.spectral_norm:
            for module in normalizable(network):
                spectral_norm(module)
        _convolve_by_sample(network)
    return tuple(  # type: ignore[return-value]
        _WithNoise(network) if getattr(network, "noise_size", 0) else network
        for network in found.values()
    )


class _WithNoise(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        noise = torch.randn(x.shape[0], self.network.noise_size)  # type: ignore[call-overload]
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

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """As its base class."""
        n, inputs = x.shape[:2]
        weight = self.weight * self.gain * self.style(w)[:, None, :, None, None]  # [n, o, i, 3, 3]
        weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        together = x.reshape(1, n * inputs, *x.shape[2:])
        if self.up:
            turned = weight.transpose(1, 2).flatten(0, 1)  # [n·i, o, 3, 3]
            x = functional.conv_transpose2d(together, turned, stride=2, groups=n)
        else:
            x = functional.conv2d(together, weight.flatten(0, 1), padding=1, groups=n)
        x = self.blur(x.unflatten(1, (n, -1))[0])
        if noise is not None:
            x = x + self.noise_strength * noise
        return functional.leaky_relu(x + self.bias[:, None, None], 0.2) * 2**0.5

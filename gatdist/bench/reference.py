"""Reference implementations of the step: loops as written by hand in torch for one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm

from gatdist.bench.cases import Case, Overrides, Size
from gatdist.config import Config, PlayerOptimConfig
from gatdist.models import COMPUTE_DTYPES, build_networks
from gatdist.models.image.resampling import blur
from gatdist.models.image.stylegan2 import EPSILON, StyledConv2d
from gatdist.models.layers import normalizable


class ReferenceCase(Case):
    """Networks, optimizers and batch of a reference loop; ``overrides`` set the precision."""

    def __init__(self, size: Size, overrides: Overrides | None = None, device: str = "cpu") -> None:
        self.size = size
        self.config = size.config(overrides or {})
        self.generator, self.discriminator = reference_networks(self.config, size.shape)
        self.generator.to(device)
        self.discriminator.to(device)
        self.real = size.real(self.config).to(device)
        self.g_optimizer = adam(self.generator.parameters(), self.config.optim.generator)
        self.d_optimizer = adam(self.discriminator.parameters(), self.config.optim.discriminator)

    def latents(self) -> Tensor:
        """Draw standard normal [batch, latent_size]."""
        latent_size = self.config.model.latent_size
        return torch.randn(self.size.batch, latent_size, device=self.real.device)


def adam(parameters: Iterable[Tensor], config: PlayerOptimConfig) -> torch.optim.Adam:
    """Return the fused Adam of a player's settings."""
    return torch.optim.Adam(
        parameters,
        lr=config.learning_rate.at(0),
        betas=(config.betas[0].at(0), config.betas[1].at(0)),
        eps=config.eps,
        fused=True,
    )


class Bare(ReferenceCase):
    """The bare loop, the unit of all ratios; D is frozen in the generator's phase.

    Fakes are generated twice, once without a graph, which takes least memory: 4 g + 8 d, g and d
    being the costs of one forward pass.
    """

    def __init__(self, size: Size, overrides: Overrides | None = None, device: str = "cpu") -> None:
        super().__init__(size, overrides, device)
        self._dtype = COMPUTE_DTYPES.get(self.config.precision.dtype)

    def step(self) -> None:
        latents = self.latents()
        with torch.no_grad(), self._autocast():
            fakes = self.generator(latents)
        self.step_discriminator(fakes)
        with self._autocast():
            fakes = self.generator(latents)
        self.step_generator(fakes)

    def step_discriminator(self, fakes: Tensor) -> None:
        self.d_optimizer.zero_grad()
        with self._autocast():
            real, fake = self.discriminator(self.real), self.discriminator(fakes)
        loss = softplus(-real.float()) + softplus(fake.float())
        loss.mean().backward()
        self.d_optimizer.step()

    def step_generator(self, fakes: Tensor) -> None:
        self.g_optimizer.zero_grad()
        self.discriminator.requires_grad_(False)
        with self._autocast():
            fake = self.discriminator(fakes)
        softplus(-fake.float()).mean().backward()
        self.g_optimizer.step()
        self.discriminator.requires_grad_(True)

    def _autocast(self) -> AbstractContextManager[object]:
        kind = self.real.device.type
        return torch.autocast(kind, self._dtype) if self._dtype else nullcontext()


class BareReusing(Bare):
    """Generates fakes once, and keeps their graph in memory for the second phase: 3 g + 8 d."""

    def step(self) -> None:
        with self._autocast():
            fakes = self.generator(self.latents())
        self.step_discriminator(fakes.detach())
        self.step_generator(fakes)


class Plain(ReferenceCase):
    """A loop as in torch's DCGAN tutorial; ``wrap`` makes a network distributed.

    D is not frozen in the generator's phase, so its gradients are computed and sent in vain:
    3 g + 9 d.
    """

    def __init__(self, size: Size, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(size)
        self.networks = wrap(self.generator), wrap(self.discriminator)

    def step(self) -> None:
        generator, discriminator = self.networks
        fakes = generator(self.latents())
        self.d_optimizer.zero_grad()
        real, fake = discriminator(self.real), discriminator(fakes.detach())
        loss = softplus(-real).mean() + softplus(fake).mean()
        loss.backward()
        self.d_optimizer.step()
        self.g_optimizer.zero_grad()
        loss = softplus(-discriminator(fakes)).mean()
        loss.backward()
        self.g_optimizer.step()


def reference_networks(config: Config, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Build the configured networks with torch's spectral norm and weights per sample.

    Noise is drawn in every forward pass, from torch's generator.
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
    """Wrap a network that takes noise, so that it is drawn in every forward pass."""
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

    def convolve(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        n, inputs = x.shape[:2]
        weight = self.weight * style[:, None, :, None, None]  # [n, o, i, 3, 3]
        weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + EPSILON).rsqrt()
        together = x.reshape(1, n * inputs, *x.shape[2:])
        if self.up:
            transposed = weight.transpose(1, 2).flatten(0, 1)  # [n·i, o, 3, 3]
            x = functional.conv_transpose2d(together, transposed, stride=2, groups=n)
        else:
            x = functional.conv2d(together, weight.flatten(0, 1), padding=1, groups=n)
        x = x.unflatten(1, (n, -1))[0]
        return 4 * blur(x, padding=1) if self.up else x, x.new_ones(1, 1)

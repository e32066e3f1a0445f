"""A preset's training step as written by hand in torch, without gatdist's game and training.

Networks, spectral norms and augmentation are gatdist's; losses, penalties, optimizers, autocast and
the moving average are written out. Tests compare its weights with those of gatdist's own step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from gatdist.bench.cases import Case
from gatdist.config import Config, PlayerOptimConfig
from gatdist.game.augmentation import build_augmentation
from gatdist.models import COMPUTE_DTYPES
from gatdist.models.layers import normalized_weights

# By name, the losses [n] of the discriminator and of the generator from real and fake logits [n].
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "hinge": (lambda real, fake: relu(1 - real) + relu(1 + fake), lambda real, fake: -fake),
    "least_squares": (
        lambda real, fake: (real - 1).square() + fake.square(),
        lambda real, fake: (fake - 1).square(),
    ),
    "nonsaturating": (
        lambda real, fake: softplus(-real) + softplus(fake),
        lambda real, fake: softplus(-fake),
    ),
    "relativistic": (
        lambda real, fake: softplus(fake - real),
        lambda real, fake: softplus(real - fake),
    ),
    "wasserstein": (lambda real, fake: fake - real, lambda real, fake: -fake),
}
_PATH_LENGTH_DECAY = 0.99


class Rows(NamedTuple):
    """Some samples of a step: real [n, ...], labels [n] or None, positions [n] in the run."""

    real: Tensor
    labels: Tensor | None
    positions: Tensor


class HandWritten(Case):
    """Alternating descent with Adam, for the losses and penalties of the presets.

    Args:
        config: The rule, the losses and the optimizers; float16 is not supported.
        real: Samples of a step on their device.
        networks: Generator and discriminator on the device.
        labels: Of the samples, or None.
    """

    def __init__(
        self,
        config: Config,
        real: Tensor,
        networks: tuple[nn.Module, nn.Module],
        labels: Tensor | None = None,
    ) -> None:
        self.config, self.device, self.samples_seen = config, real.device, 0
        self.generator, self.discriminator = networks
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.rows = Rows(real, labels, torch.arange(len(real), device=real.device))
        self.augmentation = build_augmentation(config, tuple(real.shape[1:]), real.device)
        self.signs: list[Tensor] = []
        self.d_loss, self.g_loss = LOSSES[config.game.loss]
        self.separate = config.game.lazy_penalties == "separate"
        self.mean_length = torch.zeros((), device=real.device)
        self.g_optimizer = _optimizer(self.generator, config.optim.generator)
        self.d_optimizer = _optimizer(self.discriminator, config.optim.discriminator)
        self.fakes: Tensor | None = None  # with their graph, for the generator's phase

    def at(self, step: int) -> None:
        """Make ``step`` the index of the next step."""
        self.samples_seen = step * self.config.step_samples

    def step(self) -> None:
        config = self.config
        self.set_optimizers()
        if self.augmentation is not None:
            self.augmentation.follow(self.samples_seen)
        real, labels, positions = self.rows
        positions = positions + self.samples_seen
        size = config.run.global_batch
        batches = [
            Rows(real[i : i + size], None if labels is None else labels[i : i + size], rows)
            for i, rows in zip(range(0, len(real), size), positions.split(size), strict=True)
        ]
        last = config.generator_batch
        of_generator = Rows(
            real[-last:], None if labels is None else labels[-last:], positions[-last:]
        )
        if config.game.order == "generator_first":
            self.step_generator(of_generator)
        for rows in batches:
            self.step_discriminator(rows)
        if config.game.order == "discriminator_first":
            self.step_generator(of_generator)
        self.step_penalties(batches[-1])
        self.update_average()
        self.update_augmentation()
        self.samples_seen += config.step_samples

    # The two players

    def step_discriminator(self, rows: Rows) -> None:
        latents = self.latents("latents", rows.positions)
        if self.config.game.reuse_fakes:
            self.fakes = self.generate(latents, rows)
            fakes = self.fakes.detach()
        else:
            with torch.no_grad():
                fakes = self.generate(latents, rows)
        due = self.due(separate=False)
        real = rows.real.detach().requires_grad_("r1" in due)
        fakes.requires_grad_("r2" in due)
        real_logits = self.discriminate(real, rows, "real")
        fake_logits = self.discriminate(fakes, rows, "fake")
        loss = self.d_loss(real_logits, fake_logits).mean()
        if "r1" in due:
            loss = loss + due["r1"] * half_squared_gradient(real, real_logits).mean()
        if "r2" in due:
            loss = loss + due["r2"] * half_squared_gradient(fakes, fake_logits).mean()
        if "wgan_gp" in due:
            loss = loss + due["wgan_gp"] * self.gradient_penalty(rows, fakes).mean()
        self.signs.append(real_logits.detach().sign().mean())
        self.d_optimizer.zero_grad()
        loss.backward()
        self.d_optimizer.step()
        advance_spectral_norms(self.discriminator)

    def step_generator(self, rows: Rows) -> None:
        self.discriminator.requires_grad_(False)
        fakes, self.fakes = self.fakes, None
        if fakes is None:
            shared = self.config.game.latents == "shared"
            stream = "latents" if shared else "latents/generator"
            fakes = self.generate(self.latents(stream, rows.positions), rows)
        fake_logits = real_logits = self.discriminate(fakes, rows, "generator")
        if self.config.game.loss == "relativistic":
            with torch.no_grad():
                real_logits = self.discriminate(rows.real, rows, "real")
        self.g_optimizer.zero_grad()
        self.g_loss(real_logits, fake_logits).mean().backward()
        self.g_optimizer.step()
        advance_spectral_norms(self.generator)
        self.discriminator.requires_grad_(True)

    def step_penalties(self, rows: Rows) -> None:
        """Make the optimizer steps of lazy penalties, one for each player."""
        due = self.due(separate=True)
        if "path_length" in due:
            self.g_optimizer.zero_grad()
            (due["path_length"] * self.path_length(rows)).backward()
            self.g_optimizer.step()
            advance_spectral_norms(self.generator)
        if "r1" in due:
            real = rows.real.detach().requires_grad_()
            logits = self.discriminate(real, rows, "real")
            # Zero times the logits gives gradients to parameters that the penalty does not have.
            penalty = due["r1"] * half_squared_gradient(real, logits) + 0 * logits
            self.d_optimizer.zero_grad()
            penalty.mean().backward()
            self.d_optimizer.step()
            advance_spectral_norms(self.discriminator)

    # Penalties

    def due(self, *, separate: bool) -> dict[str, float]:
        """Return the factors of the penalties of this step, by name."""
        step = self.samples_seen // self.config.step_samples
        return {
            name: penalty.strength.at(self.samples_seen) * penalty.every_steps
            for name, penalty in self.config.game.penalties.items()
            if step % penalty.every_steps == 0
            and (self.separate and penalty.every_steps > 1) == separate
        }

    def gradient_penalty(self, rows: Rows, fakes: Tensor) -> Tensor:
        share = self.uniform("between", rows.positions, [1] * (fakes.dim() - 1))
        between = (share * rows.real + (1 - share) * fakes).detach().requires_grad_()
        logits = self.discriminate(between, rows, "between")
        (gradient,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square()

    def path_length(self, rows: Rows) -> Tensor:
        found: list[Tensor] = []
        layer: Any = self.generator.styles
        handle = layer.register_forward_hook(lambda module, inputs, out: found.append(out))
        fakes = self.generate(self.latents("latents", rows.positions), rows)
        handle.remove()
        (styles,) = found
        noise = self.normal("projections", rows.positions, fakes.shape[1:])
        scalars = (fakes * noise).flatten(1).sum(1) / math.sqrt(math.prod(fakes.shape[2:]))
        (gradient,) = torch.autograd.grad(scalars.sum(), styles, create_graph=True)
        lengths = gradient.square().sum(2).mean(1).sqrt()
        penalty = (lengths - self.mean_length).square() + 0 * scalars
        mean = lengths.detach().mean().to(self.mean_length.dtype)
        # Not in place: the graph of the penalty holds the old value.
        self.mean_length = self.mean_length.lerp(mean, 1 - _PATH_LENGTH_DECAY)
        return penalty.mean()

    # Networks

    def generate(self, latents: Tensor, rows: Rows) -> Tensor:
        noise = self.noise(self.generator, "generator", rows)
        with self.autocast():
            fakes: Tensor = self.generator(latents, rows.labels, *noise)
        return fakes.to(rows.real.dtype)

    def discriminate(self, samples: Tensor, rows: Rows, side: str) -> Tensor:
        shown = samples
        if self.augmentation is not None:
            seed, stream = self.config.run.seed, f"augmentation/{side}"
            shown = self.augmentation(samples, seed, stream, rows.positions)
        noise = self.noise(self.discriminator, f"discriminator/{side}", rows)
        with self.autocast():
            logits: Tensor = self.discriminator(shown, rows.labels, *noise)
        return logits.to(samples.dtype)

    def autocast(self) -> AbstractContextManager[object]:
        dtype = COMPUTE_DTYPES.get(self.config.precision.dtype)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    # Random numbers, named by stream

    def latents(self, stream: str, positions: Tensor) -> Tensor:
        """Draw [n, latent_size]."""
        shape = [self.config.model.latent_size]
        if self.config.model.latent_distribution == "uniform":
            return 2 * self.uniform(stream, positions, shape) - 1
        return self.normal(stream, positions, shape)

    def noise(self, network: nn.Module, stream: str, rows: Rows) -> tuple[Tensor, ...]:
        size = getattr(network, "noise_size", 0)
        return (self.normal(f"{stream}/noise", rows.positions, [size]),) if size else ()

    def normal(self, stream: str, positions: Tensor, shape: Any) -> Tensor:
        """Draw [n, *shape] standard normal."""
        real = self.rows.real
        return torch.randn(len(positions), *shape, device=self.device, dtype=real.dtype)

    def uniform(self, stream: str, positions: Tensor, shape: Any) -> Tensor:
        """Draw [n, *shape] uniform in (0, 1)."""
        real = self.rows.real
        return torch.rand(len(positions), *shape, device=self.device, dtype=real.dtype)

    # Schedules and averages

    def set_optimizers(self) -> None:
        """Set the learning rates and betas of this step."""
        for player, optimizer in (
            ("generator", self.g_optimizer),
            ("discriminator", self.d_optimizer),
        ):
            settings: PlayerOptimConfig = getattr(self.config.optim, player)
            correction = self.correction(player)
            group = optimizer.param_groups[0]
            group["lr"] = correction * settings.learning_rate.at(self.samples_seen)
            betas = (beta.at(self.samples_seen) ** correction for beta in settings.betas)
            group["betas"] = tuple(betas)

    def correction(self, player: str) -> float:
        """Return k / (k + 1) for a player with an additional step every k steps, else 1."""
        names = ("path_length",) if player == "generator" else ("r1",)
        penalties = self.config.game.penalties
        every = [penalties[n].every_steps for n in names if n in penalties] if self.separate else []
        return math.prod(k / (k + 1) for k in every if k > 1)

    @torch.no_grad()
    def update_average(self) -> None:
        half_life = self.config.game.ema_half_life_samples.at(self.samples_seen)
        weight = 1 - 0.5 ** (self.config.step_samples / half_life) if half_life else 1.0
        mine: list[Tensor] = list(self.average.parameters())
        theirs: list[Tensor] = list(self.generator.parameters())
        torch._foreach_lerp_(mine, theirs, weight)
        buffers = list(self.average.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(self.generator.buffers()))

    def update_augmentation(self) -> None:
        if self.augmentation is not None and self.augmentation.tags:
            step = self.samples_seen // self.config.step_samples
            means = {self.augmentation.tags[0]: torch.stack(self.signs).mean()}
            self.augmentation.update(means, step, self.config.run.global_batch)
        self.signs.clear()


def _optimizer(network: nn.Module, settings: PlayerOptimConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if settings.weight_decay else torch.optim.Adam
    decay = settings.weight_decay
    return kind(network.parameters(), eps=settings.eps, weight_decay=decay, fused=True)


def half_squared_gradient(inputs: Tensor, logits: Tensor) -> Tensor:
    """½ ‖∇ₓ D(x)‖² for each sample, [n]."""
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1)


def advance_spectral_norms(network: nn.Module) -> None:
    """Do one power iteration of each weight."""
    for normalization, weight in normalized_weights(network):
        normalization.advance(weight)

"""A step of translation or of a vocoder as written by hand in torch, as published code has it.

The generator runs once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, pad

from gatdist.bench.handwritten import (
    HandWritten,
    Rows,
    advance_spectral_norms,
    half_squared_gradient,
)
from gatdist.config import Config
from gatdist.models.spectrograms import slaney_bands

Parts = list[list[Tensor]]  # of a discriminator: feature maps, with the logits last


class HandWrittenConditional(HandWritten):
    """Alternating descent with Adam and shared fakes, for the tasks and terms of the presets.

    Args:
        config: The losses, R1 in the discriminator's step, and the optimizers; no augmentation.
        fields: Of the samples of a step, on their device; clips have the length of a crop.
        networks: Generator and discriminator on the device.
        sample_rate: Of audio, in hertz.

    Attributes:
        freezes: Whether the discriminator is frozen in the generator's step. In the code of
            HiFi-GAN it is not: its gradients are computed, and discarded.
    """

    freezes = True

    def __init__(
        self,
        config: Config,
        fields: Mapping[str, Tensor],
        networks: tuple[nn.Module, nn.Module],
        sample_rate: int = 0,
    ) -> None:
        self.target, *_ = fields
        super().__init__(config, fields[self.target], networks)
        self.data, self.options = fields, config.game.task.options
        self.bands: dict[float, Tensor] = {}
        self.sample_rate = sample_rate

    def step(self) -> None:
        self.set_optimizers()
        positions = self.rows.positions + self.samples_seen
        rows = Rows(self.rows.real, None, positions)
        real = self.prepare(rows)
        fakes = self.fakes_of(real, rows)
        self.step_on_parts(real, real | {self.target: fakes.detach()})
        self.step_with_terms(real, real | {self.target: fakes})
        self.update_average()
        self.samples_seen += self.config.step_samples

    # The task

    def prepare(self, rows: Rows) -> dict[str, Tensor]:
        if self.target == "wave":
            return {**self.data, "mel": self.log_mel(self.data["wave"], self.options)}
        if not self.options.get("flip"):
            return dict(self.data)
        flipped = (self.uniform("task/flip", rows.positions, []) < 0.5)[:, None, None, None]
        return {name: torch.where(flipped, x.flip(3), x) for name, x in self.data.items()}

    def fakes_of(self, real: Mapping[str, Tensor], rows: Rows) -> Tensor:
        inputs = real["mel" if self.target == "wave" else "input"]
        noise = self.noise(self.generator, "generator", rows)
        with self.autocast():
            fakes: Tensor = self.generator(inputs, None, *noise)
        return fakes.to(rows.real.dtype)

    def shown(self, fields: Mapping[str, Tensor]) -> Tensor:
        target = fields[self.target]
        return torch.cat([fields["input"], target], 1) if self.target == "target" else target

    def parts(self, shown: Tensor) -> Parts:
        with self.autocast():
            found: Parts = self.discriminator(shown, None)
        for part in found:
            part[-1] = part[-1].to(shown.dtype)
        return found

    # The two players

    def step_on_parts(self, real: Mapping[str, Tensor], fake: Mapping[str, Tensor]) -> None:
        due = self.due(separate=False)
        shown = self.shown(real).detach().requires_grad_("r1" in due)
        theirs, mine = self.parts(shown), self.parts(self.shown(fake))
        pairs = zip(theirs, mine, strict=True)
        loss = torch.stack([self.d_loss(a[-1], b[-1]).mean() for a, b in pairs]).sum()
        if "r1" in due:
            scalars = torch.stack([part[-1].flatten(1).mean(1) for part in theirs]).sum(0)
            loss = loss + due["r1"] * half_squared_gradient(shown, scalars).mean()
        self.d_optimizer.zero_grad()
        loss.backward()
        self.d_optimizer.step()
        advance_spectral_norms(self.discriminator)

    def step_with_terms(self, real: Mapping[str, Tensor], fake: Mapping[str, Tensor]) -> None:
        self.discriminator.requires_grad_(not self.freezes)
        theirs: Parts = []
        if "features" in self.config.game.terms:
            with torch.no_grad():
                theirs = self.parts(self.shown(real))
        mine = self.parts(self.shown(fake))
        loss = torch.stack([self.g_loss(b[-1], b[-1]).mean() for b in mine]).sum()
        for name, term in self.config.game.terms.items():
            weight = term.weight.at(self.samples_seen)
            a, b = real[self.target], fake[self.target]
            if name == "features":
                last = None if term.options.get("logits") else -1
                for part, other in zip(theirs, mine, strict=True):
                    for x, y in zip(part[:last], other[:last], strict=True):
                        loss = loss + weight * (y - x).abs().mean()
            elif name == "log_mel":
                mels = [self.log_mel(x, term.options) for x in (b, a)]
                loss = loss + weight * l1_loss(mels[0], mels[1])
            else:
                loss = loss + weight * l1_loss(b, a)
        self.g_optimizer.zero_grad()
        loss.backward()
        self.g_optimizer.step()
        self.discriminator.requires_grad_(True)

    def log_mel(self, clips: Tensor, options: Mapping[str, float]) -> Tensor:
        """Return [n, bands, frames]."""
        size, hop = (int(options.get(name, n)) for name, n in (("window", 1024), ("hop", 256)))
        highest = options.get("highest") or self.sample_rate / 2
        if highest not in self.bands:
            bands = slaney_bands(self.sample_rate, int(options.get("bands", 80)), size, highest)
            self.bands[highest] = bands.to(clips)
        padding = (size - hop) // 2
        spectra = torch.stft(
            pad(clips, (padding, padding), "reflect")[:, 0],
            size,
            hop,
            window=torch.hann_window(size, dtype=clips.dtype, device=clips.device),
            center=False,
            return_complex=True,
        )
        magnitude = (spectra.real.square() + spectra.imag.square() + 1e-9).sqrt()
        return (self.bands[highest] @ magnitude).clamp_min(1e-5).log()

"""The presets as they run on one of several GPUs, for benchmarks and budgets of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.bench.cases import layout
from gatdist.bench.handwritten import HandWritten
from gatdist.bench.handwritten_conditional import HandWrittenConditional
from gatdist.config import Config, load_config
from gatdist.game.build import build_networks_of, build_task
from gatdist.models import DTYPES


@dataclass(frozen=True)
class PresetCase:
    """A preset on one GPU.

    Attributes:
        preset: Its name.
        shape: Of one sample.
        classes: Of the data; 0 if unlabelled.
        batch: Samples per GPU and discriminator step; None: the global batch, on one GPU.
        metadata: Of the samples, passed to the networks.
        settings: Further ``KEY=VALUE`` of the configuration.
    """

    preset: str
    shape: tuple[int, ...]
    classes: int = 0
    batch: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()

    def config(self, settings: Sequence[str] = ()) -> Config:
        """Return the run of this GPU alone: its global batch is the batch of the GPU.

        Raises:
            ConfigError: The settings are wrong.
        """
        batch = [] if self.batch is None else [f"run.global_batch={self.batch}"]
        return load_config(self.preset, [*batch, *self.settings, *settings])

    def small(self) -> PresetCase:
        """Return the same losses, penalties and layers with tiny networks and samples.

        They take a fraction of a second per step on one CPU core.
        """
        config = self.config()
        shape, settings = _SMALL.get(config.model.generator.name, (self.shape, ()))
        if config.game.generator_batch is not None:
            ratio = config.generator_batch // config.run.global_batch
            settings = (*settings, f"game.generator_batch={ratio * _SMALL_BATCH}")
        fields = self.metadata.get("fields", {})
        smaller = {name: (other[0], *shape[1:]) for name, other in fields.items()}
        return replace(
            self,
            shape=shape,
            classes=min(self.classes, 4),
            batch=_SMALL_BATCH,
            metadata={**self.metadata, **({"fields": smaller} if smaller else {})},
            settings=settings,
        )

    def real(self, config: Config, device: torch.device) -> Tensor:
        """Return random samples of one step, in [−1, 1]."""
        generator = torch.Generator().manual_seed(0)
        real = torch.rand(config.step_samples, *self.shape, generator=generator) * 2 - 1
        real = real.to(device, DTYPES[config.precision.dtype])
        return real.contiguous(memory_format=layout(config, real))

    def inputs(self, config: Config, device: torch.device) -> dict[str, Tensor]:
        """Return the further fields of random samples of one step, in [−1, 1]."""
        fields = self.metadata.get("fields", {})
        return {
            name: replace(self, shape=shape).real(config, device) for name, shape in fields.items()
        }

    def networks(self, config: Config) -> tuple[nn.Module, nn.Module]:
        """Build the generator and the discriminator."""
        task = build_task(config, self.shape, self.metadata)
        return build_networks_of(config, task, self.shape, self.classes, self.metadata)

    def hand_written(
        self, config: Config, device: torch.device, networks: tuple[nn.Module, nn.Module]
    ) -> HandWritten:
        """Return the hand-written step of these networks, which are on the device."""
        real = self.real(config, device)
        if config.game.task.name == "generation":
            return HandWritten(config, real, networks, self.labels(config, device))
        target = build_task(config, self.shape, self.metadata).target
        fields = {target: real, **self.inputs(config, device)}
        rate = self.metadata.get("sample_rate", 0)
        return HandWrittenConditional(config, fields, networks, rate)

    def labels(self, config: Config, device: torch.device) -> Tensor | None:
        """Return random labels of one step, int64, if the networks take any."""
        if not config.model.conditional:
            return None
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.classes, (config.step_samples,), generator=generator).to(device)


_SMALL_BATCH = 8


def _both(**options: object) -> tuple[str, ...]:
    """Return settings of both networks."""
    return tuple(
        f"model.{player}.{key}={value}"
        for player in ("generator", "discriminator")
        for key, value in options.items()
    )


_SMALL_VOCODER = (
    'model.discriminator={name="hifigan", periods=[2, 3], scales=2, period_width=2, '
    "scale_width=16}",
    'game.task={name="vocoder", crop=512, hop=16, window=64, bands=8, highest=3000.0}',
    "game.terms.log_mel={weight=45.0, hop=16, window=64, bands=8}",
)
# By network, the shape of a small sample, and what makes the networks small.
_SMALL: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "biggan": (
        (3, 32, 32),
        (
            *_both(width=4, attention_side=16),
            "model.generator.label_size=8",
            "model.latent_size=24",
        ),
    ),
    "hifigan": (
        (1, 512),
        (
            'model.generator={name="hifigan", version="v3", upsampling=[4, 4], width=8}',
            *_SMALL_VOCODER,
        ),
    ),
    "r3gan": ((3, 16, 16), _both(width=8, max_width=16, group_width=8, blocks=1)),
    "sngan": ((3, 32, 32), _both(width=4)),
    "stylegan2": (
        (3, 16, 16),
        (
            *_both(capacity=128, max_width=16),
            *(f"model.generator.{key}" for key in ("style_size=16", "mapping_layers=2")),
            "model.latent_size=16",
        ),
    ),
    "unet": ((3, 32, 32), (*_both(width=4), "game.task.crop=32")),
    "vocos": (
        (1, 512),
        (
            'model.generator={name="vocos", width=8, hidden=16, blocks=2}',
            *_SMALL_VOCODER,
        ),
    ),
    "wavegan": ((1, 1024), _both(width=2)),
}

_SPEECH = {"modality": "audio", "sample_rate": 22050}


def _translated(channels: int, side: int) -> dict[str, Any]:
    return {"modality": "image", "fields": {"input": (channels, side, side)}}


_CASES = (
    # With 8 GPUs in presets of 256 or 512 samples, else 64 GPUs.
    PresetCase("biggan-128", (3, 128, 128), 1000, 32),
    PresetCase("digits", (1, 8, 8)),
    PresetCase("digits-conditional", (1, 8, 8), 10),
    PresetCase("emoji-pix2pix", (3, 64, 64), metadata=_translated(1, 64)),
    PresetCase("glyphs", (1, 16, 16), 12),
    PresetCase("glyphs-r3gan", (1, 32, 32)),
    PresetCase("glyphs-stylegan2", (1, 32, 32)),
    PresetCase("hifigan-v1", (1, 8192), metadata=_SPEECH),
    PresetCase("hifigan-v2", (1, 8192), metadata=_SPEECH),
    PresetCase("hifigan-v3", (1, 8192), metadata=_SPEECH),
    PresetCase("pix2pix-256", (3, 256, 256), metadata=_translated(3, 256)),
    PresetCase("prompts-vocos", (1, 4096), metadata={"modality": "audio", "sample_rate": 8000}),
    PresetCase("r3gan-256", (3, 256, 256), 0, 32),
    PresetCase("r3gan-64", (3, 64, 64), 0, 32),
    PresetCase("r3gan-cifar10", (3, 32, 32), 10, 64),
    PresetCase("r3gan-imagenet-32", (3, 32, 32), 1000, 64),
    PresetCase("r3gan-imagenet-64", (3, 64, 64), 1000, 64),
    PresetCase("r3gan-stacked-mnist", (3, 32, 32), 0, 64),
    PresetCase("ring", (2,)),
    PresetCase("sngan-128", (3, 128, 128), 1000),
    PresetCase("sngan-32", (3, 32, 32), 10),
    PresetCase("sngan-64", (3, 64, 64), 1000),
    PresetCase("speech", (1, 4096), 10, metadata={"modality": "audio", "sample_rate": 8000}),
    PresetCase("stylegan2-256", (3, 256, 256), 0, 8),
    PresetCase("stylegan2-auto-256", (3, 256, 256), 0, 8),
    PresetCase("wavegan-16384", (1, 16384), metadata={"modality": "audio", "sample_rate": 16000}),
    PresetCase("words", (27, 12), metadata={"modality": "text"}),
)
PRESETS = {case.preset: case for case in _CASES}

"""Tiny runs of the tasks with inputs, trained for a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gatdist.api import train
from gatdist.config import load_config
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.format.shard_files import write_dataset
from gatdist.storage import Store

RATE, LENGTH, HOP = 8000, 256, 16
SIDE = 16
RUN = [
    *("run.total_samples=24", "run.global_batch=8", "run.log_every_samples=8"),
    *("run.checkpoint_every_samples=16", "run.keep_checkpoints=2", "game.loss=least_squares"),
    *("evaluate.metrics=[]", "evaluate.every_samples=0", "game.penalties={}"),
]
VOCODER = [
    f'game.task={{name="vocoder", crop=128, hop={HOP}, window=64, bands=12, highest=3000.0,'
    " gain=[-9.0, 3.0]}",
    'model.generator={name="hifigan", version="v3", upsampling=[4, 4], width=8}',
    'model.discriminator={name="hifigan", periods=[2, 3], scales=0, period_width=2}',
    f"game.terms={{log_mel={{weight=45.0, hop={HOP}, window=64, bands=12}}}}",
]
TRANSLATION = [
    'game.task={name="translation"}',
    'model.generator={name="unet", width=4}',
    'model.discriminator={name="patchgan", width=4, layers=1}',
    "game.terms={l1={weight=100.0}}",
]


def clip(i: int, length: int = LENGTH) -> np.ndarray:
    """Return a tone with noise, float32 [1, length]."""
    rng = np.random.default_rng(i)
    tone = np.sin(2 * np.pi * np.arange(length) / RATE * 300 * (1 + i % 5))
    return np.float32(tone * 0.5 + 0.05 * rng.normal(size=length))[None]


def image(i: int, *size: int) -> np.ndarray:
    """Return an image of smooth stripes, uint8 [height, width, 1], its sides SIDE by default."""
    height, width = size or (SIDE, SIDE)
    rows, columns = np.mgrid[:height, :width]
    return np.uint8(127 + 120 * np.sin((1 + i % 4) * rows / 9 + columns / 5))[..., None]


def write_pairs(folder: Path, count: int = 16, classes: Sequence[str] = ()) -> None:
    """Write images with their negatives, of three channels; classes in turn."""
    samples = [
        (
            f"{i:04d}",
            {
                "target.png": encode_png(np.repeat(255 - image(i), 3, axis=2)),
                "input.png": encode_png(image(i)),
                **({"cls": str(i % len(classes)).encode()} if classes else {}),
            },
        )
        for i in range(count)
    ]
    inputs = {"modality": "image", "sample_shape": [1, SIDE, SIDE], "component": "input.png"}
    write_dataset(
        Store(str(folder)),
        [samples[: count // 2], samples[count // 2 :]],
        modality="image",
        sample_shape=[3, SIDE, SIDE],
        component="target.png",
        num_classes=len(classes),
        class_names=list(classes) or None,
        fields={"input": inputs},
    )


def write_clips(folder: Path, count: int = 16, channels: int = 1) -> None:
    clips = [np.repeat(clip(i), channels, axis=0) for i in range(count)]
    samples = [(f"{i:03d}", {"wav": encode_wav(one, RATE)}) for i, one in enumerate(clips)]
    write_dataset(
        Store(str(folder)),
        [samples],
        modality="audio",
        sample_shape=(channels, LENGTH),
        sample_rate=RATE,
    )


def train_vocoder(run: Path, *overrides: str) -> Path:
    """Train on clips, and return the run directory."""
    write_clips(run.parent / f"data-of-{run.name}")
    return _train(run, [*VOCODER, *overrides])


def train_translation(run: Path, *overrides: str) -> Path:
    """Train on pairs of images, and return the run directory."""
    write_pairs(run.parent / f"data-of-{run.name}")
    return _train(run, [*TRANSLATION, *overrides])


def _train(run: Path, overrides: list[str]) -> Path:
    data = run.parent / f"data-of-{run.name}"
    config = load_config("digits", [*RUN, f"data.url='{data}'", *overrides])
    train(config, str(run), local=True)
    return run


INPAINTING = """
import torch
from gatdist import Task, register_generator, register_task
from gatdist.nn import Conv2d


@register_task("inpainting")
class Inpainting(Task):
    target = "image"

    def prepare(self, fields, drawn):
        image = fields["image"]
        left = drawn.integers("left", image.shape[3] - 3).view(-1, 1, 1, 1)
        columns = torch.arange(image.shape[3], device=image.device)
        inside = (columns >= left) & (columns < left + 4)
        hole = inside.to(image.dtype).expand(-1, 1, image.shape[2], -1)
        return {"image": image, "hole": hole, "masked": image * (1 - hole)}

    def inputs(self, fields):
        return fields["masked"], fields["hole"]

    def shown(self, fields):
        return torch.cat([fields["image"], fields["hole"]], 1)


@register_generator("filling")
class Filling(torch.nn.Module):
    def __init__(self, *, input_shapes, sample_shape, num_classes: int):
        super().__init__()
        self.layer = Conv2d(sum(s[0] for s in input_shapes), sample_shape[0], 3, padding=1)

    def forward(self, masked, hole, labels):
        return masked + torch.tanh(self.layer(torch.cat([masked, hole], 1))) * hole
"""


def train_inpainting(run: Path, patch: pytest.MonkeyPatch) -> Path:
    """Train a task of a user's module, with two inputs and random numbers."""
    run.parent.joinpath("inpainting_task.py").write_text(INPAINTING)
    patch.syspath_prepend(str(run.parent))
    samples = [(f"{i:03d}", {"png": encode_png(image(i))}) for i in range(16)]
    write_dataset(
        Store(str(run.parent / f"data-of-{run.name}")),
        [samples],
        modality="image",
        sample_shape=(1, SIDE, SIDE),
    )
    overrides = [
        'plugins=["inpainting_task"]',
        'game.task={name="inpainting"}',
        'model.generator={name="filling"}',
        'model.discriminator={name="patchgan", width=4, layers=1}',
    ]
    return _train(run, overrides)


LABELLED = """
import torch
from gatdist import register_generator
from gatdist.nn import Conv2d


@register_generator("labelled")
class Labelled(torch.nn.Module):
    def __init__(self, *, input_shapes, sample_shape, num_classes: int):
        super().__init__()
        self.layer = Conv2d(input_shapes[0][0], sample_shape[0], 3, padding=1)
        self.shift = torch.nn.Embedding(num_classes, sample_shape[0])

    def forward(self, images, labels):
        return torch.tanh(self.layer(images) + self.shift(labels)[:, :, None, None])
"""


def train_labelled(run: Path, patch: pytest.MonkeyPatch) -> Path:
    """Train a class-conditional translation by a user's network, of the classes ant and bee."""
    run.parent.joinpath("labelled_network.py").write_text(LABELLED)
    patch.syspath_prepend(str(run.parent))
    write_pairs(run.parent / f"data-of-{run.name}", classes=["ant", "bee"])
    overrides = [
        *TRANSLATION,
        'plugins=["labelled_network"]',
        "model.conditional=true",
        'model.generator={name="labelled"}',
        'model.discriminator={name="residual", width=4}',
    ]
    return _train(run, overrides)

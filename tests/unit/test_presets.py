"""Presets for data that is not part of the package: each is valid for data of its kind."""

import numpy as np
import pytest

from gatdist.config import load_config
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.format.shard_files import write_dataset
from gatdist.storage import Store
from gatdist.training.plan import plan


def images(folder, size, channels, classes):
    rng = np.random.default_rng(0)
    samples = (
        (f"{i:02d}", {"png": encode_png(pixels), "cls": b"%d" % (i % classes)})
        for i, pixels in enumerate(rng.integers(0, 256, (24, size, size, channels), dtype=np.uint8))
    )
    shape = (channels, size, size)
    store = Store(str(folder))
    write_dataset(store, [samples], modality="image", sample_shape=shape, num_classes=classes)


def clips(folder, length, rate, classes):
    clip = np.zeros((1, length), dtype=np.float32)
    samples = (
        (f"{i:02d}", {"wav": encode_wav(clip, rate), "cls": b"%d" % (i % classes)})
        for i in range(24)
    )
    write_dataset(
        Store(str(folder)),
        [samples],
        modality="audio",
        sample_shape=(1, length),
        sample_rate=rate,
        num_classes=classes,
    )


def words(folder):
    samples = ((f"{i:02d}", {"txt": b"word"}) for i in range(24))
    write_dataset(Store(str(folder)), [samples], modality="text", sample_shape=(12,))


def pairs(folder, size, channels):
    """Write pairs: images of some channels, and in color."""
    rng = np.random.default_rng(0)

    def image(depth):
        return encode_png(rng.integers(0, 256, (size, size, depth), dtype=np.uint8))

    samples = [
        (f"{i:02d}", {"target.png": image(3), "input.png": image(channels)}) for i in range(24)
    ]
    field = {"modality": "image", "sample_shape": [channels, size, size]}
    write_dataset(
        Store(str(folder)),
        [samples],
        modality="image",
        sample_shape=(3, size, size),
        component="target.png",
        fields={"input": {**field, "component": "input.png"}},
    )


# By preset: what writes such data.
PRESETS = {
    "glyphs": lambda folder: images(folder, 16, 1, 12),
    "glyphs-r3gan": lambda folder: images(folder, 32, 1, 12),
    "glyphs-stylegan2": lambda folder: images(folder, 32, 1, 12),
    "words": words,
    "speech": lambda folder: clips(folder, 4096, 8000, 10),
    "sngan-32": lambda folder: images(folder, 32, 3, 10),
    "sngan-64": lambda folder: images(folder, 64, 3, 10),
    "sngan-128": lambda folder: images(folder, 128, 3, 10),
    "biggan-128": lambda folder: images(folder, 128, 3, 12),
    "r3gan-64": lambda folder: images(folder, 64, 3, 1),
    "r3gan-256": lambda folder: images(folder, 256, 3, 1),
    "r3gan-cifar10": lambda folder: images(folder, 32, 3, 10),
    "r3gan-stacked-mnist": lambda folder: images(folder, 32, 3, 1),
    "r3gan-imagenet-32": lambda folder: images(folder, 32, 3, 10),
    "r3gan-imagenet-64": lambda folder: images(folder, 64, 3, 10),
    "stylegan2-256": lambda folder: images(folder, 256, 3, 1),
    "stylegan2-auto-256": lambda folder: images(folder, 256, 3, 1),
    "emoji-pix2pix": lambda folder: pairs(folder, 64, 1),
    "pix2pix-256": lambda folder: pairs(folder, 286, 3),
    "prompts-vocos": lambda folder: clips(folder, 8192, 8000, 1),
    "hifigan-v1": lambda folder: clips(folder, 32768, 22050, 1),
    "hifigan-v2": lambda folder: clips(folder, 32768, 22050, 1),
    "hifigan-v3": lambda folder: clips(folder, 32768, 22050, 1),
    "wavegan-16384": lambda folder: clips(folder, 16384, 16000, 2),
}


# Seconds to a minute each, on a CPU.
SLOW = {name for name in PRESETS if name.startswith(("biggan", "r3gan", "stylegan2", "wavegan"))}
SLOW |= {"pix2pix-256", "hifigan-v1", "hifigan-v2", "hifigan-v3"}
SLOW |= {"sngan-64", "sngan-128"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PRESETS]
)
def test_preset_is_valid_for_data_of_its_kind(name, tmp_path):
    PRESETS[name](tmp_path / "data")
    settings = [f"data.url={tmp_path / 'data'}"]
    if load_config(name).data.held_out:  # of 24 samples
        settings.append("data.held_out=0.5")
    found = plan(load_config(name, settings), str(tmp_path / "run"))
    assert found["steps_to_go"] > 1000

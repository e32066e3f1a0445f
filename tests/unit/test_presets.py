"""Presets for data that does not come with the package: each fits data of its kind."""

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


# By preset: what writes such data, and the millions of parameters of both networks.
PRESETS = {
    "glyphs": (lambda folder: images(folder, 16, 1, 12), None),
    "glyphs-r3gan": (lambda folder: images(folder, 32, 1, 12), None),
    "glyphs-stylegan2": (lambda folder: images(folder, 32, 1, 12), None),
    "words": (words, None),
    "speech": (lambda folder: clips(folder, 4096, 8000, 10), None),
    "sngan-32": (lambda folder: images(folder, 32, 3, 10), (4.30, 1.06)),
    "biggan-128": (lambda folder: images(folder, 128, 3, 12), (70.3, 86.5)),
    "r3gan-64": (lambda folder: images(folder, 64, 3, 1), (25.9, 25.9)),
    "r3gan-256": (lambda folder: images(folder, 256, 3, 1), (23.06, 23.01)),
    "stylegan2-256": (lambda folder: images(folder, 256, 3, 1), (24.77, 24.00)),
    "wavegan-16384": (lambda folder: clips(folder, 16384, 16000, 2), (19.07, 17.43)),
}


# Seconds to a minute each, on a CPU.
SLOW = ("biggan-128", "r3gan-64", "r3gan-256", "stylegan2-256", "wavegan-16384")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PRESETS]
)
def test_a_preset_fits_data_of_its_kind(name, tmp_path):
    write, expected = PRESETS[name]
    write(tmp_path / "data")
    found = plan(load_config(name, [f"data.url={tmp_path / 'data'}"]), str(tmp_path / "run"))
    if expected:
        millions = tuple(count / 1e6 for count in found["parameters"].values())
        assert millions == pytest.approx(expected, abs=0.06)
    assert found["steps_to_go"] > 1000

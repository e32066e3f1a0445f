"""Audio, text and pairs on two hosts: after a killed worker, results equal those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_runs import Runs

from faulty_runs import CANONICAL, TICK, TOTAL
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.format.shard_files import write_dataset
from gatdist.storage import Store

pytestmark = pytest.mark.hosts

RUN = f"""
[run]
total_samples = {TOTAL}
global_batch = 32
log_every_samples = {TICK}
checkpoint_every_samples = {TICK}

[cluster]
heartbeat_timeout_s = 20
straggler_warn_s = 4
backend = "gloo"
"""
PENALTY = "game.penalties.r1={strength=1.0, every_steps=4}"
# The discriminator shuffles phases with random shifts.
AUDIO = """
[model]
latent_size = 8
conditional = true
generator = { name = "wavegan", width = 4 }
discriminator = { name = "wavegan", width = 4 }

[evaluate]
metrics = ["fid", "label_accuracy", "probe"]
every_samples = 6400

[data]
url = "data"
"""
# The generator samples characters with random noise.
TEXT = """
[model]
latent_size = 8
generator = { name = "text_convolutional", width = 16, blocks = 1, temperature = 1.0 }
discriminator = { name = "text_convolutional", width = 16, blocks = 1 }

[evaluate]
metrics = ["jsd", "self_bleu", "novelty"]
every_samples = 6400

[data]
url = "data"
vocabulary = "abc"
"""
# Clips are cropped at random.
VOCODER = """
[model.generator]
name = "hifigan"
version = "v3"
upsampling = [4, 4]
width = 4

[model.discriminator]
name = "hifigan"
periods = [2]
period_width = 2
scales = 0

[game]
task = { name = "vocoder", crop = 128, hop = 16, window = 64, bands = 12 }
loss = "least_squares"
latents = "shared"
reuse_fakes = true
terms.log_mel = { weight = 45.0, hop = 16, window = 64, bands = 12 }
terms.features = { weight = 2.0, logits = true }

[evaluate]
metrics = ["l1"]
every_samples = 6400

[data]
url = "data"
held_out = 0.2
"""
# Pairs are flipped at random, and the generator has random dropout.
TRANSLATION = """
[model]
generator = { name = "unet", width = 4, norm = "instance" }
discriminator = { name = "patchgan", width = 4, layers = 1, norm = "instance" }

[game]
task = { name = "translation", flip = true }
terms.l1 = { weight = 100.0 }

[evaluate]
metrics = ["psnr", "l1"]
every_samples = 6400

[data]
url = "data"
held_out = 0.2
"""


def write_audio(folder: Path) -> None:
    rng = np.random.default_rng(0)
    tones = np.sin(2 * np.pi * np.arange(256) / 8000 * 500 * 2 ** (np.arange(90)[:, None] % 3))
    clips = np.float32(tones * 0.5 + 0.01 * rng.normal(size=tones.shape))
    samples = (
        (f"{i:03d}", {"wav": encode_wav(clip[None], 8000), "cls": b"%d" % (i % 3)})
        for i, clip in enumerate(clips)
    )
    write_dataset(
        Store(str(folder)),
        [samples],
        modality="audio",
        sample_shape=(1, 256),
        sample_rate=8000,
        num_classes=3,
    )


def write_texts(folder: Path) -> None:
    lines = ("abba", "baab", "cab", "abc", "caba", "bac") * 12
    samples = ((f"{i:03d}", {"txt": line.encode()}) for i, line in enumerate(lines))
    write_dataset(Store(str(folder)), [samples], modality="text", sample_shape=(6,))


def write_pairs(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(90):
            gray = rng.integers(0, 256, (64, 64, 1), np.uint8)
            color = np.concatenate([gray, 255 - gray, gray // 2], 2)
            yield f"{i:03d}", {"target.png": encode_png(color), "input.png": encode_png(gray)}

    field = {"modality": "image", "sample_shape": [1, 64, 64], "component": "input.png"}
    write_dataset(
        Store(str(folder)),
        [samples()],
        modality="image",
        sample_shape=(3, 64, 64),
        component="target.png",
        fields={"input": field},
    )


@pytest.mark.parametrize(
    ("write", "values"),
    [
        pytest.param(write_audio, AUDIO, id="audio", marks=pytest.mark.slow),
        pytest.param(write_texts, TEXT, id="text"),
        pytest.param(write_audio, VOCODER, id="vocoder"),
        pytest.param(write_pairs, TRANSLATION, id="pairs", marks=pytest.mark.slow),
    ],
)
def test_killed_worker_does_not_change_the_result(
    runs: Runs, write: Callable[[Path], None], values: str, run_gatdist: Callable[..., Any]
) -> None:
    write(runs.folder / "data")
    (runs.folder / "run.toml").write_text(RUN + values)
    settings = [*CANONICAL, *[PENALTY] * (values in (AUDIO, TEXT))]
    runs.preset, runs.settings = "run.toml", settings
    runs.faults('fail_at("generator", once(kill), rank=1, step=100, attempt=None)')
    runs.start()
    assert runs.finish() == 0, runs.errors
    runs.require_complete()
    assert "continuing with 2 workers" in runs.errors
    sets = [word for s in settings for word in ("--set", s)]
    local = ["train", "run.toml", "--local", "--run-dir", "alone", "--json", *sets]
    trained = run_gatdist(*local, cwd=runs.folder, timeout=300)
    assert trained.returncode == 0, trained.stderr
    alone = run_gatdist("inspect", "alone", "--digest", cwd=runs.folder).stdout.strip()
    assert runs.digest() == alone
    assert json.loads(runs.output)["metrics"] == json.loads(trained.stdout)["metrics"]

"""Small audio and text data sets, and networks that train on them in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gatdist.config import Config, parse_config
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.format.shard_files import write_dataset
from gatdist.storage import Store

RATE, LENGTH = 8000, 256


def write_clips(folder: Path) -> None:
    """Write tones of three pitches, one class each."""
    rng = np.random.default_rng(0)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(60):
            tone = np.sin(2 * np.pi * np.arange(LENGTH) / RATE * 500 * 2 ** (i % 3))
            clip = np.float32(tone * 0.5 + 0.01 * rng.normal(size=LENGTH))[None]
            yield f"{i:03d}", {"wav": encode_wav(clip, RATE), "cls": b"%d" % (i % 3)}

    write_dataset(
        Store(str(folder)),
        [samples()],
        modality="audio",
        sample_shape=(1, LENGTH),
        sample_rate=RATE,
        num_classes=3,
        class_names=["low", "middle", "high"],
    )


LINES = ("abba", "baab", "cab", "abc", "caba", "bac") * 8


def write_texts(folder: Path, lines: Sequence[str] = LINES) -> None:
    """Write words of three letters."""
    samples = ((f"{i:03d}", {"txt": line.encode()}) for i, line in enumerate(lines))
    write_dataset(Store(str(folder)), [samples], modality="text", sample_shape=(6,))


RUN: dict[str, Any] = {
    "total_samples": 96,
    "global_batch": 8,
    "log_every_samples": 32,
    "checkpoint_every_samples": 48,
}
AUDIO: dict[str, Any] = {
    "model": {
        "latent_size": 8,
        "conditional": True,
        "generator": {"name": "wavegan", "width": 4},
        "discriminator": {"name": "wavegan", "width": 4},
    },
    "evaluate": {"metrics": ["fid", "label_accuracy", "probe"], "every_samples": 48},
}
TEXT: dict[str, Any] = {
    "model": {
        "latent_size": 8,
        "generator": {"name": "text_recurrent", "width": 8},
        "discriminator": {"name": "text_convolutional", "width": 8, "blocks": 1},
    },
    "evaluate": {"metrics": ["jsd", "self_bleu", "novelty"], "every_samples": 48},
}


def small_config(url: Path | str, values: dict[str, Any], **data: Any) -> Config:
    """Return a configuration of 96 samples on the data at ``url``."""
    return parse_config({"run": RUN, "data": {"url": str(url), **data}, **values})

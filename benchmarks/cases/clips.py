"""Reading random crops of audio clips, compared with decoding alone, in equally many threads.

Clips of 32,768 samples at 22.05 kHz as WAV and FLAC, crops of 8,192. The upper bound is the slower
of sequential reads and of decoding from memory in the same round.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from benchmarks.case import parser, positive, progress, save
from benchmarks.cases.data import compare
from benchmarks.readers import bare_decode, bare_read, open_loader
from gatdist.config import cache_folder
from gatdist.data.codecs.audio import decode_audio_into
from gatdist.data.format.shard_files import write_dataset
from gatdist.game.tasks import Draws, cropped
from gatdist.storage import Store

RATE, LENGTH, CROP = 22_050, 32_768, 8_192
_FUNDAMENTALS, _NOISE = (80.0, 300.0), 0.02


def main() -> None:
    add = (arguments := parser("clips", __doc__)).add_argument
    add("--num", type=positive, default=2_000, help="clips of each format (default: 2,000)")
    add("--rounds", type=positive, default=7)
    add("--threads", type=positive, default=2, help="decoding threads (default: 2)")
    given = arguments.parse_args()
    rows = []
    for kind in ("wav", "flac"):
        progress(kind)
        readers = {"bare_read": bare_read, "bare_decode": _decoded, "gatdist": _crops}
        folder = clip_folder(given.num, kind)
        found = compare(folder, LENGTH, readers, given.rounds, given.threads)
        rows += [row | {"format": kind} for row in found]
        print(*rows[-len(readers) :], sep="\n")
    save(given.out, {"cases": rows}, threads=given.threads)


def _crops(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    loader = stack.enter_context(open_loader(str(folder), threads))
    for batch in loader:
        drawn = Draws(0, "", batch.positions)
        yield cropped([batch.samples], (CROP,), drawn)[0]


def _decoded(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    def decode(content: bytes, out: np.ndarray) -> None:
        decode_audio_into(content, out, RATE)

    return bare_decode(folder, threads, stack, decode, np.float32)


def clips(num: int, encode: Callable[[np.ndarray], bytes]) -> Iterator[bytes]:
    """Harmonic tones with noise, of which FLAC takes about as much as of speech."""
    draws = np.random.default_rng(0)
    time = np.arange(LENGTH) / RATE
    for _ in range(num):
        pitch = draws.uniform(*_FUNDAMENTALS) * (1 + 0.1 * np.sin(2 * np.pi * 3 * time))
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        voice = sum(np.sin(k * phase + draws.uniform(0, 7)) / k for k in range(1, 12))
        yield encode(voice / 6 + _NOISE * draws.standard_normal(LENGTH))


def clip_folder(num: int, kind: str) -> Path:
    """Return a data set of clips in the cache folder, written on first use."""
    path = cache_folder() / "benchmarks" / f"clips-v1-{kind}-{num}"

    def encode(samples: np.ndarray) -> bytes:
        soundfile.write(file := io.BytesIO(), samples, RATE, "PCM_16", format=kind.upper())
        return file.getvalue()

    if not (path / "manifest.json").exists():
        made = ((f"{i:08d}", {kind: content}) for i, content in enumerate(clips(num, encode)))
        shards = [list(itertools.islice(made, 500)) for _ in range(-(-num // 500))]
        write_dataset(
            Store(str(path)),
            shards,
            modality="audio",
            sample_shape=(1, LENGTH),
            sample_rate=RATE,
        )
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

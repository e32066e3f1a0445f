"""Speech: the digits zero to nine, spoken by espeak-ng, as shards for `gatdist train speech`.

python -m benchmarks.speech data/speech

Debian's package `espeak-ng` speaks; nothing is downloaded. Each digit is spoken by 18 voices, at
four speeds and three pitches. Silence before it is cut off. Sounds of 8,000 samples a second, 4,096
samples (half a second) each; the class is the digit.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from gatdist.data import write_dataset
from gatdist.data.codecs import encode_wav
from gatdist.storage import Store

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland")
SPEAKERS = ("m1", "m3", "m7", "f2", "f3", "f4")
SPEEDS = (200, 220, 240, 260)  # words a minute
PITCHES = (35, 50, 65)  # of 0 to 99
RATE, LENGTH = 8000, 4096
NUM_SHARDS = 4
_SILENCE = 0.01  # of full scale
_LEAD = 80  # samples before the first loud one that are kept

Clip = NDArray[np.float32]
Take = tuple[int, str, int, int]


def main() -> None:
    """Speak all and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", help="a folder, or any URL that fsspec knows")
    arguments = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is not installed: apt install espeak-ng")
    takes = [*itertools.product(range(len(DIGITS)), voices(), SPEEDS, PITCHES)]
    with ThreadPoolExecutor() as pool:
        clips = list(pool.map(speak, takes))
    # In a fixed, mixed order: neighbours in a shard should not be alike.
    order = np.random.default_rng(0).permutation(len(takes))
    write_dataset(
        Store(arguments.destination),
        (
            shard(numbers, takes, clips, order)
            for numbers in np.array_split(np.arange(len(takes)), NUM_SHARDS)
        ),
        modality="audio",
        sample_shape=(1, LENGTH),
        sample_rate=RATE,
        num_classes=len(DIGITS),
        class_names=list(DIGITS),
    )
    print(f"{len(takes):,} sounds in {arguments.destination}")


def voices() -> list[str]:
    """Names of espeak-ng's voices, each accent by each speaker."""
    return [f"{accent}+{speaker}" for accent, speaker in itertools.product(ACCENTS, SPEAKERS)]


def speak(take: Take) -> Clip:
    """One digit, float32 [1, LENGTH], its loudest place at 0.9 of full scale."""
    digit, voice, speed, pitch = take
    command = ["espeak-ng", "--stdout", "-v", voice, "-s", str(speed), "-p", str(pitch)]
    spoken = subprocess.run([*command, DIGITS[digit]], check=True, capture_output=True)
    # Written to a pipe, the header does not know how long the sound is.
    audio = np.frombuffer(spoken.stdout[44:], dtype="<i2").astype(np.float32) / 32768
    audio = resample_poly(audio, 160, 441)  # 22,050 to 8,000
    start = max(0, int(np.argmax(np.abs(audio) > _SILENCE)) - _LEAD)
    clip = np.zeros(LENGTH, dtype=np.float32)
    heard = audio[start : start + LENGTH]
    clip[: len(heard)] = heard * (0.9 / np.abs(heard).max())
    return clip[None]


def shard(
    numbers: NDArray[np.int64],
    takes: Sequence[Take],
    clips: Sequence[Clip],
    order: NDArray[np.int64],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples with these numbers."""
    for i in numbers:
        digit, *_ = takes[order[i]]
        yield f"{i:06d}", {"wav": encode_wav(clips[order[i]], RATE), "cls": b"%d" % digit}


if __name__ == "__main__":
    main()

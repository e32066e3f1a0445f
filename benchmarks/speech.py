"""Speech: the digits zero to nine, spoken by espeak-ng, as shards for ``gatdist train speech``.

python -m benchmarks.speech data/speech

Debian's package ``espeak-ng`` speaks each digit with 18 voices, at four speeds and three pitches.
Leading silence is cut off. Clips have 4,096 samples (half a second) at 8 kHz; classes are digits.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from benchmarks.case import shuffled_shards
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", help="a folder, or any URL that fsspec knows")
    arguments = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is not installed: apt install espeak-ng")
    takes = [*itertools.product(range(len(DIGITS)), voices(), SPEEDS, PITCHES)]
    with ThreadPoolExecutor() as pool:
        clips = list(pool.map(speak, takes))

    def sample(number: int) -> dict[str, bytes]:
        return {"wav": encode_wav(clips[number], RATE), "cls": b"%d" % takes[number][0]}

    write_dataset(
        Store(arguments.destination),
        shuffled_shards(len(takes), NUM_SHARDS, sample),
        modality="audio",
        sample_shape=(1, LENGTH),
        sample_rate=RATE,
        num_classes=len(DIGITS),
        class_names=list(DIGITS),
    )
    print(f"{len(takes):,} clips in {arguments.destination}")


def voices() -> list[str]:
    """Return espeak-ng's voices: each accent by each speaker."""
    return [f"{accent}+{speaker}" for accent, speaker in itertools.product(ACCENTS, SPEAKERS)]


def speak(take: Take) -> Clip:
    """Speak a digit, float32 [1, LENGTH], with a peak of 0.9 of full scale."""
    digit, voice, speed, pitch = take
    command = ["espeak-ng", "--stdout", "-v", voice, "-s", str(speed), "-p", str(pitch)]
    spoken = subprocess.run([*command, DIGITS[digit]], check=True, capture_output=True)
    # In a pipe, the header has no length.
    audio = np.frombuffer(spoken.stdout[44:], dtype="<i2").astype(np.float32) / 32768
    audio = resample_poly(audio, 160, 441)  # 22,050 to 8,000
    start = max(0, int(np.argmax(np.abs(audio) > _SILENCE)) - _LEAD)
    clip = np.zeros(LENGTH, dtype=np.float32)
    heard = audio[start : start + LENGTH]
    clip[: len(heard)] = heard * (0.9 / np.abs(heard).max())
    return clip[None]


if __name__ == "__main__":
    main()

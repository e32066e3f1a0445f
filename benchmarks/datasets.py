"""Data sets of presets and of mode coverage: shards, or folders of files for ``gatdist pack``.

Emoji: OpenMoji's (CC BY-SA 4.0, npm package openmoji) as line art and in color, in two folders.
Glyphs: letters and digits of twelve DejaVu faces, from matplotlib; the class is the face.
Speech: digits spoken by espeak-ng, 4,096 samples at 8 kHz; the class is the digit.
Words: English words of 3 to 12 lower-case letters, from Debian's package wamerican.
Stacked digits: three of scikit-learn's digits as red, green and blue; the class is their number.
"""

from __future__ import annotations

import argparse
import io
import itertools
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.signal import resample_poly

from benchmarks.case import shuffled_shards
from gatdist.data.builtin import digits
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.format.shard_files import write_dataset
from gatdist.storage import Store

NUM_SHARDS = 4

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
CATEGORIES = {"Lu", "Ll", "Lo", "Nd"}  # letters and digits of any script
# All but a few of the widest letters fit.
POINTS_PER_PIXEL = 0.72

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland")
SPEAKERS = ("m1", "m3", "m7", "f2", "f3", "f4")
SPEEDS = (200, 220, 240, 260)  # words a minute
PITCHES = (35, 50, 65)  # of 0 to 99
RATE, LENGTH = 8000, 4096
_SILENCE = 0.01  # of full scale
_LEAD = 80  # samples before the first loud one that are kept

OPENMOJI = "node_modules/openmoji"  # where `npm install openmoji@17.0.0` puts it
# Skin tones are variants of drawings that stay; letters of countries make flags, empty as line art.
OMITTED = {f"{code:X}" for code in (*range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200))}

LIST = "/usr/share/dict/american-english"
SHORTEST, LONGEST = 3, 12

STACKS, MODES = 50_000, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True, metavar="NAME")
    for name, write in WRITERS.items():
        kind = kinds.add_parser(name)
        kind.set_defaults(write=write)
        kind.add_argument("destination", help="a folder, or any URL that fsspec supports")
        if name == "glyphs":
            kind.add_argument("--size", type=int, default=16, help="pixels of a side (default: 16)")
            kind.add_argument("--all", action="store_true", help="letters of all scripts")
        elif name == "emoji":
            kind.add_argument("--size", type=int, default=64, help="pixels of a side (default: 64)")
            text = f"folder of the npm package (default: {OPENMOJI})"
            kind.add_argument("--source", default=OPENMOJI, help=text)
        elif name == "stacked-digits":
            text = f"images (default: {STACKS:,})"
            kind.add_argument("--count", type=int, default=STACKS, help=text)
        elif name == "words":
            kind.add_argument("--list", default=LIST, help=f"one word a line (default: {LIST})")
    arguments = parser.parse_args()
    arguments.write(arguments, Store(arguments.destination))


def write_emoji(arguments: argparse.Namespace, store: Store) -> None:
    import resvg_py  # a renderer of SVG; nothing else needs it

    for field, kind in (("input", "black"), ("target", "color")):
        folder = store.local_path(field)
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(Path(arguments.source, kind, "svg").glob("*.svg"))
        drawings = [file for file in files if not OMITTED & {*file.stem.split("-")}]
        if not drawings:
            sys.exit(f"no drawings in {arguments.source}: npm install openmoji@17.0.0")
        for drawing in drawings:
            size = arguments.size
            png = resvg_py.svg_to_bytes(
                svg_path=str(drawing), width=size, height=size, background="white"
            )
            image = Image.open(io.BytesIO(png)).convert("L" if field == "input" else "RGB")
            image.save(folder / f"{drawing.stem}.png")


def write_glyphs(arguments: argparse.Namespace, store: Store) -> None:
    drawn = [c for c in characters() if arguments.all or c.isascii()]
    points = round(POINTS_PER_PIXEL * arguments.size)
    fonts = [ImageFont.truetype(str(path), points) for path in faces()]
    pairs = [(face, c) for c in drawn for face in range(len(fonts))]

    def sample(number: int) -> dict[str, bytes]:
        face, character = pairs[number]
        pixels = draw(character, fonts[face], arguments.size)
        return {"png": encode_png(pixels), "cls": b"%d" % face}

    write_dataset(
        store,
        shuffled_shards(len(pairs), NUM_SHARDS, sample),
        modality="image",
        sample_shape=(1, arguments.size, arguments.size),
        num_classes=len(fonts),
    )


def faces() -> list[Path]:
    kinds = ("Sans", "SansMono", "Serif")
    return sorted(path for kind in kinds for path in FONTS.glob(f"DejaVu{kind}[-.]*ttf"))


def characters() -> list[str]:
    sets = [set(FT2Font(str(path)).get_charmap()) for path in faces()]
    common = map(chr, sorted(set.intersection(*sets)))
    return [c for c in common if unicodedata.category(c) in CATEGORIES]


def draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> NDArray[np.uint8]:
    """Draw white on black, centred; uint8 [size, size, 1]."""
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (size, size))
    at = ((size - left - right) / 2, (size - top - bottom) / 2)
    ImageDraw.Draw(image).text(at, character, fill=255, font=font)
    return np.asarray(image)[..., None]


def write_speech(arguments: argparse.Namespace, store: Store) -> None:
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not installed: apt install espeak-ng")
    voices = [f"{accent}+{speaker}" for accent in ACCENTS for speaker in SPEAKERS]
    takes = [*itertools.product(range(len(DIGITS)), voices, SPEEDS, PITCHES)]
    with ThreadPoolExecutor() as pool:
        clips = list(pool.map(speak, takes))

    def sample(number: int) -> dict[str, bytes]:
        return {"wav": encode_wav(clips[number], RATE), "cls": b"%d" % takes[number][0]}

    write_dataset(
        store,
        shuffled_shards(len(takes), NUM_SHARDS, sample),
        modality="audio",
        sample_shape=(1, LENGTH),
        sample_rate=RATE,
        num_classes=len(DIGITS),
        class_names=list(DIGITS),
    )
    print(f"{len(takes):,} clips in {store.url}")


def speak(take: tuple[int, str, int, int]) -> NDArray[np.float32]:
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


def write_words(arguments: argparse.Namespace, store: Store) -> None:
    pattern = re.compile(rf"[a-z]{{{SHORTEST},{LONGEST}}}")
    text = Path(arguments.list).read_text(encoding="utf-8")
    words = list(dict.fromkeys(word for word in text.split() if pattern.fullmatch(word)))
    write_dataset(
        store,
        shuffled_shards(len(words), NUM_SHARDS, lambda number: {"txt": words[number].encode()}),
        modality="text",
        sample_shape=(LONGEST,),
    )
    print(f"{len(words):,} words in {store.url}")


def write_stacked_digits(arguments: argparse.Namespace, store: Store) -> None:
    """Write each of the 1,000 numbers equally often, with random images of its three digits.

    As Stacked MNIST (Metz et al. 2017), but with 8 × 8 images of digits.
    """
    images, shown = digits()
    by_digit = [images[shown == digit] for digit in range(10)]
    # Only the raw bits of NumPy's generators are stable across versions.
    words = np.random.Philox(key=0).random_raw((arguments.count, 3))

    def sample(number: int) -> dict[str, bytes]:
        mode = number % MODES
        chosen = [by_digit[digit] for digit in (mode // 100, mode // 10 % 10, mode % 10)]
        channels = [x[int(w) % len(x)] for x, w in zip(chosen, words[number], strict=True)]
        return {"png": encode_png(np.concatenate(channels, axis=2)), "cls": b"%d" % mode}

    write_dataset(
        store,
        shuffled_shards(arguments.count, NUM_SHARDS, sample),
        modality="image",
        sample_shape=(3, *images.shape[1:3]),
        num_classes=MODES,
    )


WRITERS: dict[str, Callable[[argparse.Namespace, Store], None]] = {
    "emoji": write_emoji,
    "glyphs": write_glyphs,
    "speech": write_speech,
    "stacked-digits": write_stacked_digits,
    "words": write_words,
}

if __name__ == "__main__":
    main()

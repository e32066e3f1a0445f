"""Glyphs: letters and digits of the DejaVu fonts in gray, as shards for ``gatdist train glyphs``.

python -m benchmarks.glyphs data/glyphs [--size 16] [--all]

The fonts come with matplotlib. The 62 ASCII letters and digits, or those of any script that all
twelve faces have, are drawn in each face, centred; the class is the face.
"""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.case import shuffled_shards
from gatdist.data import write_dataset
from gatdist.data.codecs import encode_png
from gatdist.storage import Store

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
KINDS = ("Sans", "SansMono", "Serif")
CATEGORIES = {"Lu", "Ll", "Lo", "Nd"}  # letters and digits of any script
NUM_SHARDS = 4
# All but a few of the widest letters fit.
POINTS_PER_PIXEL = 0.72


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", help="a folder, or any URL that fsspec knows")
    parser.add_argument("--size", type=int, default=16, help="pixels of a side (default: 16)")
    parser.add_argument("--all", action="store_true", help="letters of all scripts")
    arguments = parser.parse_args()
    drawn = [c for c in characters() if arguments.all or c.isascii()]
    pairs = [(face, c) for c in drawn for face in range(len(faces()))]
    fonts = [
        ImageFont.truetype(str(path), round(POINTS_PER_PIXEL * arguments.size)) for path in faces()
    ]

    def sample(number: int) -> dict[str, bytes]:
        face, character = pairs[number]
        pixels = draw(character, fonts[face], arguments.size)
        return {"png": encode_png(pixels), "cls": b"%d" % face}

    write_dataset(
        Store(arguments.destination),
        shuffled_shards(len(pairs), NUM_SHARDS, sample),
        modality="image",
        sample_shape=(1, arguments.size, arguments.size),
        num_classes=len(fonts),
    )


def faces() -> list[Path]:
    """Return the files of the twelve faces, in the order of their classes."""
    return sorted(path for kind in KINDS for path in FONTS.glob(f"DejaVu{kind}[-.]*ttf"))


def characters() -> list[str]:
    """Return the letters and digits that every face has."""
    sets = [set(FT2Font(str(path)).get_charmap()) for path in faces()]
    return [
        c
        for c in map(chr, sorted(set.intersection(*sets)))
        if unicodedata.category(c) in CATEGORIES
    ]


def draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> NDArray[np.uint8]:
    """Draw white on black, centred; uint8 [size, size, 1]."""
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (size, size))
    at = ((size - left - right) / 2, (size - top - bottom) / 2)
    ImageDraw.Draw(image).text(at, character, fill=255, font=font)
    return np.asarray(image)[..., None]


if __name__ == "__main__":
    main()

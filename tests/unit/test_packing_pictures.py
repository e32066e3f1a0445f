"""Pictures in packing: crops and filters beside independent formulas, and what is kept as it is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import gatdist
from gatdist.cli import main
from gatdist.data.codecs import FILTERS
from gatdist.data.packing import pictures
from gatdist.data.packing.pictures import TRANSFORMS
from gatdist.errors import ConfigError
from packing import pack, picture, samples, write

Pixels = NDArray[np.uint8]
LANCZOS = Image.Resampling.LANCZOS

sides = st.integers(1, 40)


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    generator = np.random.default_rng(height * 1000 + width)
    return generator.integers(0, 256, (height, width, channels)).astype(np.uint8)


# Transforms


@given(sides, sides, st.integers(1, 20), st.sampled_from(sorted(FILTERS)))
def test_a_square_center_crop_is_that_of_edm(h: int, w: int, size: int, filter: str) -> None:
    """The shorter side, cut about the centre, and then resized."""
    pixels, side = noise(h, w), min(h, w)
    part = pixels[(h - side) // 2 : (h + side) // 2, (w - side) // 2 : (w + side) // 2]
    expected = np.asarray(Image.fromarray(part.copy()).resize((size, size), FILTERS[filter]))
    assert (pictures.center_crop(pixels, size, size, FILTERS[filter]) == expected).all()


@given(sides, sides, st.integers(1, 20), st.integers(1, 20))
def test_a_center_crop_takes_the_most_that_has_the_aspect(
    h: int, w: int, height: int, width: int
) -> None:
    # Where a pixel of a ramp comes from tells which part was taken.
    y, x = np.mgrid[0:h, 0:w]
    ramp = np.stack([y, x], axis=2).astype(np.uint8)
    images = [ramp[..., :1], ramp[..., 1:]]
    down, across = (
        pictures.center_crop(image, height, width, Image.Resampling.BOX).astype(float)
        for image in images
    )
    assert down.shape == across.shape == (height, width, 1)
    # The middle of what was taken is the middle of the picture, to one pixel and rounding.
    assert abs(down.mean() - (h - 1) / 2) <= 1.01
    assert abs(across.mean() - (w - 1) / 2) <= 1.01


def test_a_wide_center_crop_has_black_above_and_below() -> None:
    pixels = noise(30, 40)
    found = pictures.center_crop_wide(pixels, 6, 16, LANCZOS)
    assert found.shape == (16, 16, 3)
    assert (found[:5] == 0).all()
    assert (found[11:] == 0).all()
    assert (found[5:11] == pictures.center_crop(pixels, 6, 16, LANCZOS)).all()


@pytest.mark.parametrize(("h", "w"), [(64, 64), (100, 70), (33, 200), (15, 16), (5, 7)])
def test_the_crop_of_dhariwal(h: int, w: int) -> None:
    """``center_crop_arr`` of ADM, in its own steps."""
    size, pixels = 16, noise(h, w)
    image = Image.fromarray(pixels)
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    expected = array[top : top + size, left : left + size]
    assert (pictures.center_crop_dhariwal(pixels, size, size, LANCZOS) == expected).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
def test_transforms_keep_the_channels(transform: str, channels: int) -> None:
    size = (6, 8) if transform == "center-crop-wide" else (8, 8)
    found = TRANSFORMS[transform](noise(20, 30, channels), *size, LANCZOS)
    assert found.shape == (8, 8, channels)
    assert found.dtype == np.uint8


# Files


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("component", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_what_is_encoded_is_what_it_says(component: str, kind: str, channels: int) -> None:
    # Smooth, or no JPEG would be near.
    y, x = np.mgrid[0:24, 0:32]
    pixels = np.stack([y * 9, x * 7, x + y], axis=2)[..., :channels].astype(np.uint8)
    content = pictures.encode(pixels, component, None)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == kind
        found = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    error = np.abs(found.reshape(pixels.shape).astype(int) - pixels).max()
    assert error == 0 if component != "jpg" else error < 12
    if component != "png":
        assert len(pictures.encode(pixels, component, 30)) < len(content)


def files_of(folder: Path) -> dict[str, bytes]:
    """The one sample's files."""
    (sample,) = samples(folder)
    return sample


def packed(tmp_path: Path, content: bytes, name: str = "a.png", **options: Any) -> dict[str, bytes]:
    number = len(list(tmp_path.iterdir()))
    source = write(tmp_path / f"in{number}", {name: content})
    pack(source, tmp_path / f"out{number}", **options)
    return files_of(tmp_path / f"out{number}")


@pytest.mark.parametrize(("kind", "component"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_what_need_not_change_keeps_its_bytes(tmp_path: Path, kind: str, component: str) -> None:
    content = picture(0, (6, 8), kind)
    same_format = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}[kind]
    for options in ({}, {"size": (6, 8)}, {"format": same_format}):
        assert packed(tmp_path, content, "a.jpeg", **options) == {component: content}


def test_what_must_change_becomes_png_or_the_format_that_is_asked(tmp_path: Path) -> None:
    content = picture(0, (6, 8), "JPEG")
    assert packed(tmp_path, content, size=4).keys() == {"png"}
    assert packed(tmp_path, content, format="png").keys() == {"png"}
    assert packed(tmp_path, content, size=4, format="jpeg", quality=50).keys() == {"jpg"}
    assert packed(tmp_path, content, size=4, format="webp").keys() == {"webp"}
    assert packed(tmp_path, picture(0, (6, 8), "BMP"), "a.bmp").keys() == {"png"}


def test_png_of_what_was_not_resized_has_its_pixels(tmp_path: Path) -> None:
    content = picture(0, (6, 8), "WEBP")
    found = packed(tmp_path, content, format="png")["png"]
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert (np.asarray(Image.open(io.BytesIO(found))) == expected).all()


def test_pictures_that_are_enlarged_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"small.png": picture(0, (4, 90)), "large.png": picture(1, (90, 90))}
    source = write(tmp_path / "in", files)
    command = ["pack", str(source), str(tmp_path / "out"), "--size", "8", "--workers", "1"]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)
    assert (outcome["enlarged"], outcome["enlarged_example"]) == (1, "small.png (4 × 90)")
    assert "warning: 1 picture was smaller than asked and enlarged" in captured.err


# What is asked


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--size 0", "--size = '0': must be H or HxW"),
        ("--size 4x5x6", "--size = '4x5x6': must be H or HxW"),
        ("--size big", "--size = 'big': must be H or HxW"),
        ("--shard-bytes 0", "--shard-bytes = '0': must be bytes, such as 256MB"),
        ("--shard-bytes many", "--shard-bytes = 'many': must be bytes"),
        ("--workers 0", "--workers = '0': must be a whole number above 0"),
        ("--transform center-crop", "--transform = 'center-crop': needs --size"),
        ("--filter box", "--filter = 'box': needs --size"),
        ("--size 4 --transform crop", "--transform = 'crop': input should be 'center-crop',"),
        ("--size 4 --filter cubic", "--filter = 'cubic': input should be 'lanczos', "),
        ("--size 4 --transform center-crop-wide", "--size = '4x4': must be wider than high"),
        ("--size 4x6 --transform center-crop-dhariwal", "--size = '4x6': must be a square"),
        ("--size 4 --transform center-crop-dhariwal --filter box", "has its own"),
        ("--format gif", "--format = 'gif': input should be 'keep', 'png'"),
        ("--quality 90", "--quality = 90: needs --format jpeg or webp"),
        ("--format jpeg --quality 0", "--quality = 0: input should be greater than or equal to 1"),
        ("--color blue", "--color = 'blue': input should be 'auto', 'rgb' or 'gray'"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    source = write(tmp_path / "in", {"a.png": picture(0)})
    assert main(["pack", str(source), str(tmp_path / "out"), *words.split()]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "count"), [("5000", 5000), ("5k", 5000), ("5KB", 5000)])
def test_bytes_have_units(tmp_path: Path, text: str, count: int) -> None:
    source = write(tmp_path / "in", {f"{i}.png": picture(i) for i in range(9)})
    command = ["pack", str(source), str(tmp_path / "out"), "--workers", "1", "--shard-bytes", text]
    assert main(command) == 0
    plan = json.loads((tmp_path / "out" / "packing" / "plan.json").read_text())
    assert plan["request"]["shard_bytes"] == count


def test_a_size_in_python_is_one_number_or_two(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.png": picture(0)})
    for number, (size, shape) in enumerate([(4, [3, 4, 4]), ((4, 6), [3, 4, 6])]):
        outcome = gatdist.pack(str(source), str(tmp_path / str(number)), size=size, workers=1)
        assert outcome["sample_shape"] == shape
    with pytest.raises(ConfigError, match="--size"):
        gatdist.pack(str(source), str(tmp_path / "x"), size=-1)

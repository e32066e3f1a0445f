"""Images in packing: crops and filters compared with independent formulas, and what is kept."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

import gatdist
from gatdist.cli import main
from gatdist.common.errors import ConfigError, DataError
from gatdist.config import DataConfig
from gatdist.data.codecs.images import FILTERS, decode_pixels, encode_png
from gatdist.data.dataset import open_dataset
from gatdist.monitor.previews import preview
from gatdist.packing import images
from gatdist.packing.images import TRANSFORMS
from packing import content, image, pack, samples, write
from support import refused

Pixels = NDArray[np.uint8]
LANCZOS = Image.Resampling.LANCZOS

sides = st.integers(1, 40)


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    generator = np.random.default_rng(height * 1000 + width)
    return generator.integers(0, 256, (height, width, channels)).astype(np.uint8)


# Transforms


@given(sides, sides, st.integers(1, 20), st.sampled_from(sorted(FILTERS)))
def test_square_center_crop_equals_edm(h: int, w: int, size: int, filter: str) -> None:
    """The shorter side is cropped about the centre, and then resized."""
    pixels, side = noise(h, w), min(h, w)
    part = pixels[(h - side) // 2 : (h + side) // 2, (w - side) // 2 : (w + side) // 2]
    expected = np.asarray(Image.fromarray(part.copy()).resize((size, size), FILTERS[filter]))
    assert (images.center_crop(pixels, size, size, FILTERS[filter]) == expected).all()


@given(sides, sides, st.integers(1, 20), st.integers(1, 20))
def test_center_crop_is_the_largest_with_the_aspect_ratio(
    h: int, w: int, height: int, width: int
) -> None:
    # The pixel values of a ramp show which part was cropped.
    y, x = np.mgrid[0:h, 0:w]
    ramp = np.stack([y, x], axis=2).astype(np.uint8)
    ramps = [ramp[..., :1], ramp[..., 1:]]
    down, across = (
        images.center_crop(one, height, width, Image.Resampling.BOX).astype(float) for one in ramps
    )
    assert down.shape == across.shape == (height, width, 1)
    # The crop is centred in the image, within one pixel and rounding.
    assert abs(down.mean() - (h - 1) / 2) <= 1.01
    assert abs(across.mean() - (w - 1) / 2) <= 1.01


def test_wide_center_crop_has_black_above_and_below() -> None:
    pixels = noise(30, 40)
    found = images.center_crop_wide(pixels, 6, 16, LANCZOS)
    assert found.shape == (16, 16, 3)
    assert (found[:5] == 0).all()
    assert (found[11:] == 0).all()
    assert (found[5:11] == images.center_crop(pixels, 6, 16, LANCZOS)).all()


@pytest.mark.parametrize(("h", "w"), [(64, 64), (100, 70), (33, 200), (15, 16), (5, 7)])
def test_crop_of_dhariwal(h: int, w: int) -> None:
    """Compare with the steps of ``center_crop_arr`` of ADM."""
    size, pixels = 16, noise(h, w)
    image = Image.fromarray(pixels)
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    expected = array[top : top + size, left : left + size]
    assert (images.center_crop_dhariwal(pixels, size, size, LANCZOS) == expected).all()


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
def test_encoded_format_is_the_given_one(component: str, kind: str, channels: int) -> None:
    # Smooth, as JPEG changes others too much.
    y, x = np.mgrid[0:24, 0:32]
    pixels = np.stack([y * 9, x * 7, x + y], axis=2)[..., :channels].astype(np.uint8)
    content = images.encode(pixels, component, None)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == kind
        found = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    error = np.abs(found.reshape(pixels.shape).astype(int) - pixels).max()
    assert error == 0 if component != "jpg" else error < 12
    if component != "png":
        assert len(images.encode(pixels, component, 30)) < len(content)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of the only sample."""
    (sample,) = samples(folder)
    return sample


def packed(tmp_path: Path, content: bytes, name: str = "a.png", **options: Any) -> dict[str, bytes]:
    number = len(list(tmp_path.iterdir()))
    source = write(tmp_path / f"in{number}", {name: content})
    pack(source, tmp_path / f"out{number}", **options)
    return files_of(tmp_path / f"out{number}")


@pytest.mark.parametrize(("kind", "component"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_unchanged_images_keep_their_bytes(tmp_path: Path, kind: str, component: str) -> None:
    content = image(0, (6, 8), kind)
    same_format = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}[kind]
    for options in ({}, {"size": (6, 8)}, {"format": same_format}):
        assert packed(tmp_path, content, "a.jpeg", **options) == {component: content}


def test_changed_images_become_png_or_the_given_format(tmp_path: Path) -> None:
    content = image(0, (6, 8), "JPEG")
    assert packed(tmp_path, content, size=4).keys() == {"png"}
    assert packed(tmp_path, content, format="png").keys() == {"png"}
    assert packed(tmp_path, content, size=4, format="jpeg", quality=50).keys() == {"jpg"}
    assert packed(tmp_path, content, size=4, format="webp").keys() == {"webp"}
    assert packed(tmp_path, image(0, (6, 8), "BMP"), "a.bmp").keys() == {"png"}


def test_png_of_images_that_are_not_resized_has_their_pixels(tmp_path: Path) -> None:
    content = image(0, (6, 8), "WEBP")
    found = packed(tmp_path, content, format="png")["png"]
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert (np.asarray(Image.open(io.BytesIO(found))) == expected).all()


def test_upscaled_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"small.png": image(0, (4, 90)), "large.png": image(1, (90, 90))}
    source = write(tmp_path / "in", files)
    command = ["pack", str(source), str(tmp_path / "out"), "--size", "8", "--workers", "1"]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)
    assert (outcome["upscaled"], outcome["upscaled_example"]) == (1, "small.png (4 × 90)")
    assert "warning: 1 image " in captured.err


# Options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size 0", "--size = '0'"),
        ("--size 4x5x6", "--size = '4x5x6'"),
        ("--size big", "--size = 'big'"),
        ("--shard-bytes 0", "--shard-bytes = '0'"),
        ("--shard-bytes many", "--shard-bytes = 'many'"),
        ("--workers 0", "--workers = '0'"),
        ("--transform center-crop", "--transform = 'center-crop'"),
        ("--filter box", "--filter = 'box'"),
        ("--size 4 --transform crop", "--transform = 'crop'"),
        ("--size 4 --filter cubic", "--filter = 'cubic'"),
        ("--size 4 --transform center-crop-wide", "--size = '4x4'"),
        ("--size 4x6 --transform center-crop-dhariwal", "--size = '4x6'"),
        ("--size 4 --transform center-crop-dhariwal --filter box", "--filter = 'box'"),
        ("--format gif", "--format = 'gif'"),
        ("--quality 90", "--quality = 90"),
        ("--format jpeg --quality 0", "--quality = 0"),
        ("--color blue", "--color = 'blue'"),
    ],
)
def test_mismatched_options_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    source = write(tmp_path / "in", {"a.png": image(0)})
    assert main(["pack", str(source), str(tmp_path / "out"), *words.split()]) == 2
    assert f"gatdist: {message}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "count"), [("5000", 5000), ("5k", 5000), ("5KB", 5000)])
def test_bytes_have_units(tmp_path: Path, text: str, count: int) -> None:
    source = write(tmp_path / "in", {f"{i}.png": image(i) for i in range(9)})
    command = ["pack", str(source), str(tmp_path / "out"), "--workers", "1", "--shard-bytes", text]
    assert main(command) == 0
    plan = json.loads((tmp_path / "out" / "packing" / "plan.json").read_text())
    assert plan["request"]["shard_bytes"] == count


def test_size_in_python_is_one_number_or_two(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.png": image(0)})
    for number, (size, shape) in enumerate([(4, [3, 4, 4]), ((4, 6), [3, 4, 6])]):
        outcome = gatdist.pack(str(source), str(tmp_path / str(number)), size=size, workers=1)
        assert outcome["sample_shape"] == shape
    with refused(ConfigError, "--size"):
        gatdist.pack(str(source), str(tmp_path / "x"), size=-1)


# Transparency, profiles, 16 bits and formats, as reported by pack and index


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes) -> NDArray[Any]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def linear_profile() -> bytes:
    """Return SRGB's colors with linear levels."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    for i in range(count):
        name, at, _ = struct.unpack_from(">4sII", profile, 132 + 12 * i)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[at : at + 14] = b"curv" + bytes(4) + struct.pack(">IH", 1, 256)
            struct.pack_into(">I", profile, 132 + 12 * i + 8, 14)
    return bytes(profile)


@pytest.mark.parametrize(
    ("background", "color"),
    [(None, (255, 255, 255)), ("black", (0, 0, 0)), ("#0a141e", (10, 20, 30))],
)
def test_transparent_images_are_packed_on_the_background(
    tmp_path: Path, background: str | None, color: tuple[int, ...]
) -> None:
    rgba = noise(6, 8, 4)
    rgba[:3, :, 3], rgba[3:, :, 3] = 0, 255
    (name, content), *rest = packed(
        tmp_path, stored(Image.fromarray(rgba)), background=background
    ).items()
    assert (name, rest) == ("png", [])
    found = decoded(content)
    assert found.shape == (6, 8, 3)
    assert (found[:3] == color).all()
    assert (found[3:] == rgba[3:, :, :3]).all()


def test_transparent_and_other_remarks_are_counted_by_pack_and_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rgb = noise(6, 8)
    clear = np.dstack([rgb, np.zeros((6, 8), np.uint8)])
    deep = np.arange(48, dtype=np.uint16).reshape(6, 8) * 700
    plain = Image.fromarray(rgb)
    files = {
        "plain.png": stored(plain),
        "clear.png": stored(Image.fromarray(clear)),
        "linear.png": stored(plain, icc_profile=linear_profile()),
        "torn.png": stored(plain, icc_profile=b"x" * 200),
        "deep.png": stored(Image.fromarray(deep)),
        "moving.webp": stored(
            plain, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 6))]
        ),
    }
    source = write(tmp_path / "in", files)
    assert main(["pack", str(source), str(tmp_path / "out"), "--workers", "1", "--json"]) == 0
    captured = capsys.readouterr()
    expected = {
        "transparent": "clear.png",
        "profiles": "linear.png",
        "damaged_profiles": "torn.png",
        "reduced": "deep.png (48 levels became 47)",
        "animated": "moving.webp",
    }
    levels = len(np.unique(deep >> 8))
    expected["reduced"] = f"deep.png (48 levels became {levels})"
    outcome = json.loads(captured.out)
    assert {kind: outcome[f"{kind}_example"] for kind in expected} == expected
    assert {outcome[kind] for kind in expected} == {1}
    for kind in expected:
        assert expected[kind] in captured.err
    # The same files as shards of another writer: counted by their headers.
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "a.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    indexed = gatdist.index(str(shards), workers=1)
    assert {indexed[kind] for kind in expected} == {1}
    assert indexed["transparent_example"] == "a.tar/clear"
    # Reading them gives what pack has stored.
    indexed = open_dataset(DataConfig(url=str(shards))).read(np.arange(6))[0]
    packed = open_dataset(DataConfig(url=str(tmp_path / "out"))).read(np.arange(6))[0]
    assert sorted(x.tobytes() for x in indexed) == sorted(x.tobytes() for x in packed)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_packed_and_read_in_full(tmp_path: Path, channels: int) -> None:
    generator = np.random.default_rng(channels)
    deep = generator.integers(0, 65536, (8, 8, channels), dtype=np.uint16)
    files = {"deep.png": encode_png(deep), "flat.png": encode_png(noise(8, 8, channels))}
    source = write(tmp_path / "in", files)
    for number, size in enumerate((None, 8)):
        dest = tmp_path / f"out{number}"
        outcome = pack(source, dest, bits=16, size=size, color="gray" if channels == 1 else "rgb")
        assert outcome["reduced"] == 0
        dataset = open_dataset(DataConfig(url=str(dest)))
        pixels, _ = dataset.read(np.arange(2))
        assert pixels.dtype == np.uint16
        assert any((image == deep).all() for image in pixels)
        assert any((image % 257 == 0).all() for image in pixels)
        seen = dataset.sample_format.to_network(torch.from_numpy(pixels))
        assert (dataset.sample_format.to_samples(seen).numpy() == pixels).all()
        assert dataset.sample_format.rounding == "16 bits"
        again = dataset.sample_format.encode(pixels[0])
        assert gatdist.verify(str(dest), decode=True, workers=1)["whole"]
        assert decode_pixels(again, channels, bits=16).pixels.tobytes() == pixels[0].tobytes()
        image = preview(dataset.sample_format, seen).image
        assert image is not None
        assert image.dtype == np.uint8


def test_16_bits_are_resized_in_full_precision(tmp_path: Path) -> None:
    deep = np.full((16, 16, 3), 30_001, np.uint16)
    for number, transform in enumerate(sorted(TRANSFORMS)):
        size = (4, 8) if transform == "center-crop-wide" else (8, 8)
        source = write(tmp_path / f"in{number}", {"a.png": encode_png(deep)})
        pack(source, tmp_path / f"out{number}", bits=16, size=size, transform=transform)
        found, _ = open_dataset(DataConfig(url=str(tmp_path / f"out{number}"))).read(np.arange(1))
        assert (found[0, 2:6] == 30_001).all(), transform


def test_16_bits_of_indexed_shards_are_read_on_request(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (4, 4, 3), dtype=np.uint16)
    content = encode_png(deep)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("x.png")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    outcome = gatdist.index(str(tmp_path), workers=1, bits=16)
    assert outcome["reduced"] == 0
    assert (open_dataset(DataConfig(url=str(tmp_path))).read(np.arange(1))[0][0] == deep).all()


def test_16_bits_train_evaluate_and_sample(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 65536, (64, 8, 8, 1), dtype=np.uint16)
    source = write(
        tmp_path / "in", {f"{i % 2}/{i}.png": encode_png(image) for i, image in enumerate(images)}
    )
    pack(source, tmp_path / "data", bits=16)
    sizes = ["run.total_samples=128", "run.global_batch=32", "evaluate.num_samples=32"]
    run = str(tmp_path / "run")
    command = ["train", "digits", "--run-dir", run, "--local"]
    for setting in [f"data.url={tmp_path / 'data'}", *sizes]:
        command += ["--set", setting]
    assert main(command) == 0
    assert main(["sample", run, "--out", str(tmp_path / "made"), "--num", "2"]) == 0
    content = (tmp_path / "made" / "000000.png").read_bytes()
    made = decode_pixels(content, 1, bits=16)
    assert made.pixels.dtype == np.uint16
    assert (made.pixels % 257).any(), "more than 8 bits are used"
    assert main(["sample", run, "--out", str(tmp_path / "grid.png"), "--grid", "--num", "4"]) == 0


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("--background nonsense", "--background"),
        ("--background #12345", "--background"),
        ("--background #11223344", "--background"),
        ("--bits 12", "--bits"),
        ("--bits 16 --format jpeg", "--bits"),
        ("--bits 16 --format webp", "--bits"),
    ],
)
def test_invalid_backgrounds_and_16_bits_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, field: str
) -> None:
    source = write(tmp_path / "in", {"a.png": image(0)})
    assert main(["pack", str(source), str(tmp_path / "out"), *words.split()]) == 2
    assert f"{field} = " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extension", "kind"),
    [
        *(("jfif", "JPEG"), ("jpe", "JPEG"), ("JIF", "JPEG"), ("tif", "TIFF"), ("TIFF", "TIFF")),
        *(("bmp", "BMP"), ("webp", "WEBP"), ("gif", "GIF"), ("png", "JPEG"), ("jpg", "PNG")),
    ],
)
def test_formats_are_packed_by_content_whatever_the_extension(
    tmp_path: Path, extension: str, kind: str
) -> None:
    content = image(0, (6, 8), kind)
    found = packed(tmp_path, content, f"a.{extension}")
    component = {"JPEG": "jpg", "WEBP": "webp"}.get(kind, "png")
    assert found.keys() == {component}
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert (decoded(found[component]) == expected).all()


def test_unsupported_formats_are_named_in_the_report(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    files = {
        "a.png": image(0),
        "b.heic": heic,
        "c.jpg": heic,
        "d.NEF": b"MM\0*",
        "e.psd": b"8BPS",
    }
    outcome = pack(write(tmp_path / "in", files), tmp_path / "out")
    lines = (tmp_path / "out" / "report.jsonl").read_text().splitlines()
    report = {line["source"]: line["reason"] for line in map(json.loads, lines)}
    assert outcome["skipped"] == 4
    for name, kind in {"b.heic": "HEIC", "c.jpg": "HEIC", "d.NEF": "raw", "e.psd": "Photo"}.items():
        assert kind in report[name]
    only = write(tmp_path / "only", {"b.heic": heic})
    with refused(DataError, "only"):
        pack(only, tmp_path / "none")


@pytest.mark.parametrize("options", [{}, {"size": 5}, {"bits": 16}])
def test_images_pack_to_the_same_bytes_with_any_number_of_workers(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    kinds = ["JPEG", "PNG", "WEBP", "TIFF"]
    files = {f"{i}.{kinds[i % 4].lower()}": image(i, (8, 8), kinds[i % 4]) for i in range(16)}
    source = write(tmp_path / "in", files)
    for workers in (1, 2):
        pack(source, tmp_path / str(workers), workers=workers, shard_bytes=4_000, **options)
    one, two = (
        {name: digest for name, digest in content(tmp_path / n).items() if "packing" not in name}
        for n in "12"
    )
    assert one == two

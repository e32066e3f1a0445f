"""``gatdist verify``: every digest of data sets, checkpoints and runs."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile

import gatdist
from gatdist.cli import main
from gatdist.common.errors import DataError, StorageError
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.format.shard_files import write_dataset
from gatdist.packing.entries import printable
from gatdist.storage import Store
from support import refused

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 1), dtype=np.uint8)
PNGS = [encode_png(pixels) for pixels in PIXELS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = (
        [(f"{i:06d}", {"png": PNGS[i], "cls": b"%d" % (i % 2)}) for i in range(first, first + 4)]
        for first in (0, 4, 8)
    )
    store = Store(str(tmp_path / "data"))
    write_dataset(store, shards, modality="image", sample_shape=(1, 6, 6), num_classes=2)
    return tmp_path / "data"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_undamaged_data_set(folder: Path, decode: bool, workers: int) -> None:
    outcome = gatdist.verify(str(folder), decode=decode, workers=workers)
    assert outcome["whole"]
    assert (outcome["kind"], outcome["shards"], outcome["samples"]) == ("dataset", 3, 12)


def test_every_damage_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = folder / "shard-000001.tar"
    flip(tar, tar.read_bytes().index(PNGS[6]) + 50)
    with (folder / "shard-000002.tar").open("ab") as file:
        file.write(b"more")
    assert main(["verify", str(folder), "--json", "--workers", "1"]) == 2
    message = capsys.readouterr()
    damaged = [" ".join(found) for found in json.loads(message.out)["damaged"]]
    expected = (
        ("shard-000001.tar", "SHA-256"),
        ("shard-000001.tar", "000006.png"),
        ("shard-000002.tar", "bytes"),
    )
    for line, facts in zip(damaged, expected, strict=True):
        assert line in message.err
        assert all(fact in line for fact in facts)


def test_damage_between_files_is_found(folder: Path) -> None:
    flip(folder / "shard-000000.tar", 0)  # of a header, which is in no sample
    (found,) = gatdist.verify(str(folder), workers=1)["damaged"]
    assert "shard-000000.tar" in found[0]


def test_damaged_or_missing_index(folder: Path) -> None:
    flip(folder / "shard-000000.index.npy", 200)
    (folder / "shard-000001.index.npy").unlink()
    (folder / "shard-000002.tar").unlink()
    damaged = gatdist.verify(str(folder), workers=1)["damaged"]
    names = ["shard-000000.index.npy", "shard-000001.index.npy", "shard-000002.tar"]
    assert all(name in reason for name, (_, reason) in zip(names, damaged, strict=True))


def test_samples_that_decode_to_another_shape(tmp_path: Path) -> None:
    """Nothing is damaged, but a sample does not match the manifest."""
    samples = [("a", {"png": PNGS[0]}), ("b", {"png": encode_png(PIXELS[1][:5])})]
    write_dataset(Store(str(tmp_path)), [samples], modality="image", sample_shape=(1, 6, 6))
    assert gatdist.verify(str(tmp_path), workers=1)["whole"]
    (found,) = gatdist.verify(str(tmp_path), workers=1, decode=True)["damaged"]
    assert "b.png" in found[1]
    assert "5 × 6" in found[1]


def test_images_of_different_sizes_are_decoded(tmp_path: Path) -> None:
    samples = [("a", {"png": PNGS[0]}), ("b", {"png": encode_png(PIXELS[1][:5])})]
    write_dataset(Store(str(tmp_path)), [samples], modality="image", sample_shape=(1, None, None))
    assert gatdist.verify(str(tmp_path), workers=1, decode=True)["whole"]


def test_damaged_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with refused(DataError, "manifest.json"):
        gatdist.verify(str(folder))


def test_runs_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    settings = ["run.total_samples=32", "run.global_batch=16", "run.log_every_samples=16"]
    settings += ["run.checkpoint_every_samples=16", "evaluate.metrics=[]"]
    settings += ["model.generator.width=4", "model.discriminator.width=4"]
    sets = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", "digits", "--local", "--run-dir", str(run), *sets]) == 0
    outcome = gatdist.verify(str(run))
    assert (outcome["kind"], outcome["checkpoints"], outcome["whole"]) == ("run", 2, True)
    first, last = sorted((run / "checkpoints").iterdir())
    assert gatdist.verify(str(last))["whole"]
    flip(max(first.glob("*.safetensors")), -1)
    (found,) = gatdist.verify(str(run))["damaged"]
    assert str(first) in found[0]
    capsys.readouterr()
    assert main(["verify", str(first)]) == 2
    assert first.name in capsys.readouterr().err


def test_unrelated_folder_is_rejected(tmp_path: Path) -> None:
    with refused(StorageError, tmp_path.name):
        gatdist.verify(str(tmp_path))


def broken_ogg(how: str) -> bytes:
    """Return audio of 2,000 samples whose last page has a wrong count and a valid checksum."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(2000, np.float32), 8000, format="OGG", subtype="VORBIS")
    content = bytearray(file.getvalue())
    if how == "whole":
        return bytes(content)
    page = content.rindex(b"OggS")
    content[page + 6 : page + 14] = (2**63).to_bytes(8, "little")
    content[page + 22 : page + 26] = bytes(4)
    checksum = 0
    for byte in content[page:]:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1) ^ (0x04C11DB7 if checksum & 0x80000000 else 0)
            checksum &= 0xFFFFFFFF
    content[page + 22 : page + 26] = checksum.to_bytes(4, "little")
    return bytes(content)


def audio_with_nan() -> bytes:
    file = io.BytesIO()
    clip = np.zeros(2000, np.float32)
    clip[1990] = np.nan
    soundfile.write(file, clip, 8000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def tar_of(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_ogg_whose_count_exceeds_its_samples_is_not_indexed(
    tmp_path: Path,
) -> None:
    files = {"a.ogg": broken_ogg("whole"), "b.ogg": broken_ogg("granule")}
    tar_of(tmp_path / "data" / "s.tar", files)
    outcome = gatdist.index(str(tmp_path / "data"), workers=1)
    assert (outcome["samples"], outcome["skipped"]) == (1, 1)
    assert gatdist.verify(str(tmp_path / "data"), workers=1, decode=True)["whole"]


def test_each_damaged_sample_is_named(tmp_path: Path) -> None:
    whole = encode_wav(np.zeros((1, 2000), np.float32), 8000)
    tar_of(tmp_path / "data" / "s.tar", {"a.wav": whole, "b.wav": audio_with_nan()})
    gatdist.index(str(tmp_path / "data"), workers=1)
    ((_, message),) = gatdist.verify(str(tmp_path / "data"), workers=1, decode=True)["damaged"]
    assert "b.wav" in message


@pytest.mark.parametrize("name", ["a\u00a0b", "a\u3000b", "a\u200bb", "größe", "a b"])
def test_names_of_shards_may_contain_blanks_of_all_kinds(tmp_path: Path, name: str) -> None:
    whole = encode_wav(np.zeros((1, 2000), np.float32), 8000)
    tar_of(tmp_path / "data" / f"{name}.tar", {"a.wav": whole})
    assert gatdist.index(str(tmp_path / "data"), workers=1)["samples"] == 1
    assert gatdist.verify(str(tmp_path / "data"), workers=1, decode=True)["whole"]


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a\x85b", "a\u2028b", "a\udce9b"])
def test_shard_with_an_invalid_name_does_not_affect_the_others(tmp_path: Path, name: str) -> None:
    whole = encode_wav(np.zeros((1, 2000), np.float32), 8000)
    tar_of(tmp_path / "data" / f"{name}.tar", {"a.wav": whole})
    with refused(DataError):
        gatdist.index(str(tmp_path / "data"), workers=1)
    tar_of(tmp_path / "data" / "fit.tar", {"a.wav": whole})
    outcome = gatdist.index(str(tmp_path / "data"), workers=1)
    assert (outcome["samples"], outcome["skipped"]) == (1, 1)


@pytest.mark.parametrize("name", ["/etc/0.wav", "../0.wav", "abc", "\udce9/0.wav"])
def test_invalid_names_of_samples_are_given_as_the_reason(tmp_path: Path, name: str) -> None:
    whole = encode_wav(np.zeros((1, 2000), np.float32), 8000)
    tar_of(tmp_path / "data" / "s.tar", {name: whole})
    with refused(DataError) as found:
        gatdist.index(str(tmp_path / "data"), workers=1)
    assert printable(name) in str(found.value)

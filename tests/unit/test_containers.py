"""Data after the end of a container, and truncated ones: tars, zips, compressed tars, audio."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import gatdist
from decoding import decode_audio
from gatdist.common.errors import DataError
from gatdist.config import DataConfig
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.arrays import encode_array, read_npy
from gatdist.data.codecs.audio import read_audio, read_audio_header
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import open_dataset
from gatdist.data.format.shard_files import TarDamagedError, Walk
from packing import pack, samples
from support import refused

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 5, 7, 3), dtype=np.uint8)
PNGS = [encode_png(pixels) for pixels in PIXELS]


def files(first: int, end: int) -> dict[str, bytes]:
    found = {}
    for i in range(first, end):
        found |= {f"{i:04d}.png": PNGS[i], f"{i:04d}.cls": b"%d" % (i % 3)}
    return found


def tar(contents: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


A, B = tar(files(0, 6)), tar(files(6, 12), tarfile.PAX_FORMAT)
ENDED = len(A)


def report(folder: Path) -> dict[str, str]:
    lines = (folder / "report.jsonl").read_text().splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


def indexed(folder: Path, **options: Any) -> dict[str, Any]:
    return gatdist.index(str(folder), workers=1, **options)


def verified(folder: Path) -> list[str]:
    outcome = gatdist.verify(str(folder), decode=True, workers=1)
    assert outcome["whole"] == (not outcome["damaged"])
    return [" ".join(found) for found in outcome["damaged"]]


# Tars


@pytest.mark.parametrize(
    "content",
    [A + B, A + bytes(512 * 3) + B, A[: 512 * 25] + B, bytes(1024) + A + B, A + B + bytes(700)],
    ids=["cat", "zeros between", "one end record", "zeros first", "zeros last"],
)
def test_concatenated_tars_are_read_to_the_end(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "c.tar").write_bytes(content)
    packed = pack(tmp_path / "data" / "c.tar", tmp_path / "out")
    assert (packed["samples"], packed["skipped"], packed["num_classes"]) == (12, 0, 3)
    assert sorted(s["png"] for s in samples(tmp_path / "out")) == sorted(PNGS[:12])
    outcome = indexed(tmp_path / "data")
    assert (outcome["samples"], outcome["skipped"], outcome["num_classes"]) == (12, 0, 3)
    read, labels = open_dataset(DataConfig(url=str(tmp_path / "data"))).read(np.arange(12))
    assert (read == PIXELS[:12]).all()
    assert labels is not None
    assert labels.tolist() == [i % 3 for i in range(12)]
    assert verified(tmp_path / "data") == []


@pytest.mark.parametrize("garbage", [b"x", b"garbage" * 1000, b"\0" * 512 + b"x", A[700:1200]])
def test_data_after_the_end_of_a_tar_is_reported_everywhere(tmp_path: Path, garbage: bytes) -> None:
    at = ENDED + (512 if garbage.startswith(bytes(512)) else 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "c.tar").write_bytes(A + garbage)
    message = f"byte {at},"
    assert pack(tmp_path / "data" / "c.tar", tmp_path / "out")["samples"] == 6
    assert message in "".join(report(tmp_path / "out").values())
    assert indexed(tmp_path / "data")["samples"] == 6
    assert message in report(tmp_path / "data")["c.tar"]
    assert message in "".join(verified(tmp_path / "data"))
    for run in (
        lambda: indexed(tmp_path / "data", strict=True),
        lambda: pack(tmp_path / "data" / "c.tar", tmp_path / "strict", strict=True),
    ):
        with refused(DataError, "c.tar"):
            run()


def test_index_that_stops_at_the_first_end_of_a_concatenated_tar_is_damage(
    tmp_path: Path,
) -> None:
    """As earlier versions wrote it."""
    (tmp_path / "c.tar").write_bytes(A + B)
    indexed(tmp_path)
    from gatdist.data.format.manifest import read_manifest, write_manifest
    from gatdist.data.format.shard_files import encode_index, read_index
    from gatdist.storage import Store

    store = Store(str(tmp_path))
    manifest = read_manifest(store)
    (shard,) = manifest.shards
    import hashlib

    half = encode_index(read_index(store, shard)[:12].tolist())
    store.publish(shard.index, half)
    digest = hashlib.sha256(half).hexdigest()
    changed = shard.model_copy(update={"num_samples": 6, "index_sha256": digest})
    write_manifest(store, [changed], manifest)
    (found,) = verified(tmp_path)
    assert "6 samples" in found


@pytest.mark.parametrize("strict", [False, True])
def test_all_damaged_tars_are_named_and_skipped(tmp_path: Path, strict: bool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.tar").write_bytes(A[: A.index(PNGS[4]) + 20])
    (folder / "b.tar").write_bytes(B)
    (folder / "c.tar").write_bytes(A[:1024] + b"x" * 512 + A[1536:])
    for run, out in (
        (lambda: indexed(folder, strict=strict), folder),
        (lambda: pack(folder, tmp_path / "out", strict=strict), tmp_path / "out"),
    ):
        if strict:
            with pytest.raises(DataError) as error:
                run()
            assert error.value.exit_status == 2
            assert "a.tar" in str(error.value)
            assert "c.tar" in str(error.value)
            assert not (out / "manifest.json").exists()
        else:
            assert (run()["samples"], len(report(out))) == (6, 2)
            assert report(out).keys() == {"a.tar", "c.tar"}
    if not strict:
        assert verified(folder) == []


def test_twelve_damaged_tars_are_named_up_to_ten(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02d}.tar").write_bytes(A[:3000])
    for run in (lambda: indexed(tmp_path), lambda: pack(tmp_path, tmp_path.parent / "out")):
        with pytest.raises(DataError) as error:
            run()
        assert sum(f"{i:02d}.tar" in str(error.value) for i in range(12)) == 10
        assert "2 more" in str(error.value)


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-1"])
def test_size_in_a_tar_header_is_not_trusted(size: bytes) -> None:
    """Base-256, negative, and larger than the tar."""
    changed = bytearray(A)
    header = changed[2048:2560] if changed[2305:2310] == b"ustar" else changed[:512]
    at = changed.index(header)
    changed[at + 124 : at + 136] = size.ljust(12, b"\0")
    changed[at + 148 : at + 156] = b" " * 8
    changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    with pytest.raises(TarDamagedError):
        list(Walk(io.BytesIO(bytes(changed)), len(changed)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "zeros", "junk"]), min_size=1, max_size=5))
def test_every_tar_of_a_concatenation_up_to_junk_is_read(parts: list[str]) -> None:
    contents = {"a": A, "b": B, "zeros": bytes(1536), "junk": b"junk" * 128}
    content = b"".join(contents[part] for part in parts)
    before = parts[: parts.index("junk")] if "junk" in parts else parts
    walk = Walk(io.BytesIO(content), len(content))
    if not before:
        with pytest.raises(TarDamagedError):
            list(walk)
        return
    assert len(list(walk)) == 12 * sum(part in "ab" for part in before)
    at = sum(len(contents[part]) for part in before)
    assert walk.trailing == (at if "junk" in parts else None)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(A)), st.integers(0, len(A) - 1), st.integers(1, 255))
def test_damaged_tar_raises_or_reads_what_python_reads(end: int, at: int, flip: int) -> None:
    content = bytearray(A)
    content[at] ^= flip
    content = content[:end]
    walk = Walk(io.BytesIO(bytes(content)), len(content))
    try:
        found = [member.name for member in walk]
    except TarDamagedError:
        return
    assert len(found) == 12 or walk.trailing is not None


# Compressed tars


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_compressed_tars_of_several_members_or_with_data_after_the_end(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    cut = 3000
    several = compress(A[:cut]) + compress(A[cut:]) + bytes(8) + compress(B)
    path = tmp_path / f"x.tar{suffix}"
    path.write_bytes(several)
    outcome = pack(path, tmp_path / "several")
    assert (outcome["samples"], outcome["skipped"]) == (12, 0)
    for number, garbage in enumerate((b"x", b"garbage" * 50)):
        path.write_bytes(several + garbage)
        assert pack(path, tmp_path / f"{number}")["samples"] == 12
        (reason,) = report(tmp_path / f"{number}").values()
        assert f"byte {len(several)}," in reason
    path.write_bytes(several[:-40])
    with refused(DataError, path.name):
        pack(path, tmp_path / "cut")


# Zips


def zipped(first: int, end: int, names: str = "{0}/{1}.png") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i in range(first, end):
            archive.writestr(names.format("abc"[i % 3], i), PNGS[i])
    return stream.getvalue()


def test_concatenated_zips_are_read_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zipped(0, 6) + zipped(6, 12) + zipped(12, 18))
    outcome = pack(tmp_path / "x.zip", tmp_path / "out")
    assert (outcome["samples"], outcome["skipped"], outcome["num_classes"]) == (18, 0, 3)


def test_data_before_and_after_the_end_of_a_zip_is_reported(tmp_path: Path) -> None:
    plain = zipped(0, 6)
    (tmp_path / "x.zip").write_bytes(plain + b"garbage")
    assert pack(tmp_path / "x.zip", tmp_path / "after")["samples"] == 6
    assert f"byte {len(plain)}," in report(tmp_path / "after")["x.zip"]
    (tmp_path / "x.zip").write_bytes(b"MZ stub" + plain)
    assert pack(tmp_path / "x.zip", tmp_path / "before")["samples"] == 6
    assert "7 bytes" in report(tmp_path / "before")["x.zip"]


def test_zip_whose_local_header_has_another_name_than_the_directory(tmp_path: Path) -> None:
    raw = bytearray(zipped(0, 6))
    raw[raw.index(b"a/0.png")] = ord("b")
    (tmp_path / "x.zip").write_bytes(raw)
    assert pack(tmp_path / "x.zip", tmp_path / "out")["samples"] == 5
    assert list(report(tmp_path / "out")) == ["a/0.png"]


# Audio and arrays

TONE = np.random.default_rng(1).uniform(-0.5, 0.5, (10_000, 1)).astype(np.float32)


def audio(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, TONE, 16_000, format=kind, **options)
    return file.getvalue()


FLAC, WAV, OGG = audio("FLAC"), audio("WAV"), audio("OGG", subtype="VORBIS")


def flac(total: int) -> bytes:
    return FLAC[:22] + total.to_bytes(4, "big") + FLAC[26:]


def wav(field: bytes, value: int) -> bytes:
    at = WAV.index(field) + 4
    return WAV[:at] + value.to_bytes(4, "little") + WAV[at + 4 :]


@pytest.mark.parametrize(
    "content",
    [
        *(flac(total) for total in (0, 1, 5_000, 15_000, 2**32 - 1)),
        *(wav(b"data", size) for size in (0, 2**32 - 1)),
        *(wav(b"RIFF", size) for size in (0, 99, 2**32 - 1)),
    ],
)
def test_length_in_an_audio_header_is_not_trusted_but_counted(content: bytes) -> None:
    assert read_audio_header(content).length == 10_000
    assert np.abs(read_audio(content) - TONE.T).max() < 2**-15
    assert decode_audio(content, (1, 10_000), 16_000).shape == (1, 10_000)


@pytest.mark.parametrize(
    "content",
    [
        *(whole + b"garbage" * 9 for whole in (FLAC, WAV, OGG)),
        *(whole * 2 for whole in (FLAC, WAV, OGG)),
        *(whole[: len(whole) // 2] for whole in (FLAC, WAV, OGG)),
        *(whole[:-10] for whole in (FLAC, WAV, OGG)),
        *(wav(b"data", size) for size in (5_000, 100_000, 2**31)),
    ],
)
def test_truncated_audio_or_audio_with_data_after_the_end_is_rejected(content: bytes) -> None:
    with pytest.raises(CodecError):
        read_audio_header(content)
    with pytest.raises(CodecError):
        read_audio(content)


def test_audio_with_a_wrong_header_value_is_indexed_packed_and_verified_identically(
    tmp_path: Path,
) -> None:
    contents = {
        **{f"{i}.flac": content for i, content in enumerate((FLAC, flac(0), flac(5_000)))},
        "8.flac": FLAC * 2,
        "9.flac": FLAC[:-10],
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(tar(contents))
    outcome = indexed(tmp_path / "data")
    assert (outcome["samples"], outcome["skipped"]) == (3, 2)
    assert outcome["sample_shape"] == [1, 10_000]
    assert verified(tmp_path / "data") == []
    packed = pack(tmp_path / "data" / "a.tar", tmp_path / "out")
    assert (packed["samples"], packed["skipped"]) == (3, 2)
    assert {sample["flac"] for sample in samples(tmp_path / "out")} == {FLAC}


@pytest.mark.parametrize("change", [b"", b"more", b"-"])
def test_header_of_an_array_is_not_trusted(change: bytes) -> None:
    content = encode_array(np.arange(6.0))
    if not change:
        assert (read_npy(content) == np.arange(6.0)).all()
        return
    with pytest.raises(CodecError):
        read_npy(content + change if change == b"more" else content[:-1])
    with pytest.raises(CodecError):
        read_npy(content.replace(b"(6,)", b"(9,)"))


@given(st.integers(0, len(FLAC) - 1), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_damaged_headers_of_audio_raise_named_errors(at: int, flip: int) -> None:
    for whole in (FLAC, WAV, OGG):
        content = bytearray(whole)
        content[at % len(whole)] ^= flip
        try:
            header = read_audio_header(bytes(content))
            found = read_audio(bytes(content))
        except CodecError:
            continue
        assert found.shape == (header.channels, header.length)

"""``gatdist index``: shards of other writers, and every kind of invalid shard."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import gatdist
from gatdist.cli import main
from gatdist.common.errors import ConfigError, DataError
from gatdist.config import DataConfig
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.format.manifest import read_manifest
from gatdist.data.format.shard_files import read_index
from gatdist.storage import Store
from support import refused

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
PNGS = [encode_png(pixels) for pixels in PIXELS]
KINDS = ["cat", "dog", "ant"]


def tar(
    files: Mapping[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> bytes:
    """Return a tar of these files, as Python writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def images(first: int = 0, end: int = 24) -> list[tuple[str, bytes]]:
    files = []
    for i in range(first, end):
        files += [(f"{i:06d}.png", PNGS[i]), (f"{i:06d}.cls", b"%d" % (i % 3))]
    return files


def put(folder: Path, **shards: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in shards.items():
        (folder / f"{name}.tar").write_bytes(content)
    return folder


def indexed(folder: Path, **options: Any) -> dict[str, Any]:
    return gatdist.index(str(folder), workers=1, **options)


def opened(folder: Path, **config: Any) -> Dataset:
    return open_dataset(DataConfig(url=str(folder), **config))


# Valid shards


@pytest.mark.parametrize("workers", [1, 3])
def test_shards_of_the_webdataset_library(tmp_path: Path, workers: int) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=9, verbose=0) as writer:
        for i in range(24):
            writer.write({"__key__": f"{i:06d}", "png": Image.fromarray(PIXELS[i]), "cls": i % 3})
    outcome = gatdist.index(str(tmp_path), workers=workers)
    assert (outcome["samples"], outcome["shards"], outcome["skipped"]) == (24, 3, 0)
    assert (outcome["sample_shape"], outcome["num_classes"]) == ([3, 8, 8], 3)
    samples, labels = opened(tmp_path).read(np.arange(24))
    assert (samples == PIXELS).all()
    assert labels is not None
    assert labels.tolist() == [i % 3 for i in range(24)]


def img2dataset(folder: Path) -> Path:
    """Write a folder as img2dataset does: images of many sizes, captions, metadata, statistics."""
    for shard in range(2):
        files = []
        for i in range(10 * shard, 10 * shard + 10):
            height, width = 9 + i % 3, 8 + i % 4
            pixels = np.full((height, width, 3), 10 * i, np.uint8)
            facts = {"caption": f"image {i}", "status": "success", "kind": KINDS[i % 3]}
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "JPEG")
            key = f"{shard:05d}{i:04d}"
            files += [(f"{key}.jpg", image.getvalue()), (f"{key}.txt", b"an image")]
            files += [(f"{key}.json", json.dumps(facts).encode())]
        put(folder, **{f"{shard:05d}": tar(files, tarfile.PAX_FORMAT)})
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def test_folder_of_img2dataset(tmp_path: Path) -> None:
    outcome = indexed(img2dataset(tmp_path), labels="json:kind")
    assert outcome["sample_shape"] == [3, None, None]
    assert read_manifest(Store(str(tmp_path))).class_names == sorted(KINDS)
    with refused(DataError, "data.resolution"):
        opened(tmp_path)
    samples, labels = opened(tmp_path, resolution=8).read(np.arange(20))
    assert np.abs(samples.astype(int) - 10 * np.arange(20)[:, None, None, None]).max() <= 2
    assert labels is not None
    assert [sorted(KINDS)[label] for label in labels] == [KINDS[i % 3] for i in range(20)]


def test_run_on_indexed_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From shards of another tool to a trained generator, by two commands."""
    data = img2dataset(tmp_path / "data")
    train = ["train", "digits", "--local", "--run-dir", str(tmp_path / "run")]
    for setting in (
        f"data.url={data}",
        "data.resolution=8",
        "run.total_samples=32",
        "run.global_batch=8",
        "evaluate.metrics=[]",
        "model.generator.width=4",
        "model.discriminator.width=4",
    ):
        train += ["--set", setting]
    assert main(train) == 2
    assert f"gatdist index {data}" in capsys.readouterr().err
    assert main(["index", str(data), "--labels", "json:kind"]) == 0
    assert main(train) == 0


def test_index_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, a=tar([*images(), ("x.png", b"nothing"), ("x.cls", b"1")]))
    assert main(["index", str(tmp_path), "--json", "--workers", "1"]) == 0
    message = capsys.readouterr()
    outcome = json.loads(message.out)
    assert (outcome["samples"], outcome["skipped"], outcome["report"]) == (24, 1, "report.jsonl")
    for fact in ("cls", "24 samples", "3 classes", "a.tar/x"):
        assert fact in message.err
    (line,) = (tmp_path / "report.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "a.tar/x"


def test_nothing_is_written_next_to_the_shards(tmp_path: Path) -> None:
    shards = put(tmp_path / "shards", a=tar(images(0, 12)), b=tar(images(12, 24)))
    before = sorted(shards.iterdir())
    indexed(shards, out=str(tmp_path / "out"))
    assert sorted(shards.iterdir()) == before
    assert (opened(tmp_path / "out").read(np.arange(24))[0] == PIXELS).all()


def test_shards_in_folders_are_sorted_by_name(tmp_path: Path) -> None:
    put(tmp_path / "b", x=tar(images(12, 24)))
    put(tmp_path / "a", x=tar(images(0, 12)))
    indexed(tmp_path)
    assert (opened(tmp_path).read(np.arange(24))[0] == PIXELS).all()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_file_is_where_python_finds_it(
    tmp_path_factory: pytest.TempPathFactory, form: int, data: st.DataObject
) -> None:
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789_-" + (
        "ä漢 " if form != tarfile.USTAR_FORMAT else ""
    )
    longest = 250 if form != tarfile.USTAR_FORMAT else 60
    keys = data.draw(
        st.lists(
            st.text(alphabet, min_size=1, max_size=longest), min_size=1, max_size=9, unique=True
        )
    )
    files = [
        (f"{key}.{ending}", content)
        for i, key in enumerate(keys)
        for ending, content in (("txt", b"t" * (i * 100)), ("png", PNGS[i]), ("cls", b"0"))
    ]
    content = tar(files, form)
    folder = put(tmp_path_factory.mktemp("tar"), x=content)
    assert indexed(folder)["samples"] == len(keys)
    store = Store(str(folder))
    (shard,) = read_manifest(store).shards
    rows = read_index(store, shard)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if not m.name.endswith(".txt")]
    found = [
        (f"{row['key'].decode()}.{row['component'].decode()}", row["offset"], row["size"])
        for row in rows
    ]
    assert found == expected
    for row in rows:
        part = content[row["offset"] : row["offset"] + row["size"]]
        assert zlib.crc32(part) == row["crc32"]


def test_tar_larger_than_one_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatdist.packing.indexing.scan._CHUNK_BYTES", 700)
    put(tmp_path, a=tar(images()))
    indexed(tmp_path)
    assert (opened(tmp_path).read(np.arange(24))[0] == PIXELS).all()


# Other kinds of samples


def test_audio(tmp_path: Path) -> None:
    clips = RNG.uniform(-1, 1, (5, 1, 40)).astype(np.float32)
    files = [(f"{i}.wav", encode_wav(clip, 8000)) for i, clip in enumerate(clips)]
    files += [("6.wav", encode_wav(clips[0], 16000))]
    outcome = indexed(put(tmp_path, a=tar(files)))
    assert (outcome["modality"], outcome["sample_shape"]) == ("audio", [1, 40])
    assert outcome["skipped_examples"] == [["a.tar/6", "has 16,000 Hz, others 8,000"]]
    assert np.abs(opened(tmp_path).read(np.arange(5))[0] - clips).max() <= 2**-15


def test_audio_of_different_lengths_requires_a_length(tmp_path: Path) -> None:
    files = [(f"{i}.wav", encode_wav(np.zeros((1, 40 + i), np.float32), 8000)) for i in range(5)]
    assert indexed(put(tmp_path, a=tar(files)))["sample_shape"] == [1, None]
    with refused(DataError, "data.length"):
        opened(tmp_path)
    assert opened(tmp_path, length=40).read(np.arange(5))[0].shape == (5, 1, 40)


def test_texts_are_as_long_as_the_longest(tmp_path: Path) -> None:
    texts = ["one", "größer", "x"]
    files = [(f"{i}.txt", text.encode()) for i, text in enumerate(texts)]
    assert indexed(put(tmp_path, a=tar(files)))["sample_shape"] == [8]
    samples, _ = opened(tmp_path).read(np.arange(3))
    assert [bytes(row).rstrip(b"\0").decode() for row in samples] == texts


def test_points_and_tokens(tmp_path: Path) -> None:
    def saved(array: Any) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    rows = RNG.integers(0, 50, (6, 7))
    put(tmp_path, a=tar([(f"{i}.npy", saved(row)) for i, row in enumerate(rows)]))
    assert indexed(tmp_path)["modality"] == "points"
    outcome = indexed(tmp_path, tokens=int(rows.max()))
    assert outcome["modality"] == "tokens"
    assert f" {rows.max() - 1}" in outcome["skipped_examples"][0][1]
    indexed(tmp_path, tokens=50)
    samples, _ = opened(tmp_path).read(np.arange(6))
    assert samples.dtype == np.int32
    assert (samples == rows).all()


@pytest.mark.parametrize(
    ("labels", "expected"), [(None, 3), ("cls", 3), ("none", 0), ("txt", 2), ("json:n", 4)]
)
def test_labels_are_found(tmp_path: Path, labels: str | None, expected: int) -> None:
    files = []
    for i in range(12):
        files += [(f"{i}.png", PNGS[i]), (f"{i}.cls", b" %d\n" % (i % 3))]
        files += [(f"{i}.txt", [b"left", b"right"][i % 2]), (f"{i}.json", b'{"n": %d}' % (i % 4))]
    outcome = indexed(put(tmp_path, a=tar(files)), labels=labels)
    assert outcome["num_classes"] == expected
    _, found = opened(tmp_path).read(np.arange(12))
    assert (found is None) == (expected == 0)
    assert found is None or found.tolist() == [i % expected for i in range(12)]


def test_one_of_two_images_is_chosen(tmp_path: Path) -> None:
    files = [(f"{i}.{kind}.png", PNGS[i + d]) for i in range(5) for d, kind in enumerate("ab")]
    put(tmp_path, a=tar(files))
    with refused(DataError, tmp_path.name):
        indexed(tmp_path)
    put(tmp_path, a=tar([(f"{i}.{e}", PNGS[i]) for i in range(5) for e in ("jpg", "png")]))
    with refused(DataError, tmp_path.name):
        indexed(tmp_path)
    assert indexed(tmp_path, extension="png")["samples"] == 5
    assert (opened(tmp_path).read(np.arange(5))[0] == PIXELS[:5]).all()


# Repeated runs


def test_rerun_indexes_what_is_new_or_changed(tmp_path: Path) -> None:
    put(tmp_path, a=tar(images(0, 8)), b=tar(images(8, 16)))
    indexed(tmp_path)
    noted = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    put(tmp_path, b=tar(images(8, 12)), c=tar(images(12, 24)))
    assert indexed(tmp_path)["samples"] == 8 + 4 + 12
    (a,) = (path for path in noted if path.name == "a.index.npy")
    assert a.stat().st_mtime_ns == noted[a]
    assert (opened(tmp_path).read(np.arange(24))[0][:12] == PIXELS[:12]).all()


def test_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", **{f"s{i}": tar(images(4 * i, 4 * i + 4)) for i in range(6)})
    contents = []
    for workers in (1, 2, 5):
        out = tmp_path / str(workers)
        gatdist.index(str(folder), str(out), workers=workers)
        contents.append({p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert contents[0] == contents[1] == contents[2]


def test_packed_data_set_is_not_indexed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.png").write_bytes(PNGS[i])
    gatdist.pack(str(tmp_path / "in"), str(tmp_path / "out"), workers=1)
    with refused(DataError, "out"):
        indexed(tmp_path / "out")


# Indexes for other readers


def test_index_for_dali(tmp_path: Path) -> None:
    content = tar(images(0, 6))
    indexed(put(tmp_path, a=content), export=["dali"])
    head, *lines = (tmp_path / "a.idx").read_text().splitlines()
    assert head == "v1.2 6"
    for i, line in enumerate(lines):
        words = line.split(" ")
        parts = [words[k : k + 4] for k in range(0, len(words), 4)]
        assert [(p[0], p[3]) for p in parts] == [("png", f"{i:06d}.png"), ("cls", f"{i:06d}.cls")]
        _, offset, size, _ = parts[0]
        assert content[int(offset) : int(offset) + int(size)] == PNGS[i]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_for_energon(tmp_path: Path, form: int) -> None:
    long = "n" * 150 if form != tarfile.USTAR_FORMAT else "n"
    files = [(long + name, content) for name, content in images(0, 6)]
    content = tar(files, form)
    indexed(put(tmp_path, a=content), export=["energon"])
    raw = (tmp_path / "a.tar.idx").read_bytes()
    begins = struct.unpack(f"<{len(raw) // 8}Q", raw)
    assert len(begins) == 7
    for i in range(6):  # the bytes between two offsets, plus an end, are a tar of one sample
        part = content[begins[i] : begins[i + 1]] + bytes(1024)
        with tarfile.open(fileobj=io.BytesIO(part)) as archive:
            assert [m.name for m in archive] == [name for name, _ in files[2 * i : 2 * i + 2]]
    info = json.loads((tmp_path / ".nv-meta" / ".info.json").read_text())
    assert info["shard_counts"] == {"a.tar": 6}
    split = json.loads((tmp_path / ".nv-meta" / "split.yaml").read_text())
    assert split["split_parts"]["train"] == ["a.tar"]
    assert indexed(tmp_path, export=["energon"])["shards"] == 1  # its own folder is no shard


# Invalid shards

GOOD = tar(images(0, 6))


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (GOOD[: GOOD.index(PNGS[5]) + 100], ""),
        (GOOD[: 512 * 3], ""),
        (GOOD[:1024] + b"x" * 512 + GOOD[1536:], ""),
        (b"", ""),
        (b"no tar" * 1000, ""),
        (gzip.compress(GOOD), "gzip -dc "),
        (b"BZh91AY" + bytes(600), "bzip2 -dc "),
        (b"\xfd7zXZ\x00" + bytes(600), "xz -dc "),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd -dc "),
    ],
)
def test_file_that_is_no_tar_is_rejected(tmp_path: Path, content: bytes, fact: str) -> None:
    with refused(DataError, "a.tar") as caught:
        indexed(put(tmp_path, a=content))
    assert fact in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_tar_without_a_sample_is_rejected(tmp_path: Path) -> None:
    with refused(DataError, tmp_path.name):
        indexed(put(tmp_path, a=tar([])))
    assert not (tmp_path / "manifest.json").exists()


def bomb() -> bytes:
    """Return the header of an image of 60,000 × 60,000."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(600))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize(
    ("files", "fact"),
    [
        ([("x.png", b""), ("x.cls", b"1")], ""),
        ([("x.jpg", b"a text"), ("x.cls", b"1")], ""),
        ([("x.png", bomb()), ("x.cls", b"1")], "60000 × 60000"),
        ([("x.png", PNGS[0])], "label"),
        ([("x.cls", b"1")], ".cls"),
        ([("x.png", PNGS[0]), ("x.png", PNGS[1]), ("x.cls", b"1")], ".png"),
        ([("x.png", PNGS[0]), ("x.PNG", PNGS[1]), ("x.cls", b"1")], ".png"),
        ([("x.png", PNGS[0]), ("x.cls", b"")], "label"),
        ([("x.png", PNGS[0]), ("x.cls", b"\xff")], "UTF-8"),
        ([("x.png", PNGS[0]), ("y.png", PNGS[1]), ("x.cls", b"1"), ("y.cls", b"1")], ""),
        ([("/etc/x.png", PNGS[0])], ""),
        ([("../x.png", PNGS[0])], ""),
        ([("x", PNGS[0])], ""),
    ],
)
def test_skipped_samples_are_reported(
    tmp_path: Path, files: list[tuple[str, bytes]], fact: str
) -> None:
    put(tmp_path, a=tar([*images(0, 6), *files]))
    outcome = indexed(tmp_path)
    assert outcome["samples"] == 6
    reasons = dict(outcome["skipped_examples"])
    name = files[0][0]
    sample = "a.tar/x" if name.startswith("x") else f"a.tar/{name}"
    assert fact in reasons[sample]
    assert (opened(tmp_path).read(np.arange(6))[0] == PIXELS[:6]).all()
    with refused(DataError, sample):
        indexed(tmp_path, strict=True)


def test_key_in_two_places_is_reported(tmp_path: Path) -> None:
    put(tmp_path, a=tar([*images(0, 6), *images(0, 1)]))
    outcome = indexed(tmp_path)
    assert outcome["samples"] == 6
    assert [name for name, _ in outcome["skipped_examples"]] == ["a.tar/000000"]


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    content = tar([*images(0, 3), ("caf\xe9.png", PNGS[3]), ("caf\xe9.cls", b"1")])
    content = content.replace("caf\xe9".encode(), b"caf\xe9\0")
    outcome = indexed(put(tmp_path, a=rechecked(content)))
    assert outcome["samples"] == 3
    assert "UTF-8" in outcome["skipped_examples"][0][1]


def rechecked(content: bytes) -> bytes:
    """Return a tar whose headers have valid checksums again."""
    changed = bytearray(content)
    for at in range(0, len(changed), 512):
        header = changed[at : at + 512]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(changed)


def test_links_are_skipped(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in images(0, 3):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"x{kind!r}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    outcome = indexed(put(tmp_path, a=stream.getvalue()))
    assert (outcome["samples"], outcome["skipped"]) == (3, 4)


def test_one_sample_in_one_shard(tmp_path: Path) -> None:
    assert indexed(put(tmp_path, a=tar(images(0, 1))))["samples"] == 1
    assert (opened(tmp_path).read(np.array([0]))[0] == PIXELS[:1]).all()


def test_shard_that_changed_after_indexing_is_detected(tmp_path: Path) -> None:
    put(tmp_path, a=GOOD)
    indexed(tmp_path)
    put(tmp_path, a=GOOD + bytes(10240))
    with refused(DataError, "a.tar"):
        opened(tmp_path).read(np.array([0]))
    at = GOOD.index(PNGS[3])
    put(tmp_path, a=GOOD[: at + 60] + b"\x55" + GOOD[at + 61 :])
    with refused(DataError, "a.tar"):
        opened(tmp_path).read(np.array([3]))


def test_index_of_another_data_set_is_rejected(tmp_path: Path) -> None:
    put(tmp_path / "one", a=GOOD)
    put(tmp_path / "other", a=tar(images(6, 12)))
    for name in ("one", "other"):
        indexed(tmp_path / name)
    (tmp_path / "one" / "a.index.npy").write_bytes(
        (tmp_path / "other" / "a.index.npy").read_bytes()
    )
    # Both have the same content except for their keys.
    with refused(DataError, "a.index.npy"):
        opened(tmp_path / "one").read(np.array([0]))


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda folder: None, ""),
        (lambda folder: (folder / "x.jpg").write_bytes(b""), ""),
        (lambda folder: (folder / "x.tar.gz").write_bytes(b""), "gzip -dk x.tar.gz"),
    ],
)
def test_folder_without_shards_is_rejected(
    tmp_path: Path, make: Callable[[Path], Any], fact: str
) -> None:
    make(tmp_path)
    with refused(DataError, tmp_path.name) as caught:
        indexed(tmp_path)
    assert fact in str(caught.value)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"extension": "mp4"}, "--extension", "mp4"),
        ({"export": ["tfrecord"]}, "--export", "tfrecord"),
    ],
)
def test_invalid_options_are_rejected(
    tmp_path: Path, options: dict[str, Any], field: str, value: str
) -> None:
    with refused(ConfigError, field) as caught:
        indexed(put(tmp_path, a=GOOD), **options)
    assert caught.value.value == value

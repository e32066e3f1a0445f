"""Data sets: writing, reading back, and every kind of invalid data."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import webdataset
from PIL import Image, ImageOps
from pydantic import ValidationError

from gatdist.common.errors import DataError, StorageError
from gatdist.config import DataConfig
from gatdist.data.codecs.arrays import encode_array
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.format.manifest import read_manifest, write_manifest
from gatdist.data.format.shard_files import read_index, write_dataset, write_shard
from gatdist.data.order import substitute
from gatdist.data.reading.shards import OpenShards
from gatdist.storage import Store
from support import refused

SHARD_SIZES = (7, 4, 9)
SHAPE = (3, 5, 6)
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3)).astype(np.uint8)
LABELS = np.arange(20) % 4


def write(
    folder: Path,
    *,
    image: Callable[[int], bytes] = lambda i: encode_png(PIXELS[i]),
    label: Callable[[int], bytes | None] = lambda i: b"%d" % LABELS[i],
    component: str = "png",
    modality: Any = "image",
    shape: tuple[int | None, ...] = SHAPE,
    num_classes: int = 4,
    label_component: str = "cls",
    label_spec: str = "cls",
    **spec: Any,
) -> Path:
    """Write the 20 samples in three shards."""
    numbers = iter(range(20))

    def sample(i: int) -> tuple[str, dict[str, bytes]]:
        found = label(i)
        return f"{i:06d}", {component: image(i)} | (
            {} if found is None else {label_component: found}
        )

    shards = ([sample(next(numbers)) for _ in range(size)] for size in SHARD_SIZES)
    write_dataset(
        Store(str(folder)),
        shards,
        modality=modality,
        sample_shape=shape,
        num_classes=num_classes,
        label=label_spec,
        **spec,
    )
    return folder


def opened(folder: Path, **config: Any) -> Dataset:
    return open_dataset(DataConfig(url=str(folder), **config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data")


# Reading what was written


def test_properties_of_a_data_set(folder: Path) -> None:
    dataset = opened(folder)
    assert (dataset.num_samples, dataset.num_shards, dataset.num_classes) == (20, 3, 4)
    assert dataset.modality == "image"
    assert dataset.sample_shape == SHAPE
    assert dataset.num_bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert len(dataset.fingerprint) == 64


@pytest.mark.parametrize("memory_bytes", [2000, 2**30])
@pytest.mark.parametrize("portion_bytes", [1, 5000, 2**25])
def test_samples_come_in_the_requested_order_with_any_cache(
    folder: Path, memory_bytes: int, portion_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatdist.data.dataset._PORTION_BYTES", portion_bytes)
    dataset = opened(folder, memory_bytes=memory_bytes)
    assert dataset.is_decoded == (memory_bytes == 2**30)
    for indices in ([19, 0, 7, 7, 11], list(range(20)), [3], []):
        samples, labels = dataset.read(np.array(indices, dtype=np.int64))
        assert samples.dtype == np.uint8
        assert (samples == PIXELS[indices]).all()
        assert labels is not None
        assert labels.tolist() == LABELS[indices].tolist()


def test_caller_owns_returned_arrays(folder: Path) -> None:
    dataset = opened(folder)
    dataset.read(np.arange(20))[0][:] = 0
    assert (dataset.read(np.arange(20))[0] == PIXELS).all()


def test_small_data_set_is_read_once(folder: Path) -> None:
    dataset = opened(folder)
    before, _ = dataset.read(np.arange(20))
    for path in folder.iterdir():
        path.unlink()
    assert (dataset.read(np.arange(20))[0] == before).all()


def test_neighbouring_samples_are_fetched_together(folder: Path) -> None:
    dataset = opened(folder, memory_bytes=2000)
    dataset.read(np.arange(20))
    whole = dataset.bytes_fetched
    assert 0.8 * dataset.num_bytes <= whole <= dataset.num_bytes
    dataset.read(np.array([0, 19]))
    assert dataset.bytes_fetched - whole < 0.2 * whole


class Opened:
    """A stand-in for an opened shard."""

    def __init__(self, number: int, num_bytes: int) -> None:
        self.number, self.num_bytes = number, num_bytes


def test_memory_for_indexes_is_bounded() -> None:
    opened: list[int] = []

    def open_shard(number: int) -> Opened:
        opened.append(number)
        return Opened(number, 4)

    shards: Any = OpenShards(open_shard, max_bytes=10)  # type: ignore[arg-type]
    assert [shards[i].number for i in (0, 1, 0, 2, 0, 1)] == [0, 1, 0, 2, 0, 1]
    assert opened == [0, 1, 2, 1]  # of the three, 1 is the least recently used
    shards = OpenShards(open_shard, max_bytes=1)  # type: ignore[arg-type]
    assert [shards[i].number for i in (5, 5, 6, 5)] == [5, 5, 6, 5]
    assert opened[4:] == [5, 6, 5]


def test_shard_is_opened_once_by_all_threads() -> None:
    opened: list[int] = []

    def open_shard(number: int) -> Opened:
        opened.append(number)
        time.sleep(0.02)
        if len(opened) == 1:
            raise StorageError("shard", "is gone")
        return Opened(number, 1)

    shards: Any = OpenShards(open_shard, max_bytes=10)  # type: ignore[arg-type]
    with pytest.raises(StorageError):
        shards[3]
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(lambda _: shards[3], range(8)))) == 1
    assert opened == [3, 3]


def test_points_without_labels(tmp_path: Path) -> None:
    points = np.random.default_rng(1).normal(size=(20, 2)).astype(np.float32)
    write(
        tmp_path,
        image=lambda i: encode_array(points[i]),
        label=lambda i: None,
        component="npy",
        modality="points",
        shape=(2,),
        num_classes=0,
    )
    dataset = opened(tmp_path)
    assert dataset.modality == "points"
    samples, labels = dataset.read(np.arange(20))
    assert samples.dtype == np.float32
    assert (samples == points).all()
    assert labels is None


def test_images_of_many_formats(tmp_path: Path) -> None:
    smooth = (np.add.outer(np.arange(16), np.arange(24))[..., None] * [2, 3, 5]).astype(np.uint8)

    def with_pillow(kind: str, mode: str = "RGB") -> bytes:
        file = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        Image.fromarray(smooth).convert(mode).save(file, kind, **options)
        return file.getvalue()

    for kind, component in [("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp"), ("PPM", "ppm")]:
        content = with_pillow(kind)
        folder = write(
            tmp_path / kind,
            image=lambda i, content=content: content,
            component=component,
            shape=(3, 16, 24),
        )
        assert (opened(folder).read(np.array([13]))[0][0] == smooth).all()
    jpeg = simplejpeg.encode_jpeg(smooth, quality=95)
    folder = write(tmp_path / "JPEG", image=lambda i: jpeg, component="jpg", shape=(3, 16, 24))
    error = opened(folder).read(np.array([0]))[0][0].astype(int) - smooth
    assert np.abs(error).mean() < 4
    gray = simplejpeg.encode_jpeg(smooth[..., :1].copy(), colorspace="GRAY", quality=95)
    folder = write(tmp_path / "gray", image=lambda i: gray, component="jpeg", shape=(1, 16, 24))
    error = opened(folder).read(np.array([0]))[0][0].astype(int) - smooth[..., :1]
    assert np.abs(error).mean() < 4


def test_pillow_reads_png_of_gatdist() -> None:
    for channels in (1, 3):
        pixels = PIXELS[0, :, :, :channels]
        image = Image.open(io.BytesIO(encode_png(pixels)))
        assert (np.asarray(image).reshape(pixels.shape) == pixels).all()


# Files


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # deprecation in webdataset
def test_webdataset_reads_the_shards(folder: Path) -> None:
    url = str(folder / "shard-{000000..000002}.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(20)]
    assert (np.stack([sample["png"] for sample in samples]) == PIXELS).all()
    assert [sample["cls"] for sample in samples] == LABELS.tolist()


def test_shards_are_plain_tars_and_the_index_finds_each_file(folder: Path) -> None:
    store = Store(str(folder))
    for shard in read_manifest(store).shards:
        content = store.read(shard.name)
        rows = read_index(store, shard)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = tar.getmembers()
            assert all(member.mtime == 0 for member in members)
            # Header and content, each in blocks of 512 bytes, and the two that end the tar.
            blocks = sum(1 + -(-member.size // 512) for member in members)
            assert len(content) == 512 * (blocks + 2)
            names = [f"{r['key'].decode()}.{r['component'].decode()}" for r in rows]
            assert names == [member.name for member in members]
            assert [m.offset_data for m in members] == rows["offset"].tolist()
            assert [m.size for m in members] == rows["size"].tolist()


def test_same_samples_have_the_same_fingerprint(tmp_path: Path) -> None:
    first = opened(write(tmp_path / "a")).fingerprint
    assert opened(write(tmp_path / "b")).fingerprint == first
    other = write(tmp_path / "c", label=lambda i: b"3")
    assert opened(other).fingerprint != first


@pytest.mark.parametrize(
    ("samples", "subject", "value"),
    [
        ([("a", {"png": b""}), ("a", {"png": b""})], "shard-000000: key", "a"),
        ([("a.b", {"png": b""})], "shard-000000: key", "a.b"),
        ([("a", {"PNG": b""})], "shard-000000: a", "PNG"),
        ([("k" * 300, {"png": b""})], f"{'k' * 300}.png", None),
        ([], "shard-000000", None),
    ],
)
def test_samples_that_no_shard_may_contain_are_rejected(
    tmp_path: Path, samples: Any, subject: str, value: Any
) -> None:
    with refused(DataError, subject) as caught:
        write_shard(Store(str(tmp_path)), "shard-000000", samples)
    assert caught.value.value == value
    assert list(tmp_path.iterdir()) == []


# Invalid data: reported in one message that names it


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder_without_a_data_set_is_rejected(tmp_path: Path, folder: Path) -> None:
    with refused(DataError, "nowhere"):
        opened(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with refused(DataError, tmp_path.name):
        opened(tmp_path)
    (folder / "manifest.json").unlink()
    with refused(DataError, "data"):
        opened(folder)


@pytest.mark.parametrize(
    ("changes", "subject", "fact"),
    [
        ({"version": 7}, "manifest.json", "(7, 1)"),
        ({"order_version": 2}, "manifest.json", "(2, 2)"),
        ({"num_classes": 5}, "manifest.json: fingerprint", ""),
        ({"num_samples": 21}, "manifest.json: fingerprint", ""),
        ({"modality": "sound"}, "manifest.json", "modality"),
        ({"sample_shape": [4, 5, 6]}, "manifest.json", "sample_shape"),
        ({"sample_shape": [3, 2**63, 6]}, "manifest.json", "sample_shape.1"),
        ({"shards": []}, "data", ""),
        ({"shards": [{"name": "../../etc/passwd"}]}, "manifest.json", "shards.0.name"),
    ],
)
def test_mismatched_manifest_is_rejected(
    folder: Path, changes: dict[str, Any], subject: str, fact: str
) -> None:
    edit_manifest(folder, **changes)
    with refused(DataError, subject) as caught:
        opened(folder)
    assert fact in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1', b"\xff"])
def test_invalid_manifest_is_rejected(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with refused(DataError, "manifest.json"):
        opened(folder)


@pytest.mark.parametrize("resize", ["lanczos", "box"])
@pytest.mark.parametrize("resolution", [5, [6, 5], [10, 12]])
def test_images_at_another_resolution(
    folder: Path, resolution: int | list[int], resize: str
) -> None:
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    dataset = opened(folder, resolution=resolution, resize=resize)
    assert dataset.sample_shape == (3, height, width)
    samples, _ = dataset.read(np.arange(20))
    for found, pixels in zip(samples, PIXELS, strict=True):
        fitted = ImageOps.fit(
            Image.fromarray(pixels), (width, height), method=Image.Resampling[resize.upper()]
        )
        assert (found == np.asarray(fitted)).all()


def test_images_at_their_own_resolution_are_unchanged(folder: Path) -> None:
    samples, _ = opened(folder, resolution=[5, 6]).read(np.arange(20))
    assert (samples == PIXELS).all()


def test_images_in_gray(folder: Path) -> None:
    dataset = opened(folder, channels=1)
    assert dataset.sample_shape == (1, 5, 6)
    luma = PIXELS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(dataset.read(np.arange(20))[0][..., 0] - luma).max() < 1


def test_images_of_different_sizes_require_a_resolution(tmp_path: Path) -> None:
    sizes = [(3 + i % 4, 4 + i % 3) for i in range(20)]
    write(
        tmp_path,
        image=lambda i: encode_png(np.full((*sizes[i], 3), i, np.uint8)),
        shape=(3, None, None),
    )
    with refused(DataError, "data.resolution"):
        opened(tmp_path)
    samples, _ = opened(tmp_path, resolution=4).read(np.arange(20))
    assert (samples == np.arange(20, dtype=np.uint8)[:, None, None, None]).all()


@pytest.mark.parametrize(("key", "value"), [("channels", 2), ("length", 8)])
def test_keys_that_do_not_apply_to_images_are_rejected(folder: Path, key: str, value: int) -> None:
    with refused(DataError, f"data.{key}") as caught:
        opened(folder, **{key: value})
    assert caught.value.value == value


@pytest.mark.parametrize("key", ["resolution", "channels", "length"])
def test_points_have_one_shape(tmp_path: Path, key: str) -> None:
    write(tmp_path, modality="points", shape=(2,))
    with refused(DataError, f"data.{key}") as caught:
        opened(tmp_path, **{key: 1})
    assert caught.value.value == 1


# Audio, text and tokens

CLIPS = np.random.default_rng(1).uniform(-1, 1, (20, 2, 30)).astype(np.float32)
TEXTS = [f"Satz {i} größer als" for i in range(20)]
IDS = np.random.default_rng(2).integers(0, 50, (20, 12))


def write_audio(folder: Path, **spec: Any) -> Path:
    clips = [encode_wav(clip, 8000) for clip in CLIPS]
    return write(
        folder,
        image=clips.__getitem__,
        component="wav",
        modality="audio",
        shape=(2, 30),
        **{"sample_rate": 8000} | spec,
    )


def test_audio(tmp_path: Path) -> None:
    dataset = opened(write_audio(tmp_path))
    assert (dataset.modality, dataset.sample_shape) == ("audio", (2, 30))
    samples, labels = dataset.read(np.arange(20))
    assert samples.dtype == np.float32
    assert np.abs(samples - CLIPS).max() <= 2**-15
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()


def test_audio_shorter_and_with_one_channel(tmp_path: Path) -> None:
    dataset = opened(write_audio(tmp_path), length=10, channels=1)
    assert dataset.sample_shape == (1, 10)
    mean = CLIPS[:, :, :10].mean(axis=1, keepdims=True)
    assert np.abs(dataset.read(np.arange(20))[0] - mean).max() <= 2**-15


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [("length", 31, " 30"), ("channels", 3, "1 or 2"), ("resolution", 8, "")],
)
def test_invalid_keys_of_audio_are_rejected(
    tmp_path: Path, key: str, value: int, fact: str
) -> None:
    with refused(DataError, f"data.{key}") as caught:
        opened(write_audio(tmp_path), **{key: value})
    assert caught.value.value == value
    assert fact in str(caught.value)


def test_audio_of_another_rate_than_the_manifest_is_rejected(tmp_path: Path) -> None:
    dataset = opened(write_audio(tmp_path, sample_rate=16000))
    with refused(DataError, "shard-000000.tar"):
        dataset.read(np.array([3]))


@pytest.mark.parametrize("length", [None, 6])
def test_texts(tmp_path: Path, length: int | None) -> None:
    write(
        tmp_path,
        image=lambda i: TEXTS[i].encode(),
        component="txt",
        modality="text",
        shape=(24,),
    )
    dataset = opened(tmp_path, length=length)
    assert (dataset.modality, dataset.sample_shape) == ("text", (length or 24,))
    samples, _ = dataset.read(np.arange(20))
    found = [bytes(row).rstrip(b"\0").decode() for row in samples]
    assert found == [text[:length] for text in TEXTS]


def test_tokens(tmp_path: Path) -> None:
    write(
        tmp_path,
        image=lambda i: encode_array(IDS[i]),
        component="npy",
        modality="tokens",
        shape=(12,),
        num_tokens=50,
    )
    samples, _ = opened(tmp_path, length=5).read(np.arange(20))
    assert samples.dtype == np.int32
    assert (samples == IDS[:, :5]).all()


@pytest.mark.parametrize(
    "spec",
    [
        {"modality": "audio", "shape": (1, 30)},
        {"modality": "tokens", "shape": (1,)},
        {"modality": "text", "shape": (1, 2)},
        {"modality": "points", "shape": ()},
        {"modality": "points", "shape": (2**30, 2**30)},
        {"modality": "tokens", "shape": (8,), "num_tokens": 2**32},
        {"class_names": ["a", "b"]},
        {"named_labels": True},
    ],
)
def test_incomplete_manifest_is_rejected(tmp_path: Path, spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        write(tmp_path, **spec)


# Labels


@pytest.mark.parametrize(
    ("label", "component", "content"),
    [
        ("json:kind.of", "json", lambda name, i: b'{"kind.of": "%s", "x": %d}' % (name, i)),
        ("txt", "txt", lambda name, i: b" %s\n" % name),
    ],
)
def test_labels_by_their_names(
    tmp_path: Path, label: str, component: str, content: Callable[[bytes, int], bytes]
) -> None:
    names = ["3", "0", "cat", "dog"]  # some of which look like numbers
    contents = [content(names[LABELS[i]].encode(), i) for i in range(20)]
    write(
        tmp_path,
        label=contents.__getitem__,
        label_component=component,
        label_spec=label,
        class_names=names,
        named_labels=True,
    )
    _, labels = opened(tmp_path).read(np.arange(20))
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()


def test_class_names_that_look_like_numbers(tmp_path: Path) -> None:
    write(tmp_path, class_names=["3", "2", "1", "0"])
    _, labels = opened(tmp_path).read(np.arange(20))
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()


def test_label_that_is_no_name_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, label=lambda i: b"bird", class_names=list("abcd"), named_labels=True)
    with refused(DataError, "shard-000000.tar"):
        opened(tmp_path).read(np.array([0]))


# Shards in another folder


def test_shards_in_another_folder(tmp_path: Path, folder: Path) -> None:
    """The tars are in a read-only folder, the manifest and indexes in another."""
    store = Store(str(tmp_path / "index"))
    manifest = read_manifest(Store(str(folder)))
    for path in folder.glob("*.npy"):
        store.publish(path.name, path.read_bytes())
        path.unlink()
    (folder / "manifest.json").unlink()
    write_manifest(store, manifest.shards, manifest, shards_url=str(folder))
    dataset = opened(tmp_path / "index")
    assert (dataset.read(np.arange(20))[0] == PIXELS).all()
    assert dataset.fingerprint == manifest.fingerprint


def test_shard_of_another_size_is_rejected(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    with path.open("ab") as file:
        file.truncate(size - 512)
    dataset = opened(folder)
    dataset.read(np.array([0]))  # other shards can still be read
    with refused(DataError, "shard-000001.tar"):
        dataset.read(np.array([8]))


def test_missing_shard_or_index_is_rejected(folder: Path) -> None:
    (folder / "shard-000000.tar").unlink()
    with refused(StorageError, "shard-000000.tar"):
        opened(folder).read(np.array([0]))
    (folder / "shard-000002.index.npy").unlink()
    with refused(DataError, "shard-000002.index.npy"):
        opened(folder).read(np.array([19]))


def test_damaged_index_is_rejected(folder: Path) -> None:
    path = folder / "shard-000000.index.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with refused(DataError, "shard-000000.index.npy"):
        opened(folder).read(np.array([0]))


def flip_a_bit(folder: Path, key: str) -> int:
    """Damage one image of the first shard, and return its offset."""
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmember(key).offset_data
    content = bytearray(path.read_bytes())
    content[offset + 60] ^= 4
    path.write_bytes(content)
    return offset


def test_flipped_bit_is_detected(folder: Path) -> None:
    offset = flip_a_bit(folder, "000003.png")
    with refused(DataError, "shard-000000.tar") as found:
        opened(folder).read(np.array([1, 3]))
    for fact in ("000003.png", str(offset), "CRC-32"):
        assert fact in str(found.value)


class Flipping(Store):
    """Storage that flips a bit in one read of a shard."""

    flips_at: int = -1
    num_reads = 0

    def read_ranges(self, ranges: Any, **options: Any) -> list[bytes]:
        contents = super().read_ranges(ranges, **options)
        self.num_reads += 1
        if self.num_reads == self.flips_at:
            content = bytearray(contents[0])
            content[60] ^= 1
            contents[0] = bytes(content)
        return contents


def test_bit_flipped_in_transit_is_fetched_again(folder: Path) -> None:
    store = Flipping(str(folder))
    config = DataConfig(url=str(folder), memory_bytes=2000)
    dataset = Dataset(store, read_manifest(store), config)
    store.flips_at = 1
    assert (dataset.read(np.arange(20))[0] == PIXELS).all()
    assert store.num_reads == 2
    assert dataset.bad_samples == {}


# Bad samples: substitutes


@pytest.mark.parametrize("memory_bytes", [2000, 2**30])
def test_bad_sample_is_substituted(folder: Path, memory_bytes: int) -> None:
    flip_a_bit(folder, "000003.png")
    flip_a_bit(folder, "000006.png")
    dataset = opened(folder, memory_bytes=memory_bytes, on_bad_sample="substitute")
    expected = PIXELS.copy()
    stands_in = {}
    for i in (3, 6):
        candidates = (substitute(i, attempt, 20) for attempt in range(20))
        stands_in[i] = next(other for other in candidates if other not in (3, 6))
        expected[i] = PIXELS[stands_in[i]]
    for _ in range(2):
        samples, labels = dataset.read(np.arange(20))
        assert (samples == expected).all()
        assert labels is not None
        assert labels[[3, 6]].tolist() == LABELS[[stands_in[3], stands_in[6]]].tolist()
    assert sorted(dataset.bad_samples) == [3, 6]
    assert "000003.png" in dataset.bad_samples[3]
    # The same substitute in another order and without others.
    alone = opened(folder, memory_bytes=memory_bytes, on_bad_sample="substitute")
    assert (alone.read(np.array([6]))[0] == expected[6]).all()


def test_too_many_bad_samples_are_an_error_nevertheless(folder: Path) -> None:
    for i in range(7):
        flip_a_bit(folder, f"{i:06d}.png")
    dataset = opened(folder, on_bad_sample="substitute", bad_sample_budget=6)
    with refused(DataError, "data.bad_sample_budget"):
        dataset.read(np.arange(20))
    dataset = opened(folder, on_bad_sample="substitute", bad_sample_budget=7)
    assert len(dataset.read(np.arange(20))[0]) == 20


def test_without_good_samples_there_is_no_substitute(tmp_path: Path) -> None:
    write(tmp_path, image=lambda i: b"no image")
    dataset = opened(tmp_path, on_bad_sample="substitute")
    with refused(DataError, tmp_path.name):
        dataset.read(np.array([4]))


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


RGB = Image.fromarray(PIXELS[0])
BAD_IMAGES = {
    "no image": b"GIF89a nonsense",
    "empty": b"",
    "cut short": encode_png(PIXELS[0])[:80],
    "cut jpeg": simplejpeg.encode_jpeg(np.zeros((5, 6, 3), np.uint8))[:-200],
    "size": encode_png(PIXELS[0][:4]),
    "jpeg size": simplejpeg.encode_jpeg(np.zeros((5, 5, 3), np.uint8)),
    "bomb": saved(Image.new("1", (20_000, 20_000))),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_rejected(tmp_path: Path, name: str) -> None:
    content = BAD_IMAGES[name]
    write(tmp_path, image=lambda i: content if i == 4 else encode_png(PIXELS[i]))
    dataset = opened(tmp_path)
    dataset.read(np.array([0, 19]))
    with refused(DataError, "shard-000000.tar"):
        dataset.read(np.array([4]))


def test_wrong_size_of_an_image_is_reported_with_a_hint(tmp_path: Path) -> None:
    write(tmp_path, shape=(3, 8, 9))
    with refused(DataError, "shard-000000.tar"):
        opened(tmp_path).read(np.array([0]))


@pytest.mark.parametrize(
    "content",
    [
        b"not an array",
        encode_array(np.zeros(3, np.float32)),
        encode_array(np.array([0, np.nan], np.float32)),
        encode_array(np.array(["a", "b"])),
    ],
)
def test_bad_point_is_rejected(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, image=lambda i: content, component="npy", modality="points", shape=(2,))
    with refused(DataError, "shard-000000.tar"):
        opened(tmp_path).read(np.array([0]))


def test_point_is_never_unpickled(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    content = file.getvalue()
    write(tmp_path, image=lambda i: content, component="npy", modality="points", shape=(2,))
    with refused(DataError, "shard-000000.tar"):
        opened(tmp_path).read(np.array([0]))


@pytest.mark.parametrize("content", [b"4", b"-1", b"cat", None])
def test_bad_label_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    write(tmp_path, label=lambda i: content if i == 4 else b"0")
    with refused(DataError, "shard-000000.tar"):
        opened(tmp_path).read(np.array([4]))


def test_sample_without_an_image_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, component="wav")
    with refused(DataError, "shard-000000.tar"):
        opened(tmp_path).read(np.array([0]))

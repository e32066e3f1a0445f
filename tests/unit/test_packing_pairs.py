"""Packing of samples with several fields, from folders, suffixes, tables and shards."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image

import gatdist
from gatdist.common.errors import ConfigError, DataError
from gatdist.config import DataConfig
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.dataset import open_dataset
from gatdist.data.format.manifest import read_manifest
from gatdist.data.modalities import columns
from gatdist.packing.sources.fields import Pattern
from gatdist.storage import Store
from packing import content, image, pack, samples, write
from support import refused

COUNT = 9
FOLDERS = {"input": "edges", "target": "photos"}
TARGETS = [image(i) for i in range(COUNT)]
INPUTS = [image(100 + i, (3, 4), "JPEG") for i in range(COUNT)]


def folders(root: Path) -> tuple[Path, dict[str, str]]:
    files = {f"photos/{i:03d}.png": TARGETS[i] for i in range(COUNT)}
    return write(root, files | {f"edges/{i:03d}.jpg": INPUTS[i] for i in range(COUNT)}), FOLDERS


def suffixes(root: Path) -> tuple[Path, dict[str, str]]:
    files = {f"{i:03d}.png": TARGETS[i] for i in range(COUNT)}
    write(root, files | {f"{i:03d}_edges.jpg": INPUTS[i] for i in range(COUNT)})
    return root, {"input": "*_edges.jpg", "target": "*"}


def table(root: Path) -> tuple[Path, dict[str, str]]:
    folders(root)
    with (root / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["edges", "target"])
        rows.writerows([f"edges/{i:03d}.jpg", f"photos/{i:03d}.png"] for i in range(COUNT))
    return root / "pairs.csv", {"input": "edges", "target": "target"}


def json_lines(root: Path) -> tuple[Path, dict[str, str]]:
    folders(root)
    rows = [{"a": f"edges/{i:03d}.jpg", "b": f"photos/{i:03d}.png"} for i in range(COUNT)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "pairs.jsonl", {"input": "a", "target": "b"}


def parquet(root: Path) -> tuple[Path, dict[str, str]]:
    folders(root)  # a column of bytes, and one of names
    names = [f"photos/{i:03d}.png" for i in range(COUNT)]
    pyarrow.parquet.write_table(
        pyarrow.table({"edges": INPUTS, "photo": names}), root / "pairs.parquet"
    )
    return root / "pairs.parquet", {"input": "edges", "target": "photo"}


def shards(root: Path) -> tuple[Path, dict[str, str]]:
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        for i in range(COUNT):
            for name, data in (("in.jpg", INPUTS[i]), ("png", TARGETS[i]), ("json", b"{}")):
                info = tarfile.TarInfo(f"{i:03d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root / "0.tar", {"input": "in.*", "target": "png"}


def archive(root: Path) -> tuple[Path, dict[str, str]]:
    folders(root)
    with tarfile.open(root / "pairs.tar", "w") as tar:
        for folder in FOLDERS.values():
            tar.add(root / folder, folder)
    return root / "pairs.tar", FOLDERS


LAYOUTS = [folders, suffixes, table, json_lines, parquet, shards, archive]


def read(folder: Path, **keys: Any) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    """Return all samples by field, and the labels."""
    dataset = open_dataset(DataConfig(url=str(folder), **keys))
    records, labels = dataset.read(np.arange(dataset.num_samples))
    fields = dataset.spec.of_fields()
    found = {}
    for name, column in zip(fields, columns(fields), strict=True):
        part = np.ascontiguousarray(records[:, column.begin : column.end])
        found[name] = part.view(column.dtype).reshape(-1, *column.shape)
    return found, labels


def pixels(content: bytes) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_read_back_equals_its_source(layout: Any, tmp_path: Path) -> None:
    source, fields = layout(tmp_path / "source")
    planned = pack(source, tmp_path / "packed", fields=fields, dry_run=True)
    assert planned["samples"] == COUNT
    assert not (tmp_path / "packed").exists()
    outcome = pack(source, tmp_path / "packed", fields=fields)
    assert (outcome["samples"], outcome["skipped"]) == (COUNT, 0)
    assert outcome["shards"] > 1 or layout is not folders
    assert {(s["target.png"], s["input.jpg"]) for s in samples(tmp_path / "packed")} == set(
        zip(TARGETS, INPUTS, strict=True)
    )
    manifest = read_manifest(Store(str(tmp_path / "packed")))
    assert (manifest.component, manifest.sample_shape) == ("target.png", [3, 5, 7])
    assert manifest.fields is not None
    assert manifest.fields["input"].component == "input.jpg"
    assert manifest.fields["input"].sample_shape == [3, 3, 4]
    found, labels = read(tmp_path / "packed")
    assert labels is None
    place = {pixels(target).tobytes(): i for i, target in enumerate(TARGETS)}
    order = [place[target.tobytes()] for target in found["target"]]
    assert sorted(order) == list(range(COUNT))
    for given, i in zip(found["input"], order, strict=True):
        # JPEG is decoded by another library here
        assert np.abs(given.astype(int) - pixels(INPUTS[i])).max() <= 3
    assert gatdist.verify(str(tmp_path / "packed"), decode=True, workers=1)["whole"]


def test_fields_are_cropped_and_resized_alike(tmp_path: Path) -> None:
    files = {f"a/{i}.png": image(i, (16, 24)) for i in range(4)}
    files |= {f"b/{i}.png": image(i, (16, 24)) for i in range(4)}
    fields = {"target": "a", "input": "b"}
    pack(write(tmp_path / "source", files), tmp_path / "packed", fields=fields, size=8)
    found, _ = read(tmp_path / "packed")
    assert found["target"].shape == (4, 8, 8, 3)
    assert np.array_equal(found["target"], found["input"])


def test_crops_need_images_of_one_aspect(tmp_path: Path) -> None:
    files = {f"a/{i}.png": image(i, (8, 16)) for i in range(4)}
    files |= {f"b/{i}.png": image(i, (8, 8) if i == 2 else (4, 8)) for i in range(4)}
    source, fields = write(tmp_path / "source", files), {"target": "a", "input": "b"}
    outcome = pack(source, tmp_path / "cropped", fields=fields, size=4)
    assert outcome["samples"] == 3
    assert "a/2.png" in outcome["skipped_examples"][0][0]
    assert pack(source, tmp_path / "a", fields=fields, size=4, transform="stretch")["samples"] == 4


def test_formats_that_differ_within_a_field_stay(tmp_path: Path) -> None:
    files = {
        f"a/{i}.{'jpg' if i % 2 else 'png'}": image(i, kind="JPEG" if i % 2 else "PNG")
        for i in range(6)
    }
    files |= {f"b/{i}.png": image(i) for i in range(6)}
    fields = {"target": "a", "input": "b"}
    pack(write(tmp_path / "source", files), tmp_path / "packed", fields=fields)
    manifest = read_manifest(Store(str(tmp_path / "packed")))
    assert manifest.component == "target.*"
    packed = {tuple(sample.values()) for sample in samples(tmp_path / "packed")}
    assert packed == {
        (files[f"a/{i}.{'jpg' if i % 2 else 'png'}"], files[f"b/{i}.png"]) for i in range(6)
    }
    assert len(read(tmp_path / "packed")[0]["target"]) == 6
    assert gatdist.verify(str(tmp_path / "packed"), decode=True, workers=1)["whole"]


def test_labels_are_those_of_the_generated_field(tmp_path: Path) -> None:
    files = {f"photos/{kind}/{i}.png": image(i) for kind in ("cat", "dog") for i in range(3)}
    files |= {f"edges/{kind}/{i}.png": image(i) for kind in ("cat", "dog") for i in range(3)}
    source = write(tmp_path / "source", files)
    outcome = pack(source, tmp_path / "packed", fields=FOLDERS)
    assert outcome["num_classes"] == 2
    _, labels = read(tmp_path / "packed")
    assert labels is not None
    assert np.bincount(labels).tolist() == [3, 3]
    assert pack(source, tmp_path / "none", fields=FOLDERS, labels="none")["num_classes"] == 0


def test_text_and_images_of_a_table(tmp_path: Path) -> None:
    source, _ = table(tmp_path / "source")
    rows = "photo,words\n" + "".join(f"photos/{i:03d}.png,w{i}\n" for i in range(COUNT))
    (tmp_path / "source/captions.csv").write_text(rows)
    fields = {"target": "photo", "text": "words"}
    pack(source.with_name("captions.csv"), tmp_path / "packed", fields=fields)
    found, _ = read(tmp_path / "packed")
    texts = {
        bytes(text).decode(): colors
        for text, colors in zip(found["text"], found["target"], strict=True)
    }
    for i in range(COUNT):
        assert np.array_equal(texts[f"w{i}"], pixels(TARGETS[i]))


def test_interrupted_and_several_processes_write_the_same(tmp_path: Path) -> None:
    source, fields = folders(tmp_path / "source")
    pack(source, tmp_path / "one", fields=fields)
    pack(source, tmp_path / "two", fields=fields, workers=2)
    wanted = content(tmp_path / "one")
    assert content(tmp_path / "two") == wanted
    (tmp_path / "two/manifest.json").unlink()
    (tmp_path / "two/shard-000000.tar").unlink()
    pack(source, tmp_path / "two", fields=fields)
    assert content(tmp_path / "two") == wanted
    with refused(DataError, str(tmp_path / "two")):
        pack(source, tmp_path / "two", fields={"target": "edges", "input": "photos"})


def test_files_without_partner_are_reported(tmp_path: Path) -> None:
    source, fields = folders(tmp_path / "source")
    (source / "edges/003.jpg").unlink()
    (source / "photos/007.png").unlink()
    (source / "photos/008.jpg").write_bytes(INPUTS[0])
    outcome = pack(source, tmp_path / "packed", fields=fields)
    assert outcome["samples"] == COUNT - 3
    report = (tmp_path / "packed/report.jsonl").read_text().splitlines()
    found = {json.loads(line)["source"]: json.loads(line)["reason"] for line in report}
    assert found.keys() == {"photos/003.png", "edges/007.jpg", "photos/008.jpg"}
    assert "input" in found["photos/003.png"]
    assert "target" in found["edges/007.jpg"]
    with pytest.raises(DataError) as caught:
        pack(source, tmp_path / "strict", fields=fields, strict=True)
    assert "photos/003.png" in str(caught.value)


def test_a_damaged_field_is_named(tmp_path: Path) -> None:
    source, fields = folders(tmp_path / "source")
    (source / "edges/003.jpg").write_bytes(b"no image")
    outcome = pack(source, tmp_path / "packed", fields=fields)
    ((name, reason),) = outcome["skipped_examples"]
    assert name == "photos/003.png"
    assert reason.startswith("its input ")


def test_audio_of_a_sample_must_be_equally_long(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def clip(length: int, rate: int = 8000) -> bytes:
        return encode_wav(rng.uniform(-1, 1, (1, length)).astype(np.float32), rate)

    files = {f"{kind}/{i}.wav": clip(400) for kind in ("clean", "noisy") for i in range(4)}
    files["noisy/2.wav"] = clip(300)
    source, fields = write(tmp_path / "source", files), {"wave": "clean", "noisy": "noisy"}
    outcome = pack(source, tmp_path / "packed", fields=fields)
    assert outcome["samples"] == 3
    assert outcome["skipped_examples"][0][0] == "clean/2.wav"
    write(source, {f"noisy/{i}.wav": clip(800, 16000) for i in range(4)})
    with refused(DataError, "--sample-rate"):
        pack(source, tmp_path / "rates", fields=fields)
    outcome = pack(source, tmp_path / "resampled", fields=fields, sample_rate=8000)
    assert (outcome["samples"], outcome["sample_shape"]) == (4, [1, 400])


REFUSED: Sequence[tuple[type[Exception], Mapping[str, str]]] = [
    (ConfigError, {"In-put": "edges", "target": "photos"}),
    (ConfigError, {"input": "", "target": "photos"}),
    (ConfigError, {"target": "photos"}),
    (ConfigError, {"input": "*/edges/*", "target": "photos"}),
    (DataError, {"input": "masks", "target": "photos"}),
    (DataError, {"input": "photos", "target": "photos"}),
    (DataError, {"input": "*1.jpg", "target": "photos"}),
]


@pytest.mark.parametrize(("kind", "fields"), REFUSED)
def test_fields_that_do_not_fit_are_refused(
    kind: type[Exception], fields: Mapping[str, str], tmp_path: Path
) -> None:
    source, _ = folders(tmp_path / "source")
    write(source, {"edges/x.jpg": INPUTS[0]})
    if fields.get("input") == "*1.jpg":
        (source / "photos/001.png").unlink()
    with refused(kind, "--field"):
        pack(source, tmp_path / "packed", fields=fields)
    assert not (tmp_path / "packed/manifest.json").exists()


@pytest.mark.parametrize("column", ["edges", "target"])
def test_a_table_reaches_only_allowed_folders(column: str, tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", {"0.png": image(0)}) / "0.png"
    source, fields = table(tmp_path / "source")
    row = {"edges": "edges/000.jpg", "target": "photos/000.png"} | {column: str(secret)}
    (source.parent / "hostile.csv").write_text(f"edges,target\n{row['edges']},{row['target']}\n")
    with pytest.raises(DataError) as caught:
        pack(source.with_name("hostile.csv"), tmp_path / "packed", fields=fields)
    assert "--allow-origin" in str(caught.value)


def test_columns_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    source, _ = table(tmp_path / "source")
    with refused(DataError, "--field"):
        pack(source, tmp_path / "packed", fields={"input": "edge", "target": "target"})


@pytest.mark.parametrize(
    ("where", "name", "key"),
    [
        ("photos", "photos/cats/a.b.png", "cats/a.b"),
        ("./photos/", "photos/1.png", "1"),
        ("photos", "photos2/1.png", ""),
        ("*_in", "a/1_in.png", "a/1"),
        ("*_in.png", "1_in.jpg", ""),
        ("*_in.*", "1_in.jpg", "1"),
        ("*_in", "_in.png", ""),
        ("x_*", "x_1.png", "1"),
        (".", "1.png", "1"),
    ],
)
def test_patterns_find_keys(where: str, name: str, key: str) -> None:
    assert Pattern.of(where).key(name) == key


INDEX = {"input": "in.*", "target": "png"}


def test_shards_with_several_files_are_indexed(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    outcome = gatdist.index(str(tmp_path / "shards"), fields=INDEX, workers=1)
    assert (outcome["samples"], outcome["skipped"]) == (COUNT, 0)
    found, _ = read(tmp_path / "shards")
    for i in range(COUNT):
        assert np.array_equal(found["target"][i], pixels(TARGETS[i]))
        assert np.abs(found["input"][i].astype(int) - pixels(INPUTS[i])).max() <= 3
    assert gatdist.verify(str(tmp_path / "shards"), decode=True, workers=1)["whole"]


def test_shards_are_indexed_in_the_other_direction(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    fields = {"input": "png", "target": "in.jpg"}
    gatdist.index(str(tmp_path / "shards"), str(tmp_path / "index"), fields=fields, workers=1)
    found, _ = read(tmp_path / "index")
    assert np.array_equal(found["input"][0], pixels(TARGETS[0]))
    assert found["target"].shape == (COUNT, 3, 4, 3)


def test_samples_that_lack_a_field_are_reported(tmp_path: Path) -> None:
    shards(tmp_path / "shards")
    with tarfile.open(tmp_path / "shards/0.tar", "a") as tar:
        for name, data in (("x.png", TARGETS[0]), ("y.png", TARGETS[0]), ("y.in.png", b"none")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    outcome = gatdist.index(str(tmp_path / "shards"), fields=INDEX, workers=1)
    assert outcome["samples"] == COUNT
    (lacking, damaged) = outcome["skipped_examples"]
    assert lacking[0] == "0.tar/x"
    assert "input" in lacking[1]
    assert damaged[0] == "0.tar/y"
    assert damaged[1].startswith("its input ")
    with pytest.raises(DataError) as caught:
        gatdist.index(
            str(tmp_path / "shards"), str(tmp_path / "strict"), fields=INDEX, strict=True, workers=1
        )
    assert "0.tar/x" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "subject", "options"),
    [
        (ConfigError, "--field", {"fields": {"target": "png"}}),
        (ConfigError, "--field", {"fields": {"target": "png", "input": "in.exe"}}),
        (DataError, "shards", {"fields": {"target": "png", "input": "mask.png"}}),
        (ConfigError, "--extension", {"fields": INDEX, "extension": "png"}),
    ],
)
def test_fields_of_shards_that_do_not_fit_are_refused(
    kind: type[Exception], subject: str, options: dict[str, Any], tmp_path: Path
) -> None:
    shards(tmp_path / "shards")
    with refused(kind, subject):
        gatdist.index(str(tmp_path / "shards"), workers=1, **options)


def test_audio_of_shards_must_have_one_rate(tmp_path: Path) -> None:
    clip = np.zeros((1, 80), np.float32)
    with tarfile.open(write(tmp_path, {}) / "0.tar", "w") as tar:
        for name, rate in (("0.wave.wav", 8000), ("0.noisy.wav", 16000)):
            data = encode_wav(clip, rate)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with refused(DataError, "--field"):
        gatdist.index(str(tmp_path), fields={"wave": "wave.wav", "noisy": "noisy.wav"}, workers=1)


def test_shards_are_recognized_by_the_fields(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:  # images only, as in other tars
        for i in range(3):
            for name in ("photo.png", "edges.png"):
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(TARGETS[i])
                tar.addfile(info, io.BytesIO(TARGETS[i]))
    fields = {"target": "photo.png", "input": "edges.*"}
    assert pack(tmp_path / "0.tar", tmp_path / "packed", fields=fields)["kind"] == "webdataset"


@pytest.mark.parametrize("sizes", [[(8, 8)] * 3, [(8, 8), (8, 12), (8, 8)]])
def test_images_of_shards_differ_in_aspect_only_if_none_is_cropped(
    sizes: list[tuple[int, int]], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, size in enumerate(sizes):
            for name, data in (("photo.png", image(i, size)), ("edges.png", image(i, (4, 6)))):
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    fields = {"target": "photo.png", "input": "edges.png"}
    if len(set(sizes)) > 1:
        with refused(DataError, "--field"):
            gatdist.index(str(tmp_path), fields=fields, workers=1)
        return
    gatdist.index(str(tmp_path), fields=fields, workers=1)
    assert read(tmp_path)[0]["input"].shape == (3, 4, 6, 3)
    with refused(DataError, "data.resolution"):
        read(tmp_path, resolution=4)

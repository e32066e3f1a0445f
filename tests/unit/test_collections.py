"""Photo collections and their other files: NAS, camera, phone, Windows, macOS; unusual tars."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import gatdist
from gatdist.common.errors import DataError
from gatdist.storage import Store
from packing import image, pack, samples, write
from support import refused

JPEGS = [image(i, kind="JPEG") for i in range(6)]
PHOTOS = {f"{'cats' if i % 2 else 'dogs'}/IMG_{i}.jpg": data for i, data in enumerate(JPEGS)}
# System files of each kind of collection, all of which are skipped with a reason.
SYSTEM: dict[str, dict[str, bytes]] = {
    "Synology": {
        "@eaDir/SYNO_INDEX": b"",
        "cats/@eaDir/IMG_1.jpg/SYNOPHOTO_THUMB_M.jpg": JPEGS[0],
        "#recycle/old.jpg": JPEGS[1],
    },
    "QNAP": {"@Recycle/x.jpg": JPEGS[0], "dogs/.@__thumb/IMG_0.jpg": JPEGS[0]},
    "Linux": {"lost+found/#123.jpg": JPEGS[0], ".Trash-1000/files/x.jpg": JPEGS[1]},
    "Windows": {
        "Thumbs.db": b"x",
        "cats/desktop.ini": b"x",
        "$RECYCLE.BIN/S-1-5/x.jpg": JPEGS[0],
        "System Volume Information/IndexerVolumeGuid": b"x",
    },
    "macOS": {
        ".DS_Store": b"x",
        "cats/._IMG_1.jpg": b"x",
        "__MACOSX/cats/._IMG_1.jpg": b"x",
        ".Spotlight-V100/x.jpg": JPEGS[0],
    },
    "phone": {".thumbnails/1.jpg": JPEGS[0], "cats/.nomedia": b"", ".trashed-1-x.jpg": JPEGS[1]},
    "tools": {
        ".picasa.ini": b"x",
        ".git/objects/ab": b"x",
        "dogs/.ipynb_checkpoints/IMG_0-checkpoint.jpg": JPEGS[0],
    },
}
# Files of the user's own programs, which are no samples.
OTHERS = {
    "cats/IMG_1.AAE": b"<plist/>",
    "dogs/IMG_0.xmp": b"<x/>",
    "cats/MVI_3.THM": b"x",
    "dogs/clip.mov": b"x",
    "notes.txt": b"hello",
}
BROKEN = {"cats/empty.jpg": b"", "dogs/half.jpg": JPEGS[0][:200]}


def report(folder: Path) -> dict[str, str]:
    lines = (folder / "report.jsonl").read_text().splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


def source(path: Path, kind: str, files: dict[str, bytes]) -> str:
    if kind == "folder":
        return str(write(path / "in", files))
    if kind == "memory":
        store = Store(f"memory://{path.name}/in")
        for name, content in files.items():
            store.publish(name, content)
        return store.url
    if kind == "zip":
        with zipfile.ZipFile(path / "in.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path / "in.tar", "w") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path / f"in.{kind}")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "memory"])
@pytest.mark.parametrize("system", SYSTEM)
def test_system_files_of_a_collection_are_skipped_with_a_reason(
    tmp_path: Path, kind: str, system: str
) -> None:
    url = source(tmp_path, kind, PHOTOS | SYSTEM[system])
    outcome = gatdist.pack(url, str(tmp_path / "out"), workers=1, strict=True)
    assert (outcome["samples"], outcome["num_classes"], outcome["skipped"]) == (6, 2, 0)
    assert outcome["ignored"] == len(SYSTEM[system])
    found = {name.removeprefix("./") for name in report(tmp_path / "out")}
    assert found == SYSTEM[system].keys()
    assert sorted(s["jpg"] for s in samples(tmp_path / "out")) == sorted(JPEGS)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_other_and_broken_files_of_a_collection_are_skipped_with_a_reason(
    tmp_path: Path, kind: str
) -> None:
    url = source(tmp_path, kind, PHOTOS | OTHERS | BROKEN)
    outcome = gatdist.pack(url, str(tmp_path / "out"), workers=1)
    assert (outcome["samples"], outcome["num_classes"]) == (6, 2)
    found = {name.removeprefix("./") for name in report(tmp_path / "out")}
    assert found == OTHERS.keys() | BROKEN.keys()


def test_system_files_in_shards_are_skipped_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    files: dict[str, bytes] = {}
    for i, data in enumerate(JPEGS):
        files |= {f"{i}.jpg": data, f"{i}.cls": b"%d" % (i % 2), f"._{i}.jpg": b"x"}
    source(tmp_path / "data", "tar", files)
    outcome = gatdist.index(str(tmp_path / "data"), workers=1, strict=True)
    assert (outcome["samples"], outcome["ignored"]) == (6, 6)
    assert gatdist.verify(str(tmp_path / "data"), decode=True, workers=1)["whole"]


def test_broken_links_and_loops_in_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", PHOTOS)
    (folder / "cats" / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "cats" / "loop").symlink_to("..")
    (folder / "cats" / "self.jpg").symlink_to("self.jpg")
    os.link(folder / "cats" / "IMG_1.jpg", folder / "cats" / "IMG_1.JPG")
    outcome = pack(folder, tmp_path / "out")
    assert (outcome["samples"], outcome["num_classes"], outcome["skipped"]) == (7, 2, 2)
    assert report(tmp_path / "out").keys() == {"cats/gone.jpg", "cats/self.jpg"}


# Tars of other writers


def tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


CLS = [(f"{i}.cls", b"%d" % (i % 2)) for i in range(6)]
IMAGES = [(f"{i}.jpg", data) for i, data in enumerate(JPEGS)]


def test_tar_whose_labels_all_come_first_can_be_packed_only(tmp_path: Path) -> None:
    path = tar(tmp_path / "data" / "a.tar", CLS + IMAGES)
    with refused(DataError, "data"):
        gatdist.index(str(tmp_path / "data"), workers=1)
    outcome = pack(path, tmp_path / "out")  # which reads in any order
    assert (outcome["kind"], outcome["samples"]) == ("webdataset", 6)
    assert (outcome["num_classes"], outcome["skipped"]) == (2, 0)


def test_tar_of_many_samples_whose_labels_come_first_is_not_indexed(tmp_path: Path) -> None:
    many = range(200)
    files = [(f"{i}.cls", b"1") for i in many] + [(f"{i}.jpg", JPEGS[i % 6]) for i in many]
    tar(tmp_path / "data" / "a.tar", files)
    with refused(DataError, "data"):
        gatdist.index(str(tmp_path / "data"), workers=1)


@pytest.mark.parametrize("run", ["index", "pack"])
def test_tars_inside_a_tar_are_rejected(tmp_path: Path, run: str) -> None:
    inner = tar(tmp_path / "inner.tar", IMAGES).read_bytes()
    path = tar(tmp_path / "data" / "a.tar", [(f"{i}.tar", inner) for i in range(2)])
    runs = {
        "pack": lambda: pack(path, tmp_path / "out"),
        "index": lambda: gatdist.index(str(tmp_path / "data"), workers=1),
    }
    with refused(DataError, {"pack": "a.tar", "index": "data"}[run]) as caught:
        runs[run]()
    assert " .tar" in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_link_in_a_tar_is_named(tmp_path: Path, kind: bytes) -> None:
    path = tar(tmp_path / "data" / "a.tar", IMAGES)
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("link.jpg")
        info.type, info.linkname = kind, "0.jpg"
        archive.addfile(info)
    with refused(DataError, "a.tar/link.jpg"):
        gatdist.index(str(tmp_path / "data"), workers=1, strict=True)
    with refused(DataError, "link.jpg"):
        pack(path, tmp_path / "out", strict=True)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_with_dots_in_folders_long_names_and_upper_case(tmp_path: Path, form: int) -> None:
    folder = "v1.0/" + "long" * 40
    files: list[tuple[str, Any]] = []
    for i, data in enumerate(JPEGS):
        key = f"{folder}/IMG_{i}"
        files += [(f"{key}.JPG", data), (f"{key}.jpg.json", b"{}"), (f"{key}.CLS", b"%d" % (i % 2))]
    path = tar(tmp_path / "data" / "a.tar", files, form)
    outcome = gatdist.index(str(tmp_path / "data"), workers=1, strict=True)
    assert (outcome["samples"], outcome["num_classes"]) == (6, 2)
    packed = pack(path, tmp_path / "out")
    assert (packed["kind"], packed["samples"], packed["num_classes"]) == ("webdataset", 6, 2)


def test_plain_tar_of_images_with_dots_in_their_names_is_no_webdataset(tmp_path: Path) -> None:
    files = [(f"{'cats' if i % 2 else 'dogs'}/a.b.{i}.jpg", data) for i, data in enumerate(JPEGS)]
    outcome = pack(tar(tmp_path / "a.tar", files), tmp_path / "out")
    assert (outcome["kind"], outcome["samples"], outcome["num_classes"]) == ("tar", 6, 2)

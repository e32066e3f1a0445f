"""Sources of packing: every kind gives the same samples, and each error is reported by name."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from decimal import Decimal
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import gatdist
from gatdist.cli import main
from gatdist.common.errors import DataError, InterruptedRunError, UserError
from gatdist.config import DataConfig
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import open_dataset
from gatdist.monitor.packing import packed
from gatdist.packing import task as tasks
from gatdist.packing.labels import folder_classes
from gatdist.storage import Store
from packing import content, image, pack, samples, write
from support import refused

IMAGES = [image(i) for i in range(12)]
CLASSES = ["ant", "bee", "cow"]
# The expected samples of every source below: each image with its class.
EXPECTED = sorted((data, str(i % 3).encode()) for i, data in enumerate(IMAGES))

Writer = Callable[[Path], Path]


def tree() -> dict[str, bytes]:
    return {f"{CLASSES[i % 3]}/{i}.png": data for i, data in enumerate(IMAGES)}


def folder(path: Path) -> Path:
    return write(path / "in", tree())


def zipped(path: Path, method: int = zipfile.ZIP_DEFLATED, prefix: str = "") -> Path:
    with zipfile.ZipFile(path / "in.zip", "w", method) as archive:
        archive.mkdir("ant")
        for name, data in tree().items():
            archive.writestr(prefix + name, data)
    return path / "in.zip"


def stylegan(path: Path) -> Path:
    """Numbered folders and a list of labels, as ``dataset_tool.py`` writes them."""
    labels = []
    with zipfile.ZipFile(path / "in.zip", "w", zipfile.ZIP_STORED) as archive:
        for i, data in enumerate(IMAGES):
            labels.append([f"{i // 5:05d}/img{i:08d}.png", i % 3])
            archive.writestr(labels[-1][0], data)
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path / "in.zip"


def tarred(path: Path, name: str = "in.tar", mode: str = "w") -> Path:
    with tarfile.open(path / name, mode) as archive:
        archive.add(folder(path), arcname=".")
    return path / name


def listed(path: Path, extension: str) -> Path:
    rows = [
        {"file": f"in/{name}", "label": name.partition("/")[0], "size": "12"} for name in tree()
    ]
    folder(path)
    target = path / f"list.{extension}"
    if extension == "json":
        target.write_text(json.dumps(rows))
    elif extension == "jsonl":
        target.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    else:
        with target.open("w", newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if extension == "tsv" else ","
            table = csv.DictWriter(file, ["size", "label", "file"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    return target


def parquet(path: Path) -> Path:
    """Two files with bytes, and names as labels."""
    for part in range(2):
        numbers = range(part, 12, 2)
        table = {
            "image": [IMAGES[i] for i in numbers],
            "label": [CLASSES[i % 3] for i in numbers],
        }
        (path / "in").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(table), path / "in" / f"{part}.parquet")
    return path / "in"


def huggingface(path: Path) -> Path:
    """Images and classes as the library ``datasets`` writes them."""
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    table = pyarrow.table(
        {
            "image": [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(IMAGES)],
            "label": [i % 3 for i in range(12)],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path / "in.parquet", row_group_size=5)
    return path / "in.parquet"


def shards(path: Path, labels: bool = True, mode: str = "w") -> Path:
    """Shards as ``webdataset`` writes them, with ``.json`` next to each image."""
    (path / "in").mkdir()
    suffix = ".gz" if mode == "w:gz" else ""
    for part in range(2):
        with tarfile.open(path / "in" / f"{part}.tar{suffix}", mode) as archive:
            for i in range(part, 12, 2):
                label = {"cls": str(i % 3).encode()} if labels else {}
                files = {"png": IMAGES[i], "json": json.dumps({"kind": i % 3}).encode()} | label
                for component, data in files.items():
                    info = tarfile.TarInfo(f"x/{i:04d}.{component}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return path / "in"


KINDS: dict[str, tuple[Writer, dict[str, str], str]] = {
    "folder": (folder, {}, "folder"),
    "zip": (zipped, {}, "zip"),
    "zip, stored": (partial(zipped, method=zipfile.ZIP_STORED), {}, "zip"),
    "zip with a top-level folder": (partial(zipped, prefix="train/"), {}, "zip"),
    "zip of the StyleGAN tools": (stylegan, {}, "zip"),
    "tar": (tarred, {}, "tar"),
    "tar.gz": (partial(tarred, name="in.tar.gz", mode="w:gz"), {}, "tar"),
    "tgz": (partial(tarred, name="in.tgz", mode="w:gz"), {}, "tar"),
    "tar.xz": (partial(tarred, name="in.tar.xz", mode="w:xz"), {}, "tar"),
    **{name: (partial(listed, extension=name), {}, "csv") for name in ("csv", "tsv")},
    **{name: (partial(listed, extension=name), {}, "jsonl") for name in ("json", "jsonl")},
    "parquet": (parquet, {}, "parquet"),
    "parquet of Hugging Face": (huggingface, {}, "parquet"),
    "webdataset": (shards, {}, "webdataset"),
    "webdataset, a field": (partial(shards, labels=False), {"labels": "kind"}, "webdataset"),
    "webdataset, compressed": (partial(shards, mode="w:gz"), {}, "webdataset"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_source_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    writer, options, kind = KINDS[name]
    source = writer(tmp_path)
    outcome = pack(source, tmp_path / "out", **options)
    assert outcome["kind"] == kind
    assert outcome["num_classes"] == 3
    found = samples(tmp_path / "out")
    assert sorted((sample["png"], sample["cls"]) for sample in found) == EXPECTED
    assert outcome["skipped"] == 0
    assert not (tmp_path / "out" / "packing" / "spool").exists()
    if kind == "webdataset":  # other files of a sample are kept
        assert all(json.loads(s["json"])["kind"] == int(s["cls"]) for s in found)


@pytest.mark.parametrize("name", ["folder", "zip", "tar.gz", "csv", "parquet", "webdataset"])
def test_sources_on_other_storage_give_the_same_samples(name: str, tmp_path: Path) -> None:
    writer, options, kind = KINDS[name]
    source = writer(tmp_path)
    away = Store(f"memory://{uuid4()}")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            away.publish(str(path.relative_to(tmp_path)), path.read_bytes())
    url = f"{away.url}/{source.relative_to(tmp_path)}"
    outcome = gatdist.pack(url, f"{away.url}/out", workers=1, **options)
    assert outcome["kind"] == kind
    assert outcome["samples"] == 12
    for shard in away.find("out"):
        write(tmp_path / "out", {shard.removeprefix("out/"): away.read(shard)})
    found = samples(tmp_path / "out")
    assert sorted((sample["png"], sample["cls"]) for sample in found) == EXPECTED


# Labels


@pytest.mark.parametrize(
    ("names", "classes", "strays"),
    [
        (["a/1", "b/x/2"], ["a", "b"], []),
        (["all/train/a/1", "all/train/b/2"], ["a", "b"], []),
        (["all/1", "all/2"], [None, None], []),
        (["1", "a/2"], [None, None], []),
        ([], [], []),
        (["cover", "a/1", "b/2"], [None, "a", "b"], [0]),
        (["x/cover", "x/a/1", "x/b/2"], [None, "a", "b"], [0]),
        (["cover", "x/a/1", "x/b/2"], [None, "a", "b"], [0]),
    ],
)
def test_class_is_the_first_folder_that_differs(
    names: list[str], classes: list[str | None], strays: list[int]
) -> None:
    assert folder_classes(names) == (classes, strays)


def test_many_stray_files_next_to_class_folders_are_ambiguous() -> None:
    names = [*(f"{i}" for i in range(5)), "a/1", "b/2"]
    with refused(DataError, "--labels"):
        folder_classes(names)
    assert folder_classes(names, requested=True) == ([None] * 5 + ["a", "b"], list(range(5)))
    assert folder_classes(["cover", "a/1"], requested=True) == ([None, "a"], [0])
    with refused(DataError, "--labels"):
        folder_classes(["1", "2"], requested=True)


def test_numbered_folders_are_classes_in_numeric_order(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {f"{n}/x.png": IMAGES[n % 12] for n in (10, 9, 100)})
    assert pack(source, tmp_path / "out")["num_classes"] == 3
    found = {sample["png"]: sample["cls"] for sample in samples(tmp_path / "out")}
    assert found == {IMAGES[9]: b"0", IMAGES[10]: b"1", IMAGES[4]: b"2"}


def flat(path: Path) -> Path:
    return write(path / "in", {f"{i}.png": data for i, data in enumerate(IMAGES)})


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_labels_are_read_from_a_list(tmp_path: Path, where: str) -> None:
    source = flat(tmp_path)
    labels = (source if where == "inside" else tmp_path) / "labels.csv"
    rows = [f"{i}.png,{CLASSES[i % 3]}" for i in range(12)]
    labels.write_text("\n".join(["file,label", *rows, "77.png,dog"]))
    outcome = pack(source, tmp_path / "out", labels=str(labels))
    assert (outcome["num_classes"], outcome["skipped"]) == (3, 0)
    found = samples(tmp_path / "out")
    assert sorted((sample["png"], sample["cls"]) for sample in found) == EXPECTED


def test_files_missing_in_a_list_are_skipped_and_reported(tmp_path: Path) -> None:
    source = flat(tmp_path)
    (tmp_path / "labels.json").write_text(
        json.dumps(
            [{"file": f"{i}.png", "label": i % 3} for i in range(7)]
            + [{"file": "z.png", "label": 1}]
        )
    )
    dry = pack(source, tmp_path / "out", labels=str(tmp_path / "labels.json"), dry_run=True)
    (note,) = dry["notes"]
    for fact in (f"{tmp_path}/labels.json", " 1 ", "z.png"):
        assert fact in note
    outcome = pack(source, tmp_path / "out", labels=str(tmp_path / "labels.json"))
    assert (outcome["samples"], outcome["skipped"]) == (7, 5)
    assert outcome["skipped_examples"][0][0] == "10.png"


def test_classes_without_packed_samples_are_counted_and_keep_their_numbers(
    tmp_path: Path,
) -> None:
    files = {"ant/1.png": IMAGES[1], "cat/1.png": b"no image", "dog/1.png": IMAGES[2]}
    outcome = pack(write(tmp_path / "in", files), tmp_path / "out")
    assert (outcome["empty_classes"], outcome["empty_class_examples"]) == (1, ["cat"])
    assert outcome["num_classes"] == 3
    assert sorted(sample["cls"] for sample in samples(tmp_path / "out")) == [b"0", b"2"]
    warnings = [fields["message"] for kind, fields in packed(outcome) if kind == "warning"]
    assert any("cat" in message for message in warnings)


def test_labels_can_be_ignored(tmp_path: Path) -> None:
    assert pack(folder(tmp_path), tmp_path / "out", labels="none")["num_classes"] == 0
    assert all(sample.keys() == {"png"} for sample in samples(tmp_path / "out"))


@pytest.mark.parametrize("label", [1e7, -2, [1, 0], {"a": 1}, 0.5, "1,5", "9" * 5000])
def test_invalid_labels_are_skipped_with_the_reason(tmp_path: Path, label: Any) -> None:
    flat(tmp_path)
    rows = [{"file": f"in/{i}.png", "label": value} for i, value in enumerate([label, 0, 1])]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    outcome = pack(tmp_path / "list.json", tmp_path / "out")
    assert (outcome["samples"], outcome["num_classes"]) == (2, 2)
    assert list(report(tmp_path / "out")) == ["in/0.png"]
    (tmp_path / "list.json").write_text(json.dumps(rows[:1]))
    with refused(DataError, "label"):
        pack(tmp_path / "list.json", tmp_path / "none")


# Text and arrays


def test_lists_of_texts_and_captions(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "list.jsonl").write_text(
        '{"path": "in/0.png", "caption": "an ant"}\n{"path": "./in/1.png", "caption": null}\n'
    )
    pack(tmp_path / "list.jsonl", tmp_path / "out")
    found = {sample["png"]: sample.get("txt") for sample in samples(tmp_path / "out")}
    assert found == {IMAGES[0]: b"an ant", IMAGES[1]: None}


# Skipped files


def report(folder: Path) -> dict[str, str]:
    lines = (folder / "report.jsonl").read_text().splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


def test_files_that_are_no_samples_are_reported_with_the_reason(tmp_path: Path) -> None:
    jpeg = image(1, kind="JPEG")
    bad = {
        "empty.png": b"",
        "text.jpg": b"no image",
        "torn.png": IMAGES[0][:-30],
        "torn.jpg": jpeg[: len(jpeg) // 2],
        "other.png": image(3, (6, 7)),
        "movie.mp4": b"x",
    }
    hidden = {".DS_Store": b"x", "__MACOSX/._1.png": b"x", "Thumbs.db": b"x"}
    outcome = pack(write(flat(tmp_path), bad | hidden), tmp_path / "out")
    assert (outcome["samples"], outcome["skipped"]) == (12, len(bad))
    message = report(tmp_path / "out")
    assert message.keys() == bad.keys() | hidden.keys()
    assert outcome["ignored"] == len(hidden)
    assert ".mp4" in message["movie.mp4"]
    assert "6 × 7" in message["other.png"]


def test_strict_raises_an_error_that_names_all_skipped_files(tmp_path: Path) -> None:
    source = write(flat(tmp_path), {"torn.png": IMAGES[0][:-30]})
    with refused(DataError, "torn.png"):
        pack(source, tmp_path / "out", strict=True)
    assert pack(source, tmp_path / "out")["skipped"] == 1
    with refused(DataError, "torn.png"):  # found in the record
        pack(source, tmp_path / "out", strict=True)
    write(source, {"notes.md": b""})
    with refused(DataError, "notes.md"):
        pack(source, tmp_path / "other", strict=True)


def test_duplicates_are_packed_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("a.png", IMAGES[0])
        with pytest.warns(UserWarning, match=r"a\.png"):
            archive.writestr("a.png", IMAGES[1])
    pack(tmp_path / "in.zip", tmp_path / "zip")
    assert samples(tmp_path / "zip") == [{"png": IMAGES[0]}]
    assert list(report(tmp_path / "zip")) == ["a.png"]
    flat(tmp_path)
    (tmp_path / "list.csv").write_text("file\nin/0.png\nin/1.png\nin/0.png\n")
    assert pack(tmp_path / "list.csv", tmp_path / "csv")["samples"] == 2
    assert list(report(tmp_path / "csv")) == ["in/0.png"]


def test_damaged_or_unsupported_members_of_a_zip_are_skipped(tmp_path: Path) -> None:
    source = zipped(tmp_path)
    raw = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        first, second, third = archive.infolist()[1:4]
        raw[first.header_offset + 60] ^= 0xFF  # a bit of the content
        raw[second.header_offset] = 0  # its header
        start = raw.index(b"PK\x01\x02", third.header_offset + third.compress_size)
        entry = raw.index(third.filename.encode(), start) - 46
        raw[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")  # expands to 2 GiB
    source.write_bytes(raw)
    outcome = pack(source, tmp_path / "out")
    assert outcome["samples"] == 9
    message = report(tmp_path / "out")
    assert message.keys() == {first.filename, second.filename, third.filename}
    assert "2147483648" in message[third.filename]
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", IMAGES[0])
        archive.writestr("b.png", IMAGES[1], zipfile.ZIP_STORED)
    pack(tmp_path / "b.zip", tmp_path / "bz")
    assert list(report(tmp_path / "bz")) == ["a.png"]


def test_file_deleted_after_listing_is_skipped(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "list.csv").write_text("file\nin/0.png\nin/none.png\n")
    assert pack(tmp_path / "list.csv", tmp_path / "out")["samples"] == 1
    assert list(report(tmp_path / "out")) == ["in/none.png"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_list_of_urls_some_of_which_are_dead(tmp_path: Path) -> None:
    flat(tmp_path)
    with served(tmp_path) as url:
        rows = [f"{url}/in/{i}.png?x=1" for i in range(3)] + [f"{url}/in/gone.png"]
        (tmp_path / "list.csv").write_text("\n".join(["url", *rows]))
        outcome = pack(tmp_path / "list.csv", tmp_path / "out", allowed_origins=[url])
    assert outcome["samples"] == 3
    assert sorted(s["png"] for s in samples(tmp_path / "out")) == sorted(IMAGES[:3])
    (name,) = report(tmp_path / "out")
    assert name.endswith("/in/gone.png")


# Rejected sources


def refusal(path: Path, given: Writer | str, **options: Any) -> tuple[str, str]:
    """Return the error's subject and message, in which ``path`` is replaced by IN."""
    source = path / given if isinstance(given, str) else given(path)
    with pytest.raises(UserError) as error:
        pack(source, path / "out", **options)
    assert error.value.exit_status == 2
    assert not list((path / "out").glob("*.tar"))
    return error.value.subject.replace(str(path), "IN"), str(error.value).replace(str(path), "IN")


def file(name: str, data: bytes) -> Writer:
    return lambda path: write(path, {name: data}) / name


def zipped_names(*names: str) -> Writer:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file("a.zip", content.getvalue())


# Source, options, the error's subject, and part of the message.
REFUSED: dict[str, tuple[Writer | str, dict[str, Any], str, str]] = {
    "a missing source": ("nothing", {}, "IN/nothing", ""),
    "an empty folder": (lambda path: (path / "e").mkdir() or path / "e", {}, "IN/e", ""),
    "no file of a known kind": (
        lambda path: write(path / "in", {"a.mp4": b"", "b.md": b""}),
        {},
        "IN/in",
        "1 × .mp4, 1 × .md",
    ),
    "an empty zip": (zipped_names(), {}, "IN/a.zip", ""),
    "a zip of system files": (
        zipped_names("__MACOSX/._0.png"),
        {},
        "IN/a.zip",
        "__MACOSX/._0.png",
    ),
    "a file of unknown format": (file("a.mp4", b"x"), {}, "a.mp4", ""),
    "an unknown kind": (folder, {"kind": "zap"}, "--kind", "'zip'"),
    "another kind": (folder, {"kind": "parquet"}, "IN/in", "--kind parquet"),
    "no usable file": (
        lambda path: write(path / "in", {"a.png": b"x", "b.png": b"y"}),
        {},
        "IN/in",
        "2 samples",
    ),
    "many sizes": (
        lambda path: write(path / "in", {f"{i}.png": image(i, (i + 1, 5)) for i in range(3)}),
        {},
        "--size",
        "3",
    ),
    "no zip": (file("a.zip", b"PK no zip"), {}, "IN/a.zip", ""),
    "no tar": (file("a.tar", b"no tar" * 200), {}, "IN/a.tar", ""),
    "a compressed tar named .tar": (partial(tarred, mode="w:gz"), {}, "IN/in.tar", ".tar.gz"),
    "no gzip": (file("a.tar.gz", b"no gzip"), {}, "IN/a.tar.gz", ""),
    "no Parquet": (file("a.parquet", b"no parquet"), {}, "IN/a.parquet", ""),
    "an empty list": (file("a.csv", b""), {}, "IN/a.csv", ""),
    "a binary list": (file("a.csv", b"file\n\x81\n"), {}, "IN/a.csv", "UTF-8"),
    "a line of invalid JSON": (
        file("a.jsonl", b'{"file": "x"}\n{"file"\n'),
        {},
        "IN/a.jsonl:2",
        "JSON",
    ),
    "a line without an object": (file("a.jsonl", b"3\n"), {}, "IN/a.jsonl:1", "= 3"),
    "a list of lists": (file("a.json", b"[[1]]"), {}, "IN/a.json", ""),
    "no column for files": (file("a.csv", b"x,y\n1,2\n"), {}, "IN/a.csv", "x, y"),
    "no such column": (
        partial(listed, extension="csv"),
        {"column": "fiel"},
        "--column",
        "size, label, file",
    ),
    "no such column of labels": (
        partial(listed, extension="csv"),
        {"labels": "kind"},
        "--labels",
        "IN/list.csv",
    ),
    "labels of something else": (folder, {"labels": "kind"}, "--labels", "'kind'"),
    "a missing list of labels": (
        folder,
        {"labels": "/none/labels.csv"},
        "/none/labels.csv",
        "",
    ),
    "a list of other files": (
        lambda path: write(path, {"l.csv": b"file,label\nx.png,1\n"}) and folder(path),
        {"labels": "l.csv"},
        "IN/l.csv",
        "'ant/0.png'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_sources_are_rejected(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, options, subject, fact = REFUSED[name]
    found, message = refusal(tmp_path, given, **options)
    assert found == subject
    assert fact in message


def test_truncated_archive_is_rejected(tmp_path: Path) -> None:
    source = tarred(tmp_path)
    whole = source.read_bytes()
    for end in (len(whole) // 2, 1000, 512):
        source.write_bytes(whole[:end])
        assert refusal(tmp_path, "in.tar")[0] == "IN/in.tar"
    packed = tarred(tmp_path, "in.tar.gz", "w:gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    assert refusal(tmp_path, "in.tar.gz")[0] == "IN/in.tar.gz"


def test_source_and_destination_must_not_be_nested(tmp_path: Path) -> None:
    source = folder(tmp_path)
    for dest in (source, source / "x", tmp_path / "link"):
        if dest.name == "link":
            dest.symlink_to(source)
        with refused(DataError, "DEST"):
            pack(source, dest)
    with refused(DataError, "SOURCE"):
        pack(source, tmp_path)
    pack(zipped(tmp_path), tmp_path / "out")  # next to a file is allowed


def test_destination_that_contains_something_else_is_unchanged(tmp_path: Path) -> None:
    source = folder(tmp_path)
    write(tmp_path / "mine", {"precious.txt": b"x"})
    with refused(DataError, "mine"):
        pack(source, tmp_path / "mine")
    pack(source, tmp_path / "out")
    before = content(tmp_path / "out")
    with refused(DataError, "out"):
        pack(source, tmp_path / "out", size=4)
    write(source, {"ant/new.png": IMAGES[0]})
    with refused(DataError, "out"):
        pack(source, tmp_path / "out")
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "packing" / "plan.json").unlink()
    with refused(DataError, "out"):
        pack(source, tmp_path / "out")


def test_packing_succeeds_after_a_mistake_is_fixed(tmp_path: Path) -> None:
    files = {f"{i}.png": image(i, (i + 1, 5)) for i in range(3)}
    source = write(tmp_path / "in", files)
    with refused(DataError, "--size"):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert pack(source, tmp_path / "out", size=3)["samples"] == 3


def test_a_refusal_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "in", {f"ant/{i}-high.png": image(i, (i + 1, 5)) for i in range(12)})
    source, out = tarred(tmp_path, "in.tar.gz", "w:gz"), tmp_path / "out"  # needs the spool
    with refused(DataError, "--size"):
        pack(source, out)
    assert not out.exists()
    out.mkdir()
    with refused(DataError, "--size"):
        pack(source, out)
    assert not list(out.iterdir())

    killed = mock.patch.object(tasks, "write_shard", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(InterruptedRunError):
        pack(source, out, size=4)
    before = content(out)
    assert len(before) > 1
    with refused(DataError, "out"):
        pack(source, out, size=3)
    assert content(out) == before
    assert pack(source, out, size=4)["samples"] == 24
    before = content(out)
    write(tmp_path / "in", {"ant/new.png": IMAGES[0]})
    tarred(tmp_path, "in.tar.gz", "w:gz")
    with refused(DataError, "out"):
        pack(source, out, size=4)
    assert content(out) == before
    assert not (out / "packing" / "spool").exists()


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tarred(tmp_path, "in.tar.gz", "w:gz")
    command = ["pack", str(source), str(tmp_path / "out"), "--size", "4", "--dry-run"]
    assert main(command) == 0
    message = capsys.readouterr().out
    for fact in ("12 images", "3 classes (ant, bee, cow)", "4 × 4 RGB", "1 shard"):
        assert fact in message
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["shards"], found["num_classes"]) == (12, 1, 3)
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf_8_are_reported_escaped(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    with open(os.fsencode(source) + b"/caf\xe9.png", "wb") as file:
        file.write(b"no image")
    outcome = gatdist.pack(str(source), str(tmp_path / "out"), workers=1)
    assert outcome["samples"] == 1
    assert outcome["skipped_examples"][0][0] == "caf\\udce9.png"


def _listed(tmp_path: Path, *names: str) -> Path:
    source = write(tmp_path / "in", {"a.png": IMAGES[0]})
    write(tmp_path / "private", {"b.png": IMAGES[1]})
    lines = [json.dumps({"file": name.format(tmp=tmp_path)}) for name in ("a.png", *names)]
    (source / "list.jsonl").write_text("\n".join(lines))
    return source / "list.jsonl"


@pytest.mark.parametrize(
    "named",
    [
        *("/etc/passwd", "//etc/passwd", "file:///etc/passwd", "FILE://{tmp}/private/b.png"),
        *("../private/b.png", "x/../../private/b.png", "{tmp}/in/../private/b.png"),
        *("{tmp}/private/b.png", "{tmp}/in-other/b.png", "file://etc/passwd", "local:///etc/x.png"),
    ],
)
def test_hostile_list_cannot_name_local_files_outside_of_its_folder(
    named: str, tmp_path: Path
) -> None:
    with refused(DataError, "in"):
        pack(_listed(tmp_path, named), tmp_path / "out", allowed_origins=["https://x.example"])


@pytest.mark.parametrize("named", ["{tmp}/private/b.png", "../private/b.png"])
@pytest.mark.parametrize("allowed", ["{tmp}/private", "file://{tmp}/private/", "{tmp}"])
def test_local_folder_of_a_list_is_allowed_by_name(
    named: str, allowed: str, tmp_path: Path
) -> None:
    source = _listed(tmp_path, named)
    outcome = pack(source, tmp_path / "out", allowed_origins=[allowed.format(tmp=tmp_path)])
    assert (outcome["samples"], outcome["skipped"]) == (2, 0)


@pytest.mark.parametrize("named", ["{tmp}/in/a.png", "x/../a.png", "../in/a.png", "./a.png"])
def test_absolute_paths_below_the_folder_of_a_list_need_no_permission(
    named: str, tmp_path: Path
) -> None:
    assert pack(_listed(tmp_path, named), tmp_path / "out")["samples"] == 2


@pytest.mark.parametrize("half", ["\ud800", "\ud800.png", "a\0.png"])
def test_surrogate_or_nul_in_a_list_skips_the_file(half: str, tmp_path: Path) -> None:
    outcome = pack(_listed(tmp_path, half), tmp_path / "out")
    assert (outcome["samples"], outcome["skipped"]) == (1, 1)


def test_surrogate_in_a_label_skips_the_file(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.png": IMAGES[0], "b.png": IMAGES[1]})
    rows = [{"file": "a.png", "label": "cat"}, {"file": "b.png", "label": "\ud800"}]
    (source / "list.json").write_text(json.dumps(rows))
    outcome = pack(source / "list.json", tmp_path / "out")
    assert (outcome["samples"], outcome["skipped"]) == (1, 1)
    assert open_dataset(DataConfig(url=str(tmp_path / "out"))).num_classes == 1


def test_class_folders_may_have_names_that_are_not_utf8(tmp_path: Path) -> None:
    for folder in (b"caf\xe9", b"dog"):
        name = os.fsdecode(folder)
        write(tmp_path / "in", {f"{name}/{i}.png": IMAGES[i] for i in range(2)})
    pack(tmp_path / "in", tmp_path / "out")
    assert open_dataset(DataConfig(url=str(tmp_path / "out"))).num_classes == 2


def test_csv_row_with_too_many_fields_is_skipped(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.png": IMAGES[0], "b.png": IMAGES[1]})
    (source / "list.csv").write_text("file,label\na.png,1,x\nb.png,0\n")
    outcome = pack(source / "list.csv", tmp_path / "out")
    assert (outcome["samples"], outcome["skipped"]) == (1, 1)


@pytest.mark.parametrize("labels", ["1", "true", '"x"', '{"a": 1}', "[1]"])
def test_dataset_json_with_labels_that_are_no_list_is_rejected_by_name(
    labels: str, tmp_path: Path
) -> None:
    write(tmp_path / "in", {"a.png": IMAGES[0], "dataset.json": f'{{"labels": {labels}}}'.encode()})
    with refused(DataError, "dataset.json"):
        pack(tmp_path / "in", tmp_path / "out")


def test_parquet_keeps_captions_if_the_first_path_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    table = {"name": ["NOTICE", "0.png"], "caption": ["none", "black"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "l.parquet")
    outcome = pack(tmp_path / "l.parquet", tmp_path / "out", column="name")
    assert outcome["samples"] == 1
    assert samples(tmp_path / "out")[0]["txt"] == b"black"


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_columns_are_classified_by_type_if_the_first_value_is_missing(
    tmp_path: Path, kind: str
) -> None:
    write(tmp_path, {f"{i}.png": IMAGES[i] for i in range(3)})
    column = pyarrow.array([None, *(f"{i}.png" for i in range(3))])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"file": column}), tmp_path / "l.parquet")
    for options in ({}, {"column": "file"}):
        outcome = pack(tmp_path / "l.parquet", tmp_path / f"out{len(options)}", **options)
        assert (outcome["samples"], outcome["skipped"]) == (3, 1)


def test_parquet_files_without_rows_are_skipped(tmp_path: Path) -> None:
    """As Spark writes them for empty partitions."""
    write(tmp_path / "in", {"0.png": IMAGES[0]})
    for number, files in enumerate([[], ["0.png"]]):
        table = pyarrow.table({"file": pyarrow.array(files, "string")})
        pyarrow.parquet.write_table(table, tmp_path / "in" / f"part-{number}.parquet")
    outcome = pack(tmp_path / "in", tmp_path / "out", kind="parquet", strict=True)
    assert (outcome["samples"], outcome["skipped"]) == (1, 0)


def test_parquet_texts_that_are_bytes_are_read_or_rejected(tmp_path: Path) -> None:
    for number, column in enumerate(([b"one", b"two"], [["one"], ["two"]])):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        with refused(DataError, f"{number}.parquet"):
            pack(path, tmp_path / f"out{number}")


@pytest.mark.parametrize(
    "labels",
    [
        [Decimal(0), Decimal(1), Decimal(2)],
        [b"0", b"1", b"2"],
        [date(2026, 1, day) for day in (1, 2, 3)],
    ],
    ids=["decimals", "bytes", "dates"],
)
def test_parquet_labels_of_any_type_are_classes(tmp_path: Path, labels: list[Any]) -> None:
    table = pyarrow.table({"image": IMAGES[:3], "label": labels})
    pyarrow.parquet.write_table(table, tmp_path / "l.parquet")
    outcome = pack(tmp_path / "l.parquet", tmp_path / "out")
    assert outcome["num_classes"] == 3
    assert sorted(sample["cls"] for sample in samples(tmp_path / "out")) == [b"0", b"1", b"2"]

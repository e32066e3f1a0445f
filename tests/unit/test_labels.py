"""Labels mean the same in every format, for ``pack`` and ``index``; none is lost or changed."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gatdist
from gatdist.common.errors import DataError
from gatdist.config import DataConfig
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.images import encode_png
from gatdist.data.codecs.labels import normalized
from gatdist.data.dataset import open_dataset
from gatdist.data.format.manifest import read_manifest
from gatdist.storage import Store
from packing import pack, write
from support import refused

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)
PNGS = [encode_png(pixels) for pixels in PIXELS]
NFD = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ([3, 3.0, "3", " 3\n", "\ufeff3", "3.0", "3.", "3e0", "+3", "03", "3,0", "30e-1"], 3),
        ([np.int64(3), np.float32(3), np.array([3]), np.uint8(3), Decimal("3.0"), b"3\n"], 3),
        ([-1, "-1", -1.0, "-1.0", None, "", " ", "\ufeff", "null", "NaN", "nan"], None),
        ([float("nan"), np.float64("nan"), Decimal("NaN"), np.int8(-1), "None", b""], None),
        ([True, "true", "True", "TRUE", np.True_], "true"),
        (["café", NFD, f" {NFD} ", NFD.encode()], "café"),
        (["٣"], "٣"),
        (["1_0"], "1_0"),
        (["\u0645\u06cc\u200c\u062e"], "\u0645\u06cc\u200c\u062e"),
        (["none"], "none"),
        ([0, "-0", "0.0"], 0),
        ([999_999, "999999", "1e5"][:2], 999_999),
    ],
)
def test_equivalent_labels_normalize_identically(
    values: list[Any], label: int | str | None
) -> None:
    assert [normalized(value) for value in values] == [label] * len(values)


@pytest.mark.parametrize(
    "value",
    [
        *(-2, "-2", 0.5, "0.5", "1,5", "1,000", 10**6, "1000000", "9" * 5000, 1e300, "1e99"),
        *("a\0b", "a\nb", "\x1b[31mred", "\ud800"),
        *(float("inf"), [1, 0], {"a": 1}, np.array([1, 2]), b"\xff"),
    ],
)
def test_labels_that_are_no_class_are_rejected(value: Any) -> None:
    with pytest.raises(CodecError):
        normalized(value)


@given(st.integers(0, 999_999), st.sampled_from(["{}", " {} ", "{}.0", "+{}", "0{}", "{}e0"]))
def test_labels_of_numbers_in_any_notation(number: int, notation: str) -> None:
    assert normalized(notation.format(number)) == number


@given(st.text(max_size=9) | st.integers() | st.floats() | st.none() | st.booleans())
def test_normalization_of_labels_is_idempotent(value: Any) -> None:
    try:
        label = normalized(value)
    except CodecError:
        return
    assert label is None or normalized(label) == label
    assert label is None or normalized(str(label)) == label


# The same labels in each format


def texts(labels: list[Any]) -> list[str]:
    return ["" if label is None else str(label) for label in labels]


def tar(path: Path, parts: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def by_cls(folder: Path, labels: list[Any]) -> Path:
    parts = {}
    for i, text in enumerate(texts(labels)):
        parts |= {f"{i:02d}.png": PNGS[i], f"{i:02d}.cls": text.encode()}
    return tar(folder / "a.tar", parts)


def by_json_field(folder: Path, labels: list[Any]) -> Path:
    parts = {}
    for i, label in enumerate(labels):
        facts = {"kind": label} if label is not None else {}
        parts |= {f"{i:02d}.png": PNGS[i], f"{i:02d}.json": json.dumps(facts).encode()}
    return tar(folder / "a.tar", parts)


def by_csv(folder: Path, labels: list[Any], delimiter: str = ",", code: str = "utf-8") -> Path:
    write(folder / "in", {f"{i:02d}.png": PNGS[i] for i in range(len(labels))})
    with (folder / "list.csv").open("w", newline="", encoding=code) as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["file", "label"])
        rows.writerows((f"in/{i:02d}.png", text) for i, text in enumerate(texts(labels)))
    return folder / "list.csv"


def by_dataset_json(folder: Path, labels: list[Any]) -> Path:
    files = {f"{i:02d}.png": PNGS[i] for i in range(len(labels))}
    rows = [[name, label] for name, label in zip(files, labels, strict=True)]
    return write(folder, files | {"dataset.json": json.dumps({"labels": rows}).encode()})


def by_parquet(folder: Path, labels: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = labels if len({type(v) for v in labels} - {type(None)}) == 1 else texts(labels)
    table = pyarrow.table({"image": PNGS[: len(labels)], "label": values})
    pyarrow.parquet.write_table(table, folder / "list.parquet")
    return folder / "list.parquet"


FORMATS: dict[str, tuple[Callable[..., Path], dict[str, str]]] = {
    "cls": (by_cls, {}),
    "json field": (by_json_field, {"labels": "kind"}),
    "csv": (by_csv, {}),
    "dataset.json": (by_dataset_json, {}),
    "parquet": (by_parquet, {}),
}


def classes(folder: Path) -> tuple[int, list[str] | None, dict[bytes, int | None]]:
    """Return number and names of classes, and the class of each image."""
    manifest = read_manifest(Store(str(folder)))
    pixels, labels = open_dataset(DataConfig(url=str(folder))).read(np.arange(manifest.num_samples))
    found = [None] * len(pixels) if labels is None else labels.tolist()
    by_image = {pixel.tobytes(): label for pixel, label in zip(pixels, found, strict=True)}
    return manifest.num_classes, manifest.class_names, by_image


label_lists = st.lists(
    st.none() | st.integers(-1, 4) | st.sampled_from(["cat", "dog", "café", NFD, "true"]),
    min_size=1,
    max_size=6,
) | st.lists(st.integers(-1, 4), min_size=1, max_size=6)


@settings(max_examples=12, deadline=None)
@given(labels=label_lists)
def test_same_labels_in_each_format_give_identical_data_sets(
    tmp_path_factory: pytest.TempPathFactory, labels: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    asked = any(normalized(label) is not None for label in labels)
    results = []
    for name, (writer, options) in FORMATS.items():
        source = writer(folder / name, labels)
        options = options if asked else {}
        pack(source, folder / f"{name}-out", **options)
        results.append(classes(folder / f"{name}-out"))
        if name in ("cls", "json field"):
            where = {"labels": "json:kind"} if options else {}
            gatdist.index(str(source.parent), workers=1, **where)
            results.append(classes(source.parent))
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("labels", [[-1, 0, 1, 2], [0, None, 1, 2], ["b", "a", -1, "c"]])
def test_unlabelled_samples_are_skipped_and_never_shift_classes(
    tmp_path: Path, labels: list[Any]
) -> None:
    source = by_cls(tmp_path / "data", labels)
    outcome = gatdist.index(str(tmp_path / "data"), workers=1)
    packed = pack(source, tmp_path / "out")
    for found in (outcome, packed):
        assert (found["samples"], found["skipped"], found["num_classes"]) == (3, 1, 3)
    numbers = sorted(n for n in classes(tmp_path / "data")[2].values() if n is not None)
    assert numbers == [0, 1, 2]
    assert gatdist.verify(str(tmp_path / "data"), decode=True, workers=1)["whole"]
    again = gatdist.index(str(tmp_path / "data"), workers=1)
    assert (again["samples"], again["skipped"]) == (3, 1)


@pytest.mark.parametrize("labels", [[-1, -1], [None, -1]])
def test_data_set_of_unlabelled_samples_keeps_them_all(tmp_path: Path, labels: list[Any]) -> None:
    source = by_cls(tmp_path / "data", labels)
    for found in (gatdist.index(str(tmp_path / "data"), workers=1), pack(source, tmp_path / "out")):
        assert (found["samples"], found["skipped"], found["num_classes"]) == (2, 0, 0)


def test_labels_that_begin_late_in_the_shards_are_found(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {f"{i:02d}.png": PNGS[i] for i in range(6)})
    tar(tmp_path / "b.tar", {"99.png": PNGS[7], "99.cls": b"1"})
    outcome = gatdist.index(str(tmp_path), workers=1)
    assert (outcome["samples"], outcome["num_classes"], outcome["skipped"]) == (1, 2, 6)


@pytest.mark.parametrize("run", ["pack", "index"])
def test_requested_labels_that_do_not_exist_are_an_error(tmp_path: Path, run: str) -> None:
    source = by_json_field(tmp_path / "data", ["cat", "dog"])
    runs = {
        "pack": lambda: pack(source, tmp_path / "out", labels="sort"),
        "index": lambda: gatdist.index(str(tmp_path / "data"), labels="json:sort", workers=1),
    }
    with refused(DataError, "--labels"):
        runs[run]()


def report(folder: Path) -> dict[str, str]:
    lines = (folder / "report.jsonl").read_text().splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


@pytest.mark.parametrize("where", ["dataset.json", "csv", "csv option"])
def test_conflicting_labels_of_one_file_are_reported_with_both(tmp_path: Path, where: str) -> None:
    files = {f"{i}.png": PNGS[i] for i in range(4)}
    rows = [["0.png", 0], ["1.png", 1], ["2.png", 0], ["2.png", 7], ["3.png", 1], ["3.png", 1.0]]
    options = {}
    if where == "dataset.json":
        files["dataset.json"] = json.dumps({"labels": rows}).encode()
    else:
        lines = ["file,label", *(f"{file},{label}" for file, label in rows)]
        files["l.csv"] = "\n".join(lines).encode()
    source = write(tmp_path / "in", files)
    if where == "csv":
        source = source / "l.csv"
    elif where == "csv option":
        options = {"labels": str(source / "l.csv")}
    outcome = pack(source, tmp_path / "out", **options)
    assert (outcome["samples"], outcome["num_classes"]) == (3, 2)
    reason = report(tmp_path / "out")["2.png"]
    assert "0" in reason
    assert "7" in reason


# CSV files as spreadsheets write them


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "code", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be", "cp1252"]
)
def test_labels_of_csv_in_any_encoding_and_delimiter(
    tmp_path: Path, delimiter: str, code: str
) -> None:
    source = by_csv(tmp_path, ["köter", "cat", "dog"], delimiter, code)
    source.write_bytes(source.read_bytes().replace(b"\n", b"\n"))
    outcome = pack(source, tmp_path / "out")
    assert (outcome["samples"], outcome["num_classes"]) == (3, 3)
    assert classes(tmp_path / "out")[1] == ["cat", "dog", "köter"]


def test_labels_of_csv_with_blanks_quotes_decimal_commas_and_windows_paths(tmp_path: Path) -> None:
    write(tmp_path, {f"in/{i}.png": PNGS[i] for i in range(4)})
    lines = [' File ; "Label" ;x', "in\\0.png; 0,0;", '"in\\1.png"; "1,0";', ".\\in\\2.png;2;"]
    (tmp_path / "l.csv").write_text("\r\n".join([*lines, "in/3.png;3;4;5"]))
    outcome = pack(tmp_path / "l.csv", tmp_path / "out")
    assert (outcome["samples"], outcome["num_classes"], outcome["skipped"]) == (3, 3, 1)
    assert list(report(tmp_path / "out")) == ["l.csv:4"]


def test_column_of_paths_with_blanks_or_an_unknown_first_path_is_not_text(
    tmp_path: Path,
) -> None:
    write(tmp_path, {f"in/{i}.png": PNGS[i] for i in range(3)})
    rows = ["name", "NOTICE", *(f'" in/{i}.png "' for i in range(3))]
    (tmp_path / "l.csv").write_text("\n".join(rows))
    outcome = pack(tmp_path / "l.csv", tmp_path / "out", column="name")
    assert (outcome["samples"], outcome["skipped"]) == (3, 1)
    assert list(report(tmp_path / "out")) == ["NOTICE"]


def test_list_of_labels_with_an_extra_field_is_rejected_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"in/0.png": PNGS[0], "l.csv": b"name,klass\n0.png,0,7\n"})
    with refused(DataError, "l.csv"):
        pack(tmp_path / "in", tmp_path / "out", labels=f"{tmp_path}/l.csv")
    write(tmp_path, {"l.csv": b"file,klass\n0.png,0,7\n"})
    with refused(DataError, "--labels"):
        pack(tmp_path / "in", tmp_path / "out", labels=f"{tmp_path}/l.csv")


@pytest.mark.parametrize("line", [1, 2, 4])
def test_unclosed_quotation_mark_is_named_by_its_line(tmp_path: Path, line: int) -> None:
    write(tmp_path, {f"{i}.png": PNGS[i] for i in range(4)})
    lines = ["file,label", "0.png,0", "1.png,1", "2.png,2", "3.png,3"]
    lines[line - 1] = lines[line - 1].replace(",", ',"')
    (tmp_path / "l.csv").write_text("\n".join(lines) + "\n")
    with refused(DataError, f"l.csv:{line}"):
        pack(tmp_path / "l.csv", tmp_path / "out")


def test_labels_without_a_known_column_suggest_an_option(tmp_path: Path) -> None:
    write(tmp_path, {"l.csv": b"a.png;1\nb.png;2\n"})
    with refused(DataError, "l.csv"):
        pack(tmp_path / "l.csv", tmp_path / "out")


# Folders of every kind


def windows_zip(path: Path, prefix: str = "") -> Path:
    """Write a zip with backslashes, as some Windows programs do."""
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(6):
            info = zipfile.ZipInfo(f"{prefix}{'cats' if i % 2 else 'dogs'}\\{i}.png")
            info.filename = info.orig_filename
            archive.writestr(info, PNGS[i])
    return path


@pytest.mark.parametrize("prefix", ["", ".\\", "C:\\photos\\", "all\\"])
def test_labels_from_folders_of_a_windows_zip_with_backslashes(tmp_path: Path, prefix: str) -> None:
    outcome = pack(windows_zip(tmp_path / "x.zip", prefix), tmp_path / "out")
    assert (outcome["samples"], outcome["num_classes"], outcome["skipped"]) == (6, 2, 0)
    assert classes(tmp_path / "out")[1] == ["cats", "dogs"]


def test_labels_from_folders_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"café/1.png": PNGS[0], f"{NFD}/2.png": PNGS[1]})
    write(source, {"tea/3.png": PNGS[2]})
    assert pack(source, tmp_path / "out")["num_classes"] == 2


def test_labels_from_folders_that_differ_in_case_only_are_noted(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"Cats/1.png": PNGS[0], "cats/2.png": PNGS[1]})
    dry = pack(source, tmp_path / "out", dry_run=True)
    assert dry["num_classes"] == 2
    assert any("Cats" in note and "cats" in note for note in dry["notes"])


@pytest.mark.parametrize("labels", [None, "folders"])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_stray_files_next_to_class_folders_keep_the_labels(
    tmp_path: Path, labels: str | None, kind: str
) -> None:
    files = {"cats/1.png": PNGS[0], "dogs/2.png": PNGS[1], "cover.png": PNGS[2]}
    source = write(tmp_path / "in", files)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        source = tmp_path / "in.zip"
    elif kind == "tar":
        source = tar(tmp_path / "in.tar", files)
    outcome = pack(source, tmp_path / "out", **({"labels": labels} if labels else {}))
    assert (outcome["samples"], outcome["num_classes"], outcome["skipped"]) == (2, 2, 1)
    assert report(tmp_path / "out").keys() == {"cover.png"}

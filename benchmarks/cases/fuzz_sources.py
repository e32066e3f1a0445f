"""Damaged sources of ``gatdist pack`` and ``index``, for :mod:`.fuzz`."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks.cases.fuzz import (
    SECRET_NAME,
    WAYS,
    Target,
    bits,
    cut,
    damage_file,
    read_all,
    values,
)
from gatdist.api import index, pack, verify
from gatdist.data.codecs.images import encode_png

CLASSES = ("cats", "dogs", "owls")
NUM_SAMPLES = 6
# Reserved for documentation (RFC 5737): no host has this address.
NOWHERE = "192.0.2.1"

Damage = Callable[[Path, random.Random], str]


def _target(
    write: Callable[[Path], str], damage: Damage, act: Callable[[Path, str], None]
) -> Target:
    def prepared(place: Path, chance: random.Random) -> tuple[str, Callable[[], str | None]]:
        source = write(place)
        return damage(place, chance), partial(act, place, source)

    return prepared


def _packed(place: Path, source: str, **options: Any) -> None:
    out = str(place / "out")
    pack(source, out, workers=1, **options)
    _checked(out)


def _indexed(place: Path, source: str) -> None:
    out = str(place / "out")
    index(source, out, workers=1)
    _checked(out, decode=False)  # ``index`` reads no pixels


def _checked(url: str, decode: bool = True) -> None:
    damaged = verify(url, decode=decode, workers=1)["damaged"]
    report = Path(url, "report.jsonl")
    reported = report.read_text() if report.exists() else ""
    # ``index`` and ``verify`` report data after the end of a tar; its samples are whole.
    if damaged := [found for found in damaged if found[1] not in reported]:
        raise AssertionError(f"new shards are damaged: {damaged[:3]}")
    read_all(url)


# Valid sources


def _image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return encode_png(pixels)


def _names() -> list[str]:
    return [f"{CLASSES[i % 3]}/{i}.png" for i in range(NUM_SAMPLES)]


def write_folder(place: Path) -> str:
    root = place / "source"
    for number, name in enumerate(_names()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_image(number))
    labels = [[name, number % 3] for number, name in enumerate(_names())]
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return str(root)


def _write_list(place: Path, kind: str) -> str:
    write_folder(place)
    path = place / "source" / f"list.{kind}"
    rows = [{"file": name, "label": i % 3} for i, name in enumerate(_names())]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["file", "label"])
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue())
    return str(path)


def write_shards(place: Path) -> str:
    root = place / "source"
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in range(shard * 3, shard * 3 + 3):
                for ending, content in (("png", _image(number)), ("cls", b"%d" % (number % 3))):
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(root)


def write_zip(place: Path) -> str:
    path = place / "source.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(_names()):
            archive.writestr(name, _image(number))
    return str(path)


def write_audio(place: Path) -> str:
    root = place / "source"
    for number in range(NUM_SAMPLES):
        kind = ("wav", "flac", "ogg")[number % 3]
        path = root / CLASSES[number % 2] / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = np.sin(np.arange(800) * (0.01 + number / 100)).astype(np.float32) / 2
        soundfile.write(path, wave, 8000)
    return str(root)


# Damage


def _files(place: Path, *endings: str) -> list[Path]:
    return [p for p in sorted(place.rglob("*")) if p.is_file() and p.suffix in endings]


def damage_labels(place: Path, chance: random.Random) -> str:
    if chance.random() < 0.8:
        ways = [*WAYS, odd_labels, odd_labels, values]
        return damage_file(place / "source/dataset.json", chance, ways)
    path = chance.choice(_files(place, ".png"))
    name = chance.choice(["cover.png", "@eaDir/x.png", "x\\y.png", "cats/İ.png", "cats/\n.png"])
    new = place / "source" / name
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, new)
    return f"added {name!r}"


def odd_labels(content: bytes, chance: random.Random) -> bytes:
    try:
        root = json.loads(content)
        row = chance.choice(root["labels"])
        row[chance.randrange(2)] = chance.choice(ODD_LABELS + hostile_names(chance))
        if chance.random() < 0.3:
            root["labels"].append(list(row))
    except Exception:  # too damaged
        return content
    return json.dumps(root).encode()


ODD_LABELS: list[Any] = [None, True, -1, 1.0, 1.5, "1.0", " 2 ", "+1", "1e0", "٣", "", "NaN", 2**70]
ODD_LABELS += [float("inf"), [0], {"a": 1}, "\ufeff1", "e\u0301", "é", "cat\x00", "0x1", "\ud800"]


def hostile_names(chance: random.Random) -> list[Any]:
    reference = f"${{env:{SECRET_NAME}}}"
    host = chance.choice([NOWHERE, f"u:{reference}@{NOWHERE}", f"{NOWHERE}:80", "localhost"])
    scheme = chance.choice(
        ["http", "https", "HTTP", "s3", "gs", "az", "abfs", "ftp", "file", "sftp"]
    )
    return [
        f"{scheme}://{host}/{reference}/x.png",
        f"{scheme}://{host}/x.png?token={reference}",
        f"//{host}/x.png",
        f"\\\\{host}\\share\\x.png",
        f"simplecache::http://{NOWHERE}/x.png",
        f"zip://x.png::http://{NOWHERE}/x.zip",
        f"cats/0.png::http://{NOWHERE}/",
        "/etc/passwd",
        "../../../../etc/passwd",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "git://x/y.png",
        "github://a:b@main/x.png",
        f"reference://{NOWHERE}",
        reference,
        "cats\\0.png",
        "C:\\cats\\0.png",
        "./cats/0.png",
        "cats//0.png",
        "CATS/0.PNG",
        "cats/0.png ",
        "cats/0.png\x00.txt",
    ]


def damage_csv(place: Path, chance: random.Random) -> str:
    return damage_file(place / "source/list.csv", chance, [*WAYS, cells, cells, cells, dialects])


def cells(content: bytes, chance: random.Random) -> bytes:
    lines = content.decode(errors="replace").splitlines()
    at = chance.randrange(len(lines)) if lines else 0
    if not lines:
        return content
    row = [*lines[at].split(","), "", ""][:2]
    row[chance.randrange(2)] = str(chance.choice(ODD_LABELS + hostile_names(chance)))
    lines[at] = ",".join(row)
    return "\n".join(lines).encode(errors="replace")


def dialects(content: bytes, chance: random.Random) -> bytes:
    text = content.decode(errors="replace")
    text = text.replace(",", chance.choice([",", ";", "\t", "|", " , ", "\x00"]))
    text = text.replace("\n", chance.choice(["\n", "\r\n", "\r", "\n\n"]))
    encoding = chance.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-16-le"])
    return text.encode(encoding, errors="replace")


def damage_jsonl(place: Path, chance: random.Random) -> str:
    return damage_file(place / "source/list.jsonl", chance, [*WAYS, lines, lines, lines])


def lines(content: bytes, chance: random.Random) -> bytes:
    found = content.decode(errors="replace").splitlines()
    try:
        at = chance.randrange(len(found))
        row = json.loads(found[at])
        row[chance.choice(["file", "label"])] = chance.choice(ODD_LABELS + hostile_names(chance))
        found[at] = json.dumps(row)
    except Exception:
        return content
    return "\n".join(found).encode(errors="replace")


def damage_shards(place: Path, chance: random.Random) -> str:
    return damage_file(
        chance.choice(_files(place, ".tar")), chance, [*WAYS, zeros, classes, joined]
    )


def zeros(content: bytes, chance: random.Random) -> bytes:
    at = 512 * chance.randrange(len(content) // 512 + 1)
    block = chance.choice([bytes(512), bytes(1024), chance.randbytes(512), b"\x00garbage"])
    return content[:at] + block + content[at:]


def classes(content: bytes, chance: random.Random) -> bytes:
    at = content.find(b".cls")
    return (
        content[: at + 412] + chance.choice([b"-", b" ", b"9", b"\xff", b"x"]) + content[at + 413 :]
    )


def joined(content: bytes, chance: random.Random) -> bytes:
    return content + content[512 * chance.randrange(1 + len(content) // 512) :]


def damage_zip(place: Path, chance: random.Random) -> str:
    return damage_file(place / "source.zip", chance, [*WAYS])


def damage_audio(place: Path, chance: random.Random) -> str:
    path = chance.choice(_files(place, ".wav", ".flac", ".ogg"))
    return damage_file(path, chance, [bits, cut, header, header, header])


def header(content: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(64), chance.choice([1, 2, 4, 8])
    put = chance.choice([bytes(size), b"\xff" * size, chance.randbytes(size)])
    return content[:at] + put + content[at + size :]


def _packed_labels(place: Path, source: str) -> None:
    _packed(place, str(place / "source"), labels=source)


_write_csv, _write_jsonl = partial(_write_list, kind="csv"), partial(_write_list, kind="jsonl")
TARGETS: dict[str, Target] = {
    "labels": _target(write_folder, damage_labels, _packed),
    "csv": _target(_write_csv, damage_csv, _packed),
    "jsonl": _target(_write_jsonl, damage_jsonl, _packed),
    "csv_labels": _target(_write_csv, damage_csv, _packed_labels),
    "shards_index": _target(write_shards, damage_shards, _indexed),
    "shards_pack": _target(write_shards, damage_shards, _packed),
    "zip": _target(write_zip, damage_zip, _packed),
    "audio": _target(write_audio, damage_audio, _packed),
}

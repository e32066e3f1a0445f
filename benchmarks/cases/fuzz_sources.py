"""Fuzzing of what ``gatdist pack`` and ``index`` read: labels, lists, sound headers and archives.

python -m benchmarks.cases.fuzz_sources [--seconds 900] [--seed 0] [--target NAME] [--out DIR]

A valid source is damaged at random, then packed (or indexed), verified with decoding and read.
Every outcome must be a data set or an error with a name, within the limits of time and memory.
Whatever the source says, no connection may be opened, no file outside of the source and the
destination may be read, and the value of an environment variable may appear in no message and in
no file that is written.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from benchmarks.cases.fuzz import LIMIT_BYTES, alarm, bits, cut, noise, splice, values
from benchmarks.environment import environment
from gatdist.api import index, pack, verify
from gatdist.common.errors import GatdistError
from gatdist.config import DataConfig
from gatdist.data import open_dataset
from gatdist.data.codecs import encode_png

SECRET_NAME, SECRET = "GATDIST_FUZZ_SECRET", "7c1d0f-planted-secret"
CLASSES = ("cats", "dogs", "owls")
NUM_SAMPLES = 6
# Reserved for documentation (RFC 5737): nobody answers there.
NOWHERE = "192.0.2.1"

Damage = Callable[[Path, random.Random], str]


class Target(NamedTuple):
    """A kind of source.

    Attributes:
        write: makes a valid one in a folder and returns the source to pack.
        damage: damages it and says how.
        act: ``pack`` or ``index``.
    """

    write: Callable[[Path], str]
    damage: Damage
    act: Callable[[Path, str], None]


def main() -> None:
    """Fuzz for the time given and record the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_fuzz_sources"),
    )
    arguments = parser.parse_args()
    outcomes, violations = fuzz(arguments.seconds, arguments.seed, arguments.target or [*TARGETS])
    facts = {"seconds": arguments.seconds, "seed": arguments.seed, "cases": outcomes.total()}
    result = facts | {"outcomes": dict(outcomes.most_common()), "violations": violations}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result | {"environment": environment()}, indent=1, ensure_ascii=False)
    (arguments.out / "result.json").write_text(text + "\n")
    print(json.dumps(facts | {"outcomes": result["outcomes"], "violations": len(violations)}))
    sys.exit(bool(violations))


def fuzz(
    seconds: float, seed: int, targets: list[str]
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Run cases for the given time.

    Returns:
        How often each outcome occurred, and each violation with its case.
    """
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, resource.RLIM_INFINITY))
    os.environ[SECRET_NAME] = SECRET
    outcomes: Counter[str] = Counter()
    violations: list[dict[str, Any]] = []
    ends, case = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # what is spooled lies inside, too
        watch = Watch(Path(folder))
        while time.monotonic() < ends:
            name = targets[case % len(targets)]
            place = Path(folder, "case")
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            outcome, damage, text = run_case(name, place, random.Random(f"{seed} {case}"), watch)
            outcomes[f"{name}: {outcome}"] += 1
            if not outcome.startswith(("right", "named")):
                found = {"case": case, "target": name, "damage": damage}
                violations.append(found | {"outcome": outcome, "text": text})
            case += 1
    return outcomes, violations


def run_case(name: str, place: Path, chance: random.Random, watch: Watch) -> tuple[str, str, str]:
    """The outcome of one case, how the source was damaged, and details of a violation."""
    target = TARGETS[name]
    source = target.write(place)
    damage = target.damage(place, chance)
    text = ""
    with watch:
        try:
            with alarm():
                target.act(place, source)
            outcome = "right"
        except GatdistError as error:
            outcome, text = f"named {type(error).__name__}", str(error)
        except BaseException as error:
            return type(error).__name__, damage, traceback.format_exc()[-1500:]
    if watch.found:
        return "reached outside", damage, str(watch.found[:3])
    written = (path for path in place.glob("out*/**/*") if path.is_file())
    if SECRET in text or any(SECRET.encode() in path.read_bytes() for path in written):
        return "secret shown", damage, text
    return outcome, damage, text


class Watch:
    """Records connections and files opened outside of ``folder`` while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.found: list[str] = []
        self._is_on = False
        allowed = (
            str(folder),
            sys.prefix,
            os.path.realpath(Path(np.__file__).parents[1]),  # where libraries are
            sys.base_prefix,
            os.getcwd(),
            "/proc/",
            "/dev/",
            "/sys/",
        )
        # What libraries read by themselves.
        allowed += ("/etc/mime.types", "/usr/share", "/usr/lib", "/etc/ssl", "/etc/localtime")

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if not self._is_on:
                return
            if event in ("socket.connect", "socket.getaddrinfo"):
                self.found.append(f"{event} {arguments[1:] if event[7] == 'c' else arguments[:2]}")
            if event == "open" and isinstance(arguments[0], str):
                path = os.path.realpath(arguments[0])
                if not path.startswith(allowed):
                    self.found.append(f"open {path}")

        sys.addaudithook(hook)

    def __enter__(self) -> None:
        self.found.clear()
        self._is_on = True

    def __exit__(self, *exception: object) -> None:
        self._is_on = False


def _packed(place: Path, source: str, **options: Any) -> None:
    """Pack the source, verify the data set with decoding, and read it."""
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
    message = report.read_text() if report.exists() else ""
    # Data after the end of a tar is told by ``index`` and ``verify``; its samples are whole.
    if damaged := [found for found in damaged if found[1] not in message]:
        raise AssertionError(f"what was just written is damaged: {damaged[:3]}")
    dataset = open_dataset(DataConfig(url=url))
    samples, labels = dataset.read(np.arange(dataset.num_samples))
    assert len(samples) == dataset.num_samples
    assert labels is None or set(labels) <= set(range(dataset.num_classes))


# Valid sources


def _image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return encode_png(pixels)


def _names() -> list[str]:
    return [f"{CLASSES[i % 3]}/{i}.png" for i in range(NUM_SAMPLES)]


def write_folder(place: Path) -> str:
    """Images in folders of classes, with the labels in ``dataset.json``, too."""
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


def write_csv(place: Path) -> str:
    """A CSV list of files and labels."""
    return _write_list(place, "csv")


def write_jsonl(place: Path) -> str:
    """A list as JSON lines."""
    return _write_list(place, "jsonl")


def write_shards(place: Path) -> str:
    """Two tars of images and their classes."""
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
    """A zip of images in folders of classes."""
    path = place / "source.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(_names()):
            archive.writestr(name, _image(number))
    return str(path)


def write_audio(place: Path) -> str:
    """Sounds in three containers."""
    root = place / "source"
    for number in range(NUM_SAMPLES):
        kind = ("wav", "flac", "ogg")[number % 3]
        path = root / CLASSES[number % 2] / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = np.sin(np.arange(800) * (0.01 + number / 100)).astype(np.float32) / 2
        soundfile.write(path, wave, 8000)
    return str(root)


# Damage

WAYS = (bits, noise, cut, splice)


def _damage(path: Path, chance: random.Random, ways: list[Any]) -> str:
    content, way = path.read_bytes(), chance.choice(ways)
    for _ in range(chance.choice([1, 1, 1, 3, 10])):
        content = way(content, chance)
    path.write_bytes(content)
    return f"{path.name} {way.__name__}"


def _files(place: Path, *endings: str) -> list[Path]:
    return [p for p in sorted(place.rglob("*")) if p.is_file() and p.suffix in endings]


def damage_labels(place: Path, chance: random.Random) -> str:
    """Damage of ``dataset.json``, or of the name of a file or folder."""
    if chance.random() < 0.8:
        return _damage(
            place / "source/dataset.json", chance, [*WAYS, odd_labels, odd_labels, values]
        )
    path = chance.choice(_files(place, ".png"))
    name = chance.choice(["cover.png", "@eaDir/x.png", "x\\y.png", "cats/İ.png", "cats/\n.png"])
    new = place / "source" / name
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, new)
    return f"added {name!r}"


def odd_labels(content: bytes, chance: random.Random) -> bytes:
    """Labels, or files, of unusual notation."""
    try:
        root = json.loads(content)
        row = chance.choice(root["labels"])
        row[chance.randrange(2)] = chance.choice(ODD_LABELS + hostile_names(chance))
        if chance.random() < 0.3:
            root["labels"].append(list(row))
    except Exception:  # it is too damaged already
        return content
    return json.dumps(root).encode()


ODD_LABELS: list[Any] = [None, True, -1, 1.0, 1.5, "1.0", " 2 ", "+1", "1e0", "٣", "", "NaN", 2**70]
ODD_LABELS += [float("inf"), [0], {"a": 1}, "\ufeff1", "e\u0301", "é", "cat\x00", "0x1", "\ud800"]


def hostile_names(chance: random.Random) -> list[Any]:
    """Names and URLs that must lead nowhere."""
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
    """Damage of a CSV list: bytes, separators, encodings, hostile cells."""
    return _damage(place / "source/list.csv", chance, [*WAYS, cells, cells, cells, dialects])


def cells(content: bytes, chance: random.Random) -> bytes:
    """A cell becomes another one."""
    lines = content.decode(errors="replace").splitlines()
    at = chance.randrange(len(lines)) if lines else 0
    if not lines:
        return content
    row = [*lines[at].split(","), "", ""][:2]
    row[chance.randrange(2)] = str(chance.choice(ODD_LABELS + hostile_names(chance)))
    lines[at] = ",".join(row)
    return "\n".join(lines).encode(errors="replace")


def dialects(content: bytes, chance: random.Random) -> bytes:
    """Another separator, another end of line, another encoding."""
    text = content.decode(errors="replace")
    text = text.replace(",", chance.choice([",", ";", "\t", "|", " , ", "\x00"]))
    text = text.replace("\n", chance.choice(["\n", "\r\n", "\r", "\n\n"]))
    encoding = chance.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-16-le"])
    return text.encode(encoding, errors="replace")


def damage_jsonl(place: Path, chance: random.Random) -> str:
    """Damage of JSON lines."""
    return _damage(place / "source/list.jsonl", chance, [*WAYS, lines, lines, lines])


def lines(content: bytes, chance: random.Random) -> bytes:
    """A value of a line becomes another one."""
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
    """Damage of a tar, or of the labels in it."""
    return _damage(chance.choice(_files(place, ".tar")), chance, [*WAYS, zeros, classes, joined])


def zeros(content: bytes, chance: random.Random) -> bytes:
    """Blocks of zeros, or of garbage, in the middle or at the end."""
    at = 512 * chance.randrange(len(content) // 512 + 1)
    block = chance.choice([bytes(512), bytes(1024), chance.randbytes(512), b"\x00garbage"])
    return content[:at] + block + content[at:]


def classes(content: bytes, chance: random.Random) -> bytes:
    """The content of a member of one byte becomes another one."""
    at = content.find(b".cls")
    return (
        content[: at + 412] + chance.choice([b"-", b" ", b"9", b"\xff", b"x"]) + content[at + 413 :]
    )


def joined(content: bytes, chance: random.Random) -> bytes:
    """Two tars one behind the other."""
    return content + content[512 * chance.randrange(1 + len(content) // 512) :]


def damage_zip(place: Path, chance: random.Random) -> str:
    """Damage of a zip's bytes."""
    return _damage(place / "source.zip", chance, [*WAYS])


def damage_audio(place: Path, chance: random.Random) -> str:
    """Damage of a sound's header, mostly."""
    path = chance.choice(_files(place, ".wav", ".flac", ".ogg"))
    return _damage(path, chance, [bits, cut, header, header, header])


def header(content: bytes, chance: random.Random) -> bytes:
    """Some bytes of the first 64 become zeros, ones or random."""
    at, size = chance.randrange(64), chance.choice([1, 2, 4, 8])
    put = chance.choice([bytes(size), b"\xff" * size, chance.randbytes(size)])
    return content[:at] + put + content[at + size :]


TARGETS = {
    "labels": Target(write_folder, damage_labels, _packed),
    "csv": Target(write_csv, damage_csv, _packed),
    "jsonl": Target(write_jsonl, damage_jsonl, _packed),
    "csv_labels": Target(
        write_csv, damage_csv, lambda p, s: _packed(p, str(p / "source"), labels=s)
    ),
    "shards_index": Target(write_shards, damage_shards, _indexed),
    "shards_pack": Target(write_shards, damage_shards, _packed),
    "zip": Target(write_zip, damage_zip, _packed),
    "sounds": Target(write_audio, damage_audio, _packed),
}


if __name__ == "__main__":
    main()

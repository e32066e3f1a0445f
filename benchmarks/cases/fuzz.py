"""Fuzzing: damaged or hostile data sets, images, and sources of ``gatdist pack`` and ``index``.

The outcome must be a result or a named error, within limits of time and memory. No connection may
be opened, no outside file read, and no environment variable shown.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from benchmarks.case import parser, save, shuffled_shards
from gatdist.api import index, verify
from gatdist.common.errors import GatdistError
from gatdist.config import DataConfig
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import open_dataset
from gatdist.data.format import manifest
from gatdist.data.format.manifest import Manifest
from gatdist.data.format.shard_files import write_dataset
from gatdist.storage import Store

LIMIT_S = 10
LIMIT_BYTES = 3 * 2**30
SECRET_NAME, SECRET = "GATDIST_FUZZ_SECRET", "7c1d0f-planted-secret"
# Writes a damaged input; returns what was damaged, and the act to attempt, whose result is "right…"
# or "named…", or None for "right".
Target = Callable[[Path, random.Random], tuple[str, Callable[[], str | None]]]
Way = Callable[[bytes, random.Random], bytes]


def main() -> None:
    arguments = parser("fuzz", __doc__)
    arguments.add_argument("--seconds", type=float, default=1500)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--target", choices=targets(), action="append", help="default: all")
    given = arguments.parse_args()
    outcomes, violations = fuzz(given.seconds, given.seed, given.target)
    result = {"seconds": given.seconds, "seed": given.seed, "cases": outcomes.total()}
    result |= {"outcomes": dict(outcomes.most_common())}
    save(given.out, result | {"violations": violations})
    print(json.dumps(result | {"violations": len(violations)}))
    sys.exit(bool(violations))


def targets() -> dict[str, Target]:
    from benchmarks.cases import fuzz_images, fuzz_sources

    return {"data_set": damaged_data_set, "images": fuzz_images.damaged, **fuzz_sources.TARGETS}


def fuzz(
    seconds: float, seed: int, names: Sequence[str] | None = None
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Run cases for some time; return how often each outcome occurred, and all violations."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, resource.RLIM_INFINITY))
    os.environ[SECRET_NAME] = SECRET
    known, names = targets(), names or list(targets())
    outcomes: Counter[str] = Counter()
    violations: list[dict[str, Any]] = []
    ends, case = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # spooled files are inside, too
        watch, place = Watch(Path(folder)), Path(folder, "case")
        while time.monotonic() < ends:
            name = names[case % len(names)]
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            damage, act = known[name](place, random.Random(f"{seed} {case}"))
            outcome, text = attempt(act, watch, place)
            outcomes[f"{name}: {outcome}"] += 1
            if not outcome.startswith(("right", "named")):
                found = {"case": case, "target": name, "damage": damage}
                violations.append(found | {"outcome": outcome, "text": text})
            case += 1
    return outcomes, violations


def attempt(act: Callable[[], str | None], watch: Watch, place: Path) -> tuple[str, str]:
    text = ""
    with watch:
        try:
            with alarm():
                outcome = act() or "right"
        except GatdistError as error:
            outcome, text = f"named {type(error).__name__}", str(error)
        except BaseException as error:
            return type(error).__name__, traceback.format_exc()[-1500:]
    if watch.found:
        return "reached outside", str(watch.found[:3])
    written = (path for path in place.glob("out*/**/*") if path.is_file())
    if SECRET in text or any(SECRET.encode() in path.read_bytes() for path in written):
        return "secret shown", text
    return outcome, text


@contextmanager
def alarm() -> Iterator[None]:
    """Raise TimeoutError after ``LIMIT_S`` of CPU time, or 30 times as much wall time."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.alarm(30 * LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


class Watch:
    """Records connections and files opened outside of ``folder`` while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.found: list[str] = []
        self._is_on = False
        libraries = os.path.realpath(Path(np.__file__).parents[1])
        allowed = (
            *(str(folder), sys.prefix, sys.base_prefix, libraries, os.getcwd()),
            # What libraries read by themselves.
            *("/proc/", "/dev/", "/sys/", "/etc/mime.types", "/usr/share", "/usr/lib"),
            *("/etc/ssl", "/etc/localtime"),
        )

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if not self._is_on:
                return
            if event in ("socket.connect", "socket.getaddrinfo"):
                self.found.append(f"{event} {arguments[1:] if event[7] == 'c' else arguments[:2]}")
            if event == "open" and isinstance(arguments[0], str | bytes):
                path = os.path.realpath(os.fsdecode(arguments[0]))
                if not path.startswith(allowed):
                    self.found.append(f"open {path}")

        sys.addaudithook(hook)

    def __enter__(self) -> None:
        self.found.clear()
        self._is_on = True

    def __exit__(self, *exception: object) -> None:
        self._is_on = False


# Ways to damage bytes


def damage_file(path: Path, chance: random.Random, ways: Sequence[Way]) -> str:
    content, way = path.read_bytes(), chance.choice(ways)
    for _ in range(chance.choice([1, 1, 1, 3, 10])):
        content = way(content, chance)
    path.write_bytes(content)
    return f"{path.name} {way.__name__}"


def bits(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _overwritten(content: bytes, chance: random.Random, options: Sequence[bytes]) -> bytes:
    at, put = chance.randrange(len(content) + 1), chance.choice(options)
    return content[:at] + put + content[at + len(put) :]


def noise(content: bytes, chance: random.Random) -> bytes:
    return _overwritten(content, chance, [chance.randbytes(n) for n in (1, 4, 60, 512)])


def lengths(content: bytes, chance: random.Random) -> bytes:
    numbers = [b"77777777777", b"\x80" + b"\xff" * 11, b"-1", b"0", b"\xff" * 8, b"9" * 20]
    return _overwritten(content, chance, [*numbers, bytes(8)])


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def splice(content: bytes, chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    at = chance.randrange(len(content) + 1)
    return content[:at] + content[first:last] + content[at + chance.choice([0, last - first]) :]


WAYS: tuple[Way, ...] = (bits, noise, cut, splice)
_ODD: list[Any] = [None, True, -1, 0, 1, 2**63, 1e308, ""]
_ODD += ["../../etc/passwd", "/etc/passwd", [], {}, [[]]]


def values(content: bytes, chance: random.Random) -> bytes:
    try:
        root = json.loads(content)
    except ValueError:
        return content
    at, keys = root, []
    while isinstance(at, dict | list) and at:
        key = chance.choice(list(at) if isinstance(at, dict) else range(len(at)))
        keys.append((at, key))
        at = at[key]
        if chance.random() < 0.3:
            break
    if keys:
        holder, key = keys[-1]
        if isinstance(holder[key], int) and chance.random() < 0.5:
            holder[key] += chance.choice([-1, 1, 512, -512])
        elif chance.random() < 0.2:
            del holder[key]
        else:
            holder[key] = chance.choice(_ODD)
    return json.dumps(root).encode()


def index_rows(content: bytes, chance: random.Random) -> bytes:
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
        row = found[chance.randrange(len(found))]
        field = chance.choice(found.dtype.names)
        if field in ("key", "component"):
            row[field] = chance.choice([b"", b"x", b"\xff\xfe", b"../x", b"png", b"cls"])
        elif field == "crc32":
            row[field] ^= 1
        else:
            row[field] = chance.choice([-1, 0, 1, 2**62, -(2**62), int(row[field]) + 512, 2**31])
        file = io.BytesIO()
        np.save(file, found, allow_pickle=False)
        return file.getvalue()
    except Exception:  # it is no index any more
        return content


# Damaged shards, indexes and manifests

NUM_SAMPLES, SHARDS = 12, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, 8, 8, 3), dtype=np.uint8)


def damaged_data_set(place: Path, chance: random.Random) -> tuple[str, Callable[[], str | None]]:
    """Damage a file of a data set; half of the time, fix the digests as an attacker would."""
    folder = place / "data"
    write_dataset(
        Store(str(folder)),
        shuffled_shards(
            NUM_SAMPLES, SHARDS, lambda i: {"png": encode_png(PIXELS[i]), "cls": b"%d" % (i % 3)}
        ),
        modality="image",
        sample_shape=(3, 8, 8),
        num_classes=3,
    )
    path = chance.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    ways = [*WAYS, lengths]
    ways += [values] * 5 * (path.suffix == ".json") + [index_rows] * 5 * (path.suffix == ".npy")
    damage = damage_file(path, chance, ways)
    if chance.random() < 0.5 and fixed_digests(folder):
        damage += ", digests fixed"

    def check() -> str:
        found = verify(str(folder), decode=True, workers=1)
        return "right: whole" if found["whole"] else "named damage"

    def make_index() -> str:
        index(str(folder), str(place / "out"), workers=1)
        return _read(place / "out")

    return damage, chance.choice([lambda: _read(folder), check, make_index])


def fixed_digests(folder: Path) -> bool:
    path = folder / "manifest.json"
    try:
        found = json.loads(path.read_bytes())
        for shard in found["shards"]:
            for name, digest in (("name", "sha256"), ("index", "index_sha256")):
                content = (folder / shard[name]).read_bytes()
                shard[digest] = hashlib.sha256(content).hexdigest()
            shard["size"] = (folder / shard["name"]).stat().st_size
        found["num_samples"] = sum(shard["num_samples"] for shard in found["shards"])
        read = Manifest.model_validate(found)
        found["fingerprint"] = manifest._fingerprint(read, read.shards)
    except Exception:  # too damaged
        return False
    path.write_text(json.dumps(found))
    return True


def _read(folder: Path) -> str:
    samples = read_all(str(folder))
    order = np.random.default_rng(0).permutation(NUM_SAMPLES)
    whole = samples.shape == PIXELS.shape and (samples == PIXELS[order]).all()
    return "right samples" if whole else "named samples of a changed data set"


def read_all(url: str) -> Any:
    dataset = open_dataset(DataConfig(url=url))
    samples, labels = dataset.read(np.arange(dataset.num_samples))
    assert len(samples) == dataset.num_samples
    assert labels is None or set(labels.tolist()) <= set(range(dataset.num_classes))
    return samples


if __name__ == "__main__":
    main()

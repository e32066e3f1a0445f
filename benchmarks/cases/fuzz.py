"""Fuzzing: what damaged or hostile shards, indexes and manifests can do to a reader.

python -m benchmarks.cases.fuzz [--seconds 600] [--seed 0] [--only shards|images] [--out DIR]

A small data set is damaged at random: bits, bytes, lengths, cuts, splices, values of the manifest's
JSON and of the index's rows. Every other time the digests are made to fit again, as a hostile
author would, so that the damage reaches what they protect. Then it is opened, verified and read to
the end, or indexed anew. The outcome must be the samples, or an error with a name, within time and
memory, and no file outside of the folder may be opened. Every other case is an image whose parts
are shuffled; see :mod:`benchmarks.cases.fuzz_images`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
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

from benchmarks.cases import fuzz_images
from benchmarks.environment import environment
from gatdist.api import index, verify
from gatdist.common.errors import GatdistError
from gatdist.config import DataConfig
from gatdist.data import open_dataset, write_dataset
from gatdist.data.codecs import encode_png
from gatdist.data.format import Manifest, manifest
from gatdist.storage import Store

KINDS = ("shards", "images")
NUM_SAMPLES, SHARDS = 12, 3
LIMIT_S = 10
LIMIT_BYTES = 3 * 2**30
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, 8, 8, 3), dtype=np.uint8)


def main() -> None:
    """Fuzz for the time given, and record what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="of both kinds of cases")
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_fuzz")
    )
    arguments = parser.parse_args()
    kinds = (arguments.only,) if arguments.only else KINDS
    outcomes, violations = fuzz(arguments.seconds, arguments.seed, kinds)
    facts = {"seconds": arguments.seconds, "seed": arguments.seed, "cases": outcomes.total()}
    result = facts | {"outcomes": dict(outcomes.most_common()), "violations": violations}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result | {"environment": environment()}, indent=1, ensure_ascii=False)
    (arguments.out / "result.json").write_text(text + "\n")
    print(json.dumps(facts | {"outcomes": result["outcomes"], "violations": len(violations)}))
    sys.exit(bool(violations))


def fuzz(
    seconds: float, seed: int, kinds: Sequence[str] = KINDS
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Cases for so long: how often each outcome came, and each violation with its case."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, resource.RLIM_INFINITY))
    outcomes: Counter[str] = Counter()
    violations: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        good, place = Path(folder, "good"), Path(folder, "damaged")
        write(good)
        for _, content in fuzz_images.SEEDS:  # imports what is imported on first use
            fuzz_images.decode(content)
        opened = watched_opens(place)
        ends, case = time.monotonic() + seconds, 0
        while time.monotonic() < ends:
            chance = random.Random(f"{seed} {case}")
            opened.clear()
            act: Callable[[Any], str]
            if chance.choice(kinds) == "images":
                act = fuzz_images.decode
                what, content = fuzz_images.damaged(chance)
                outcome, message = attempt(act, content)
            else:
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(good, place)
                what = damage(place, chance)
                act = chance.choice(ACTS)
                opened.clear()
                outcome, message = attempt(act, place)
            if opened:
                outcome, message = "opened a file outside", str(opened[0])
            outcomes[f"{act.__name__}: {outcome}"] += 1
            if not outcome.startswith(("right", "Gatdist", "named ")):
                violations.append(
                    {"case": case, "damage": what, "outcome": outcome, "told": message}
                )
            case += 1
    return outcomes, violations


def write(folder: Path) -> None:
    """The data set that is damaged."""
    size = NUM_SAMPLES // SHARDS

    def samples(first: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(first, first + size):
            yield f"{i:06d}", {"png": encode_png(PIXELS[i]), "cls": b"%d" % (i % 3)}

    write_dataset(
        Store(str(folder)),
        (samples(shard * size) for shard in range(SHARDS)),
        modality="image",
        sample_shape=(3, 8, 8),
        num_classes=3,
    )


# Damage


def damage(folder: Path, chance: random.Random) -> str:
    """Damage one file, and perhaps make the digests fit."""
    path = chance.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    content = path.read_bytes()
    ways: list[Callable[[bytes, random.Random], bytes]] = [bits, lengths, cut, splice, noise]
    if path.suffix == ".json":
        ways += [values] * 5
    if path.suffix == ".npy":
        ways += [rows] * 5
    way = chance.choice(ways)
    for _ in range(chance.choice([1, 1, 1, 3, 10])):
        content = way(content, chance)
    path.write_bytes(content)
    fits = chance.random() < 0.5 and repaired(folder)
    return f"{path.name} {way.__name__}{', digests made to fit' if fits else ''}"


def bits(content: bytes, chance: random.Random) -> bytes:
    """Flip one."""
    if not content:
        return content
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def noise(content: bytes, chance: random.Random) -> bytes:
    """Some bytes become others."""
    at = chance.randrange(len(content) + 1)
    put = chance.randbytes(chance.choice([1, 4, 60, 512]))
    return content[:at] + put + content[at + len(put) :]


def lengths(content: bytes, chance: random.Random) -> bytes:
    """A number, in decimal, octal or binary, becomes another."""
    at = chance.randrange(len(content) + 1)
    put = chance.choice(
        [b"77777777777", b"\x80" + b"\xff" * 11, b"-1", b"0", b"\xff" * 8, b"9" * 20, bytes(8)]
    )
    return content[:at] + put + content[at + len(put) :]


def cut(content: bytes, chance: random.Random) -> bytes:
    """The end is lost."""
    return content[: chance.randrange(len(content) + 1)]


def splice(content: bytes, chance: random.Random) -> bytes:
    """A part stands elsewhere, or twice."""
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    at = chance.randrange(len(content) + 1)
    return content[:at] + content[first:last] + content[at + chance.choice([0, last - first]) :]


_ODD = [None, True, -1, 0, 1, 2**63, 1e308, "", "../../etc/passwd", "/etc/passwd", [], {}, [[]]]


def values(content: bytes, chance: random.Random) -> bytes:
    """A value of JSON becomes another."""
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


def rows(content: bytes, chance: random.Random) -> bytes:
    """A field of a row of an index becomes another."""
    try:
        index = np.load(io.BytesIO(content), allow_pickle=False)
        row = index[chance.randrange(len(index))]
        field = chance.choice(index.dtype.names)
        if field in ("key", "component"):
            row[field] = chance.choice([b"", b"x", b"\xff\xfe", b"../x", b"png", b"cls"])
        elif field == "crc32":
            row[field] ^= 1
        else:
            row[field] = chance.choice([-1, 0, 1, 2**62, -(2**62), int(row[field]) + 512, 2**31])
        file = io.BytesIO()
        np.save(file, index, allow_pickle=False)
        return file.getvalue()
    except Exception:  # it is no index any more
        return content


def repaired(folder: Path) -> bool:
    """Make all digests fit, as far as there is a manifest."""
    path = folder / "manifest.json"
    try:
        message = json.loads(path.read_bytes())
        for shard in message["shards"]:
            for name, digest in (("name", "sha256"), ("index", "index_sha256")):
                content = (folder / shard[name]).read_bytes()
                shard[digest] = hashlib.sha256(content).hexdigest()
            shard["size"] = (folder / shard["name"]).stat().st_size
        message["num_samples"] = sum(shard["num_samples"] for shard in message["shards"])
        read = Manifest.model_validate(message)
        message["fingerprint"] = manifest._fingerprint(read, read.shards)
    except Exception:  # too damaged for that
        return False
    path.write_text(json.dumps(message))
    return True


# What is done with it


def read(folder: Path) -> str:
    """Open it, and read all samples."""
    dataset = open_dataset(DataConfig(url=str(folder)))
    samples, labels = dataset.read(np.arange(dataset.num_samples))
    assert labels is None or len(labels) == len(samples)
    whole = samples.shape == PIXELS.shape and (samples == PIXELS).all()
    return "right samples" if whole else "named samples of a changed data set"


def check(folder: Path) -> str:
    """Verify it."""
    outcome = verify(str(folder), decode=True, workers=1)
    return "right: whole" if outcome["whole"] else "named damage"


def make_index(folder: Path) -> str:
    """Index the shards anew, and read them."""
    out = folder / "index"
    index(str(folder), str(out), workers=1)
    return read(out)


ACTS = [read, check, make_index]


def attempt(act: Callable[[Any], str], given: Any) -> tuple[str, str]:
    """What came of it, and for what must not be, the traceback."""
    try:
        with alarm():
            return act(given), ""
    except GatdistError as error:
        return f"Gatdist's {type(error).__name__}", ""
    except BaseException as error:
        return type(error).__name__, traceback.format_exc()[-1500:]


@contextmanager
def alarm() -> Iterator[None]:
    """Raise TimeoutError past the limit of CPU time, or past 30 times as much on the clock.

    A busy machine takes its time; what hangs without computing is seen by the clock.
    """

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


def watched_opens(folder: Path) -> list[str]:
    """A list that gets the name of each file that is opened outside of ``folder``."""
    found: list[str] = []
    allowed = (
        str(folder),
        sys.prefix,
        sys.base_prefix,
        str(Path.cwd()),
        "/proc/",
        "/dev/",
        "/sys/",
    )

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            name = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
            if name.startswith("/") and not name.startswith(allowed):
                found.append(name)

    sys.addaudithook(watch)
    return found


if __name__ == "__main__":
    main()

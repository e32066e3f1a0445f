"""Packs pictures with one core, beside webdataset's ShardWriter doing the same to the same files.

python -m benchmarks.cases.packing [--pictures 300] [--rounds 5]

Sources are parts of two photographs (scikit-learn's), 320 × 400, as JPEG files in two folders.
Both sides read them from the page cache, crop about the centre, resize by Lanczos' filter to 256²
and write shards; ``copy`` only stores files. Of PNG, webdataset writes what Pillow does by default;
the case with ``tuned`` has the effort that gatdist uses. Both run in one thread of one process, in
turns; gatdist also makes an index and digests, and flushes its files to the disk.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.environment import environment
from gatdist import pack
from gatdist.bench.rounds import compare, interleave, settled

HEIGHT, WIDTH, SIZE = 320, 400, 256
Encode = Callable[[Image.Image], object]


def write_sources(folder: Path, count: int) -> list[Path]:
    """JPEG files in two classes."""
    generator = np.random.default_rng(0)
    photographs = load_sample_images().images
    paths = []
    for number in range(count):
        pixels = photographs[number % 2]
        top = generator.integers(0, pixels.shape[0] - HEIGHT + 1)
        left = generator.integers(0, pixels.shape[1] - WIDTH + 1)
        path = folder / "ab"[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = pixels[top : top + HEIGHT, left : left + WIDTH]
        Image.fromarray(part).save(path, quality=90)
        paths.append(path)
    return paths


def shard_writer(paths: list[Path], dest: Path, component: str, encode: Encode | None) -> None:
    """What a user of webdataset would write."""
    dest.mkdir()
    with webdataset.ShardWriter(str(dest / "%06d.tar"), maxsize=256e6, verbose=0) as writer:
        for number, path in enumerate(paths):
            content: object = path.read_bytes()
            if encode:
                with Image.open(io.BytesIO(path.read_bytes())) as image:
                    side = min(image.size)
                    left, top = (image.width - side) // 2, (image.height - side) // 2
                    part = image.convert("RGB").crop((left, top, left + side, top + side))
                    content = encode(part.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            label = int(path.parent.name == "b")
            writer.write({"__key__": f"{number:08d}", component: content, "cls": label})


def tuned_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def cases(source: Path, paths: list[Path]) -> dict[str, Callable[[Path], None]]:
    """By name, a function that packs into a folder; the peer of ``x, gatdist`` is ``x, …``."""

    def ours(**options: object) -> Callable[[Path], None]:
        return lambda dest: pack(str(source), str(dest), workers=1, **options) and None

    def theirs(component: str, encode: Encode | None) -> Callable[[Path], None]:
        return lambda dest: shard_writer(paths, dest, component, encode)

    return {
        "png, gatdist": ours(size=SIZE),
        "png, webdataset": theirs("png", lambda image: image),
        "png, webdataset tuned": theirs("png", tuned_png),
        "jpeg, gatdist": ours(size=SIZE, format="jpeg"),
        "jpeg, webdataset": theirs("jpg", jpeg),
        "copy, gatdist": ours(),
        "copy, webdataset": theirs("jpg", None),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_packing")
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_sources(folder / "in", arguments.images)
        found = cases(folder / "in", paths)
        turns = iter(range(10**6))

        def turn(case: str) -> float:
            began = time.perf_counter()
            found[case](folder / f"out{next(turns)}")
            return time.perf_counter() - began

        with settled():
            seconds = interleave(list(found), arguments.rounds, turn, print)
    rows = []
    for case, taken in seconds.items():
        row = {"name": case, "samples_per_s": len(paths) / median(taken), "seconds": taken}
        aim, _, who = case.partition(", ")
        if who != "gatdist":
            ratio = compare(seconds[f"{aim}, gatdist"], taken)
            row["gatdist_to_this"] = asdict(ratio)
        rows.append(row)
        print(f"{case:<24}{row['samples_per_s']:8.1f} pictures/s")
        if who != "gatdist":
            spread = f"{ratio.low:.2f} to {ratio.high:.2f}"
            print(f"{'':24}gatdist is {ratio.median:.2f} × as fast ({spread})")
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"pictures": len(paths), "cases": rows, "environment": environment()}
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

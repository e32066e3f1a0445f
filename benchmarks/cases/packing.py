"""``gatdist pack`` compared with webdataset's ``ShardWriter`` on the same files, with one core.

Sources are JPEG crops of two photographs (scikit-learn's), 320 × 400, in two folders. Both read
them from the page cache, crop the centre, resize to 256² by Lanczos' filter and write shards;
``copy`` only stores files. ``tuned`` uses gatdist's PNG settings. gatdist also makes an index and
digests, and flushes its files to the disk.
"""

from __future__ import annotations

import io
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.case import parser, positive, save
from gatdist import pack
from gatdist.bench.rounds import compare, interleave, settled, timed

HEIGHT, WIDTH, SIZE = 320, 400, 256
Encode = Callable[[Image.Image], object]


def write_sources(folder: Path, count: int) -> list[Path]:
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
    """Pack as in webdataset's manual."""
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
    """Return functions that pack into a folder; ``x, gatdist`` is compared with other ``x, …``."""

    def gatdist(**options: object) -> Callable[[Path], None]:
        return lambda dest: pack(str(source), str(dest), workers=1, **options) and None

    def theirs(component: str, encode: Encode | None) -> Callable[[Path], None]:
        return lambda dest: shard_writer(paths, dest, component, encode)

    return {
        "png, gatdist": gatdist(size=SIZE),
        "png, webdataset": theirs("png", lambda image: image),
        "png, webdataset tuned": theirs("png", tuned_png),
        "jpeg, gatdist": gatdist(size=SIZE, format="jpeg"),
        "jpeg, webdataset": theirs("jpg", jpeg),
        "copy, gatdist": gatdist(),
        "copy, webdataset": theirs("jpg", None),
    }


def main() -> None:
    arguments = parser("packing", __doc__)
    arguments.add_argument("--images", type=positive, default=300)
    arguments.add_argument("--rounds", type=positive, default=5)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_sources(folder / "in", given.images)
        found = cases(folder / "in", paths)
        turns = iter(range(10**6))

        def turn(case: str) -> float:
            return timed(partial(found[case], folder / f"out{next(turns)}")).wall

        with settled():
            seconds = interleave(list(found), given.rounds, turn, print)
    rows = []
    for case, taken in seconds.items():
        rows.append({"name": case, "samples_per_s": len(paths) / median(taken), "seconds": taken})
        print(f"{case:<24}{rows[-1]['samples_per_s']:8.1f} images/s")
        aim, _, who = case.partition(", ")
        if who != "gatdist":
            ratio = compare(seconds[f"{aim}, gatdist"], taken)
            rows[-1]["gatdist_to_this"] = ratio._asdict()
            print(f"{'':24}gatdist: {ratio.median:.2f} × ({ratio.low:.2f} to {ratio.high:.2f})")
    save(given.out, {"pictures": len(paths), "cases": rows})


if __name__ == "__main__":
    main()

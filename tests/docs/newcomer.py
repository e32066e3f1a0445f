"""Small versions of the files that documents expect: data of every kind, and a run."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import conditional_runs
import gatdist
import small_runs
from gatdist.config import Config, load_config
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png

# Settings before those of a document, which may override them …
SMALL_NETWORKS = (
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
)
OF_PRESETS = {
    "prompts-vocos": ("model.generator.width=8", "model.discriminator.period_width=2"),
    "emoji-pix2pix": ("model.generator.width=4", "model.discriminator.width=4"),
}
# … and settings after them. Up to four workers can divide a batch.
FEW_SAMPLES = (
    "run.total_samples=64",
    "run.global_batch=16",
    "run.log_every_samples=32",
    "run.checkpoint_every_samples=32",
    "evaluate.num_samples=64",
    "evaluate.every_samples=0",
)
# For data other than digits, whose classifier is trained only once.
CHEAP_FEATURES = ("evaluate.features=points", 'evaluate.metrics=["swd"]')


def small(arguments: list[str]) -> list[str]:
    """Change the arguments of a gatdist command so that it takes a second and one process."""

    def sets(settings: tuple[str, ...]) -> list[str]:
        return [word for setting in settings for word in ("--set", setting)]

    command, *rest = arguments
    if command == "train" and rest[0].endswith(".toml") and "--dry-run" in rest:
        return arguments  # the file is used as it is
    if command == "train":
        if not {"--local", "--workers", "--address", "--dry-run"} & {*rest}:
            rest.append("--local")
        is_own = rest[0].endswith(".toml")
        cheap = CHEAP_FEATURES if is_own else ()
        has_own_networks = is_own and "plugins" in tomllib.loads(Path(rest[0]).read_text())
        networks = () if has_own_networks else OF_PRESETS.get(rest[0], SMALL_NETWORKS)
        if "--profile" in rest:  # not for a run that is complete
            rest[rest.index("--profile") + 1] = "steps=1:3"
            rest += ["--run-dir", "runs/profiled"]
        if rest[0] in OF_PRESETS:
            cheap = ("evaluate.num_samples=2", "data.held_out=0.5")
        return [command, rest[0], *sets(networks), *rest[1:], *sets((*FEW_SAMPLES, *cheap))]
    if command == "sample":
        return [*arguments, "--num", "3" if "--interpolate" in rest else "12", "--workers", "1"]
    if command in ("pack", "index", "verify"):
        return [*arguments, "--workers", "1"]
    return arguments


def load_small_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Replace ``gatdist.load_config`` for the Python blocks of a document."""
    return load_config(source, [*SMALL_NETWORKS, *overrides, *FEW_SAMPLES])


def train_in_this_process(config: Config, run_dir: str, **options: Any) -> dict[str, Any]:
    """Replace ``gatdist.train`` for the Python blocks of a document.

    ``test_readme_code_trains_two_workers`` starts real workers.
    """
    from gatdist.api import train

    cluster = config.cluster.model_copy(update={"workers": 1})
    return train(config.model_copy(update={"cluster": cluster}), run_dir, local=True)


def write_reader_files(folder: Path) -> None:
    """Write the files that the documents expect."""
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (folder / "photos" / kind).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / kind / f"{i}.png")
    _table(folder / "train.parquet", folder / "photos")
    _shards(folder / "bucket" / "shards", folder / "photos")
    _pairs(folder, rng)
    (folder / "speech").mkdir()
    for i in range(4):
        wave = np.float32(rng.uniform(-0.5, 0.5, (1, 20_000)))
        (folder / "speech" / f"{i}.wav").write_bytes(encode_wav(wave, 16_000))
    shutil.copytree(folder / "speech", folder / "recordings")
    (folder / "drawings").mkdir()
    for i in range(4):
        (folder / "drawings" / f"{i}.png").write_bytes(encode_png(conditional_runs.image(i)))
    (folder / "lines.txt").write_text("".join(f"{line}\n" for line in small_runs.LINES))
    preset = Path(gatdist.__file__).parent / "config" / "presets" / "digits.toml"
    (folder / "my.toml").write_text(preset.read_text())


def _table(path: Path, photos: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    files = sorted(photos.glob("*/*.png"))[:8]
    columns = {"image": [f.read_bytes() for f in files], "label": [f.parent.name for f in files]}
    parquet.write_table(pyarrow.table(columns), path)


def _shards(folder: Path, photos: Path) -> None:
    """Write WebDataset shards of images and JSON, as img2dataset does."""
    for shard in range(2):
        files = {
            f"{i:06d}.{ending}": content
            for i, path in enumerate(sorted(photos.glob("*/*.png"))[shard::2])
            for ending, content in (
                ("png", path.read_bytes()),
                ("json", json.dumps({"kind": path.parent.name}).encode()),
            )
        }
        _tar(folder / f"{shard:05d}.tar", files)


def _pairs(folder: Path, rng: np.random.Generator) -> None:
    """Write pairs of images in the layouts of the documents."""
    suffixes, shard = {}, {}
    for field in ("photo", "edges"):
        (folder / "pairs" / field).mkdir(parents=True)
        for i in range(4):
            path = folder / "pairs" / field / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
            suffixes[f"{i}_{field}.png"] = shard[f"{i}.{field}.png"] = path.read_bytes()
    (folder / "suffixes").mkdir()
    for name, content in suffixes.items():
        (folder / "suffixes" / name).write_bytes(content)
    rows = [f"pairs/photo/{i}.png,pairs/edges/{i}.png\n" for i in range(4)]
    (folder / "pairs.csv").write_text("".join(["photo,edges\n", *rows]))
    ordered = dict(sorted(shard.items()))  # the files of a key are adjacent
    for path in (folder / "pairs.tar", folder / "bucket" / "pairs" / "0.tar"):
        _tar(path, ordered)


def _tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

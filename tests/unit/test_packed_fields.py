"""From files to training: pairs for a translation, recordings for a vocoder, by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gatdist.cli import main
from gatdist.common.errors import ConfigError, DataError
from gatdist.config import Config, DataConfig, load_config
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import open_dataset
from gatdist.data.format.shard_files import write_dataset
from gatdist.data.loader import Batch
from gatdist.storage import Store
from gatdist.training.copies import Copies
from gatdist.training.plan import check
from gatdist.training.step import to_device
from packing import image, pack, write
from support import refused

SHORT = [
    *("run.total_samples=16", "run.global_batch=4", "run.log_every_samples=8"),
    *("evaluate.metrics=[]", "game.penalties={}", "game.loss=least_squares"),
]
TRANSLATION = [
    'game.task={name="translation"}',
    'model.generator={name="unet", width=4, norm="instance"}',
    'model.discriminator={name="patchgan", width=4, layers=1, norm="instance"}',
    "game.terms={l1={weight=100.0}}",
]
VOCODER = [
    'game.task={name="vocoder", crop=512, hop=16, window=64, bands=12, highest=3000.0}',
    'model.generator={name="hifigan", version="v3", upsampling=[4, 4], width=8}',
    'model.discriminator={name="hifigan", periods=[2, 3], scales=2, period_width=2, '
    "scale_width=16}",
    "game.terms={log_mel={weight=45.0, hop=16, window=64, bands=12}}",
]


def trained(folder: Path, data: Path, given: list[str], capsys: Any) -> dict[str, Any]:
    capsys.readouterr()
    command = ["train", "digits", "--local", "--json", "--run-dir", str(folder / "run")]
    for setting in (f"data.url='{data}'", *SHORT, *given):
        command += ["--set", setting]
    assert main(command) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_pairs_train_a_translation(tmp_path: Path, capsys: Any) -> None:
    files = {f"photos/{i}.png": image(i, (40, 48)) for i in range(12)}
    files |= {f"edges/{i}.jpg": image(i, (40, 48), "JPEG") for i in range(12)}
    source, data = write(tmp_path / "source", files), tmp_path / "data"
    fields = ["--field", "target=photos", "--field", "input=edges"]
    assert main(["pack", str(source), str(data), "--size", "32", *fields]) == 0
    assert trained(tmp_path, data, TRANSLATION, capsys)["samples_seen"] == 16


def test_recordings_train_a_vocoder(tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(0)
    files = {
        f"{i}.wav": encode_wav(np.float32(rng.uniform(-0.5, 0.5, (1, 1500 + 900 * i))), 8000)
        for i in range(4)
    }
    source, data = write(tmp_path / "source", files), tmp_path / "data"
    options = ["--clip-length", "1024", "--clip-overlap", "512"]
    assert main(["pack", str(source), str(data), *options]) == 0
    assert trained(tmp_path, data, VOCODER, capsys)["samples_seen"] == 16


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 10, 3), np.uint8)


def pairs(folder: Path, sizes: tuple[int | None, int | None] = (6, 10)) -> None:
    """Write samples whose fields are equal, of which the manifest states these sizes."""
    files = [encode_png(pixels) for pixels in PIXELS]
    samples = [(f"{i}", {"target.png": f, "input.png": f}) for i, f in enumerate(files)]
    field = {"modality": "image", "sample_shape": [3, *sizes], "component": "input.png"}
    write_dataset(
        Store(str(folder)),
        [samples],
        modality="image",
        sample_shape=[3, *sizes],
        component="target.png",
        fields={"input": field},
    )


def batch_of(config: Config, count: int) -> Any:
    dataset = open_dataset(config.data)
    records, _ = dataset.read(np.arange(count))
    loaded = Batch(torch.from_numpy(records), None, torch.arange(count))
    copies = Copies(torch.device("cpu"))
    return to_device(loaded, dataset.sample_format, config, copies, step=0, noise=0)


def test_all_images_of_a_sample_are_mirrored_alike(tmp_path: Path) -> None:
    pairs(tmp_path)
    config = load_config("digits", [f"data.url='{tmp_path}'", "data.x_flip=true"])
    batch = batch_of(config, len(PIXELS))
    assert torch.equal(batch.real, batch.inputs["input"])
    unchanged = [np.array_equal(a, b) for a, b in zip(batch.real, plain(), strict=True)]
    assert 0 < sum(unchanged) < len(PIXELS)


def plain() -> Tensor:
    return torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("sizes", [(6, 10), (None, None)])
def test_all_images_of_a_sample_are_resized_alike(
    sizes: tuple[int | None, int | None], tmp_path: Path
) -> None:
    pairs(tmp_path, sizes)
    config = load_config("digits", [f"data.url='{tmp_path}'", "data.resolution=4"])
    batch = batch_of(config, len(PIXELS))
    assert batch.inputs["input"].shape == (8, 3, 4, 4)
    assert torch.equal(batch.real, batch.inputs["input"])


def test_images_that_differ_in_size_need_a_resolution(tmp_path: Path) -> None:
    pairs(tmp_path, (None, None))
    with refused(DataError, "data.resolution"):
        open_dataset(DataConfig(url=str(tmp_path)))


def test_channels_do_not_apply_to_several_fields(tmp_path: Path) -> None:
    pairs(tmp_path)
    with refused(DataError, "data.channels"):
        open_dataset(DataConfig(url=str(tmp_path), channels=1))


def test_the_generated_field_is_not_one_of_the_further_fields(tmp_path: Path) -> None:
    clip = encode_wav(np.zeros((1, 1024), np.float32), 8000)
    files = {f"{kind}/{i}.wav": clip for kind in ("clean", "noisy") for i in range(4)}
    fields = {"target": "clean", "wave": "noisy"}  # the vocoder generates ``wave``
    pack(write(tmp_path / "source", files), tmp_path / "data", fields=fields)
    overrides = [f"data.url='{tmp_path / 'data'}'", *SHORT, *VOCODER]
    with refused(ConfigError, "game.task"):
        check(load_config("digits", overrides), str(tmp_path / "run"))

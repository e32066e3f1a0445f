"""Samples with several fields: shards, reading, and the batches of a step."""

import numpy as np
import pytest
import torch

from gatdist.common.errors import DataError
from gatdist.config import load_config
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import open_dataset
from gatdist.data.format.shard_files import write_dataset
from gatdist.data.loader import Loader
from gatdist.data.order import SampleOrder
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.storage import Store
from gatdist.training.copies import Copies
from gatdist.training.step import to_device

COUNT = 23
rng = np.random.default_rng(0)
TARGETS = rng.integers(0, 256, (COUNT, 6, 5, 3), np.uint8)
INPUTS = rng.integers(0, 256, (COUNT, 3, 4, 1), np.uint8)
WAVES = (rng.integers(-32768, 32768, (COUNT, 1, 7)) / 32768).astype(np.float32)
FIELDS = {
    "input": {"modality": "image", "sample_shape": [1, 3, 4], "component": "input.png"},
    "wave": {
        "modality": "audio",
        "sample_shape": [1, 7],
        "component": "wave.wav",
        "sample_rate": 8000,
    },
}


def files(i, *without):
    found = {
        "target.png": encode_png(TARGETS[i]),
        "input.png": encode_png(INPUTS[i]),
        "wave.wav": encode_wav(WAVES[i], 8000),
        "cls": str(i % 3).encode(),
    }
    return {name: content for name, content in found.items() if name not in without}


def write(folder, samples):
    shards = [samples[:10], samples[10:]]
    write_dataset(
        Store(str(folder)),
        shards,
        modality="image",
        sample_shape=[3, 6, 5],
        component="target.png",
        num_classes=3,
        fields=FIELDS,
    )
    return load_config("digits", [f"data.url='{folder}'", "run.global_batch=4"])


@pytest.fixture
def config(tmp_path):
    return write(tmp_path / "data", [(f"{i:04d}", files(i)) for i in range(COUNT)])


@pytest.mark.parametrize("is_decoded", [True, False])
def test_batches_hold_the_fields_of_the_same_samples(config, is_decoded, monkeypatch):
    if not is_decoded:
        monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", 0)
    dataset = open_dataset(config.data)
    assert dataset.is_decoded == is_decoded
    order = SampleOrder.from_config(config, dataset.layout)
    comm = LocalCommunicator(torch.device("cpu"))
    with Loader.for_worker(dataset, order, config, comm, position=0) as loader:
        for step in range(8):
            loaded = next(loader)
            batch = to_device(
                loaded, dataset.sample_format, config, Copies(comm.device), step=step, noise=0
            )
            numbers = order.indices(loaded.positions.numpy())
            levels = torch.from_numpy(TARGETS[numbers]).permute(0, 3, 1, 2)
            assert torch.equal(batch.real, levels.float() / 127.5 - 1)
            levels = torch.from_numpy(INPUTS[numbers]).permute(0, 3, 1, 2)
            assert torch.equal(batch.inputs["input"], levels.float() / 127.5 - 1)
            assert torch.equal(batch.inputs["wave"], torch.from_numpy(WAVES[numbers]))
            assert loaded.labels.tolist() == [n % 3 for n in numbers]
            (part, other) = batch.consecutive(2)
            assert torch.equal(part.inputs["wave"], batch.inputs["wave"][:2])
            assert torch.equal(other.inputs["input"], batch.inputs["input"][2:])


def test_a_sample_without_a_field_is_named(tmp_path):
    without = ["wave.wav"]
    samples = [(f"{i:04d}", files(i, *without * (i == 12))) for i in range(COUNT)]
    config = write(tmp_path / "data", samples)
    dataset = open_dataset(config.data)
    with pytest.raises(DataError) as caught:
        dataset.read(np.arange(COUNT))
    assert "0012" in str(caught.value)


def test_a_damaged_field_is_named(tmp_path):
    samples = [(f"{i:04d}", files(i)) for i in range(COUNT)]
    samples[3][1]["input.png"] = b"not an image"
    config = write(tmp_path / "data", samples)
    with pytest.raises(DataError) as caught:
        open_dataset(config.data).read(np.arange(COUNT))
    assert "0003.input.png" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": FIELDS["input"] | {"component": "target.png"}},
        {"input": {"modality": "image", "sample_shape": [1, 3, 4]}},
        {"input": FIELDS["input"] | {"sample_shape": [2, 3, 4]}},
        {"In-put": FIELDS["input"]},
    ],
)
def test_fields_that_do_not_fit_are_refused(tmp_path, fields):
    with pytest.raises(ValueError, match=r"fields|component|sample_shape"):
        write_dataset(
            Store(str(tmp_path)),
            [[("0", files(0))]],
            modality="image",
            sample_shape=[3, 6, 5],
            component="target.png",
            fields=fields,
        )

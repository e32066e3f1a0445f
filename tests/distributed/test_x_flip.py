"""Mirrored images: the choice is a function of the position, and the result of the workers."""

import numpy as np
import pytest
import torch

from fake_communicator import FakeCommunicator
from gatdist.common.errors import DataError
from gatdist.config import DataConfig, load_config
from gatdist.data.dataset import open_dataset
from gatdist.data.loader import Loader
from gatdist.data.order import SampleOrder
from gatdist.parallel import draws
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.checkpoints import Checkpoints
from gatdist.storage import Store
from gatdist.training.copies import Copies
from gatdist.training.loop import run
from gatdist.training.step import to_device
from small_runs import write_clips, write_texts
from support import refused, spawn

CPU = torch.device("cpu")
LOCAL = LocalCommunicator(CPU)
BATCH, STEPS = 48, 5


def configured(*overrides, preset="digits"):
    return load_config(preset, [f"run.global_batch={BATCH}", "data.x_flip=true", *overrides])


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(configured().data, LOCAL)


def shown(dataset, config, workers=1, noise=0):
    """Real samples as the discriminator sees them, by position."""
    found = {}
    order, copies = SampleOrder.from_config(config, dataset.layout), Copies(CPU)
    for rank in range(workers):
        comm = FakeCommunicator(rank=rank, world_size=workers)
        with Loader.for_worker(dataset, order, config, comm, position=BATCH) as batches:
            for step in range(STEPS):
                batch = to_device(
                    next(batches), dataset.sample_format, config, copies, step=step, noise=noise
                )
                found |= dict(zip(batch.positions.tolist(), batch.real, strict=True))
    assert sorted(found) == list(range(BATCH, BATCH * (STEPS + 1)))
    return torch.stack([found[position] for position in sorted(found)])


def test_images_are_those_of_the_data_set_or_flipped_by_numpy(dataset):
    config = configured("run.seed=3")
    found = shown(dataset, config)
    positions = np.arange(BATCH, BATCH * (STEPS + 1))
    samples, _ = dataset.read(SampleOrder.from_config(config, dataset.layout).indices(positions))
    coin = draws.bits(3, "x_flip", torch.from_numpy(positions), 1)[:, 0].numpy() >= 2**31
    expected = np.where(coin[:, None, None, None], np.flip(samples, 2), samples)
    expected = dataset.sample_format.to_network(torch.from_numpy(expected))
    assert torch.equal(found, expected)
    assert 0.4 < coin.mean() < 0.6


@pytest.mark.parametrize("workers", [2, 4])
def test_flips_do_not_depend_on_the_number_of_workers(dataset, workers):
    config = configured()
    assert torch.equal(shown(dataset, config, workers), shown(dataset, config))


def test_flips_depend_on_the_noise_stream(dataset):
    config = configured()
    plain = shown(dataset, configured("data.x_flip=false"))
    mirrored = shown(dataset, config)
    other = shown(dataset, config, noise=1)
    flipped, flipped_other = ((each != plain).flatten(1).any(1) for each in (mirrored, other))
    assert 0.35 < (flipped != flipped_other).double().mean() < 0.65


def test_labels_and_layout_are_unchanged(dataset):
    config = configured("model.conditional=true", "precision.channels_last=true")
    order = SampleOrder.from_config(config, dataset.layout)
    with Loader.for_worker(dataset, order, config, LOCAL, position=0) as batches:
        loaded = next(batches)
        batch = to_device(loaded, dataset.sample_format, config, Copies(CPU), step=0, noise=0)
    assert torch.equal(batch.labels, loaded.labels)
    assert batch.real.is_contiguous(memory_format=torch.channels_last)


WHOLE = [
    "run.total_samples=192",
    "run.log_every_samples=96",
    "run.reduction=canonical",
    "run.virtual_workers=4",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    "evaluate.metrics=[]",
]


def train(comm, overrides, folder):
    return run(configured(*WHOLE, *overrides), comm, Store(folder))


def digest_of(folder):
    return Checkpoints(Store(f"{folder}/checkpoints")).newest().digest()


def test_whole_runs_end_in_the_same_bits_on_1_2_and_4_workers(tmp_path):
    train(LOCAL, [], f"{tmp_path}/1")
    for workers in (2, 4):
        spawn(workers, train, [], f"{tmp_path}/{workers}", timeout_s=300)
        assert digest_of(f"{tmp_path}/{workers}") == digest_of(f"{tmp_path}/1")
    train(LOCAL, ["data.x_flip=false"], f"{tmp_path}/plain")
    assert digest_of(f"{tmp_path}/plain") != digest_of(f"{tmp_path}/1")


def test_points_are_rejected():
    with refused(DataError, "data.x_flip"):
        open_dataset(configured(preset="ring").data, LOCAL)


@pytest.mark.parametrize("write", [write_clips, write_texts])
def test_audio_and_text_are_rejected(write, tmp_path):
    write(tmp_path)
    with refused(DataError, "data.x_flip"):
        open_dataset(DataConfig(url=str(tmp_path), x_flip=True), LOCAL)


def test_x_flip_affects_the_result():
    assert configured().digest() != configured("data.x_flip=false").digest()

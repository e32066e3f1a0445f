"""Unpaired domains: each has its own order, and results do not depend on workers or resumes."""

import json

import numpy as np
import pytest
import torch

from fake_communicator import FakeCommunicator
from gatdist.common.errors import CheckpointError, ConfigError, DataError
from gatdist.config import load_config
from gatdist.data.codecs.images import encode_png
from gatdist.data.dataset import open_dataset
from gatdist.data.format.shard_files import write_dataset
from gatdist.data.joined import open_loader
from gatdist.data.unpaired import orders_of
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.checkpoints import Checkpoints
from gatdist.runs.directory import adopted
from gatdist.storage import Store
from gatdist.training.copies import Copies
from gatdist.training.loop import run
from gatdist.training.plan import check
from gatdist.training.step import to_device
from support import refused, spawn

CPU = torch.device("cpu")
LOCAL = LocalCommunicator(CPU)
BATCH, SIDE = 12, 16
COUNTS = {"a": 31, "b": 23}
PIXELS = {
    name: np.random.default_rng(i).integers(0, 256, (count, SIDE, SIDE, 3 - 2 * i), np.uint8)
    for i, (name, count) in enumerate(COUNTS.items())
}


def write(folder, pixels, **spec):
    samples = [(f"{i:04d}", {"png": encode_png(each)}) for i, each in enumerate(pixels)]
    shape = [pixels.shape[3], *pixels.shape[1:3]]
    write_dataset(
        Store(str(folder)), [samples[:10], samples[10:]], modality="image", sample_shape=shape
    )


@pytest.fixture
def data(tmp_path):
    for name, pixels in PIXELS.items():
        write(tmp_path / name, pixels)
    return tmp_path


def configured(data, *overrides):
    return load_config(
        "digits",
        [
            f"data.url='{data}/a'",
            f"data.unpaired.input.url='{data}/b'",
            f"run.global_batch={BATCH}",
            *("run.reduction=canonical", "run.virtual_workers=4", "run.log_every_samples=48"),
            *('game.task={name="translation"}', "game.loss=least_squares", "game.penalties={}"),
            'model.generator={name="unet", width=4, norm="instance"}',
            'model.discriminator={name="patchgan", width=4, layers=1, norm="instance"}',
            "evaluate.metrics=[]",
            *overrides,
        ],
    )


def levels(name, numbers):
    return torch.from_numpy(PIXELS[name][numbers]).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("is_decoded", [True, False])
def test_each_domain_has_its_own_order(data, workers, is_decoded, monkeypatch):
    if not is_decoded:
        monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", 0)
    config = configured(data, "run.reduction=fast")
    dataset = open_dataset(config.data)
    orders = orders_of(config, dataset)
    assert dataset.own.is_decoded == is_decoded
    positions = []
    for rank in range(workers):
        comm = FakeCommunicator(rank=rank, world_size=workers)
        with open_loader(dataset, orders, config, comm, position=BATCH) as batches:
            for step in range(6):
                loaded = next(batches)
                batch = to_device(
                    loaded, dataset.sample_format, config, Copies(CPU), step=step, noise=0
                )
                places = batch.positions.numpy()
                assert torch.equal(batch.real, levels("a", orders[""].indices(places)))
                other = orders["input"].indices(places)
                assert torch.equal(batch.inputs["input"], levels("b", other))
                positions += places.tolist()
            assert batches.take_counts()["data/ready_batches"] >= 0
    assert sorted(positions) == list(range(BATCH, 7 * BATCH))


def test_every_sample_of_a_domain_is_shown_once_per_epoch_of_its_own(data):
    config = configured(data)
    order = orders_of(config, open_dataset(config.data))["input"]
    for epoch in range(3):
        shown = order.indices(np.arange(23) + 23 * epoch)
        assert sorted(shown) == list(range(23))


def test_domains_of_one_data_set_have_different_orders(data):
    config = configured(data, f"data.unpaired.input.url='{data}/a'")
    orders = orders_of(config, open_dataset(config.data))
    own, other = (order.indices(np.arange(31)) for order in orders.values())
    assert (own == other).mean() < 0.5


def test_samples_are_read_by_number(data):
    dataset = open_dataset(configured(data).data)
    records, labels = dataset.read(np.array([30, 2]))
    assert labels is None
    form = dataset.sample_format
    assert torch.equal(form.to_network(torch.from_numpy(records)), levels("a", [30, 2]))
    assert torch.equal(form.inputs(torch.from_numpy(records))["input"], levels("b", [7, 2]))


def train(comm, data, samples, folder, overrides=()):
    config = configured(data, f"run.total_samples={samples}", *overrides)
    return run(config, comm, Store(folder))


def digest_of(folder):
    return Checkpoints(Store(f"{folder}/checkpoints")).newest().digest()


def test_runs_end_in_the_same_bits_on_any_workers_and_after_a_resume(data, tmp_path):
    train(LOCAL, data, 96, f"{tmp_path}/1")
    train(LOCAL, data, 48, f"{tmp_path}/2")
    spawn(2, train, data, 96, f"{tmp_path}/2", timeout_s=300)
    assert digest_of(f"{tmp_path}/2") == digest_of(f"{tmp_path}/1")


def test_a_run_is_not_resumed_with_another_domain(data, tmp_path):
    train(LOCAL, data, 48, f"{tmp_path}/run")
    write(tmp_path / "c", PIXELS["b"][::-1])
    with refused(CheckpointError, "unpaired.input.fingerprint"):
        train(LOCAL, data, 96, f"{tmp_path}/run", [f"data.unpaired.input.url='{tmp_path}/c'"])
    with refused(ConfigError, "data.unpaired.input.resolution"):
        train(LOCAL, data, 96, f"{tmp_path}/run", ["data.unpaired.input.resolution=16"])


def test_held_out_samples_are_held_out_in_each_domain(data):
    config = configured(data, "data.held_out=0.3")
    training = open_dataset(config.data)
    validation = training.held_out()
    for name in ("a", "b"):
        part = "" if name == "a" else "input"
        counts = training.datasets[part].num_samples, validation.datasets[part].num_samples
        assert sum(counts) == COUNTS[name]
        assert min(counts) > 0
    assert validation.read(np.arange(3))[0].shape == training.read(np.arange(3))[0].shape


def test_preflight_checks_the_memory_of_all_domains(data, tmp_path, monkeypatch):
    monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", 0)
    check(configured(data), str(tmp_path / "run"))
    with refused(ConfigError, "data.memory_bytes"):
        check(configured(data, "data.memory_bytes=20000"), str(tmp_path / "run"))


def test_images_of_a_domain_are_resized(data):
    dataset = open_dataset(configured(data, "data.unpaired.input.resolution=8").data)
    assert dataset.sample_format.shapes_of_fields == {"input": (1, 8, 8)}
    with refused(DataError, "data.unpaired.input.length"):
        open_dataset(configured(data, "data.unpaired.input.length=8").data)


def test_names_that_are_taken_are_refused(data):
    with refused(ConfigError, "data.unpaired.target"):
        open_dataset(configured(data, f"data.unpaired.target.url='{data}/b'").data)
    with pytest.raises(ConfigError):
        configured(data, f"data.unpaired.In-put.url='{data}/b'")


def test_secrets_of_domains_are_masked(data):
    config = configured(data, "data.unpaired.input.storage_options.secret='hidden'")
    assert "hidden" not in json.dumps(config.redacted())


def test_a_run_of_others_may_not_name_domains(data, tmp_path):
    config = configured(data, f"data.url='{tmp_path}/run/data'")
    with pytest.raises(ConfigError) as caught:
        adopted(config, [], Store(str(tmp_path / "run")))
    assert "data.unpaired" in str(caught.value)

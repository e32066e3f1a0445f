"""Dequantization: uniform noise of one level around each pixel, a function of its position."""

import numpy as np
import pytest
import torch

from gatdist.common.errors import DataError
from gatdist.config import load_config
from gatdist.data.dataset import open_dataset
from gatdist.data.loader import Batch as LoadedBatch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.copies import Copies
from gatdist.training.step import to_device
from support import refused

CPU = torch.device("cpu")


def configured(preset="digits", *more):
    return load_config(preset, ["data.dequantize=true", *more])


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(configured().data, LocalCommunicator(CPU))


def shown(dataset, positions, *more, noise=0):
    """Real samples of some positions as the discriminator sees them; sample i is image i."""
    samples, _ = dataset.read(np.array(positions))
    loaded = LoadedBatch(torch.from_numpy(samples), None, torch.tensor(positions))
    made = to_device(
        loaded, dataset.sample_format, configured("digits", *more), Copies(CPU), step=0, noise=noise
    )
    return made.real


def test_noise_is_uniform_within_half_a_level_and_rounding_removes_it(dataset):
    positions = list(range(64))
    noisy, plain = shown(dataset, positions), shown(dataset, positions, "data.dequantize=false")
    levels = ((noisy - plain).double() * 127.5).flatten().sort().values
    assert float(levels.abs().max()) <= 0.5 + 1e-4
    expected = torch.linspace(-0.5, 0.5, len(levels), dtype=torch.float64)
    assert float((levels - expected).abs().max()) < 2.7 / len(levels) ** 0.5
    to_samples = dataset.sample_format.to_samples
    assert torch.equal(to_samples(noisy), to_samples(plain))


def test_noise_is_a_function_of_seed_position_and_noise_stream(dataset):
    whole = shown(dataset, [3, 8, 5, 12])
    assert torch.equal(whole[1::2], shown(dataset, [8, 12]))  # a worker's share
    assert not torch.equal(whole, shown(dataset, [3, 8, 5, 12], "run.seed=1"))
    assert not torch.equal(whole, shown(dataset, [3, 8, 5, 12], noise=1))


def test_sixteen_bits_get_noise_of_their_own_level(dataset):
    fine = dataset.sample_format.spec.model_copy(update={"bits": 16})
    kind = type(dataset.sample_format)
    assert kind(fine).level == pytest.approx(2 / 65535)
    assert dataset.sample_format.level == pytest.approx(2 / 255)


def test_points_have_no_levels():
    with refused(DataError, "data.dequantize"):
        open_dataset(configured("ring").data, LocalCommunicator(CPU))


def test_dequantization_affects_the_result():
    assert configured().digest() != load_config("digits", []).digest()

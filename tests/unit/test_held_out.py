"""Held-out samples: which they are, and that no worker trains on them."""

from itertools import islice

import numpy as np
import pytest

from gatdist.common.errors import ConfigError, UserError
from gatdist.config import load_config
from gatdist.data.codecs.arrays import encode_array
from gatdist.data.codecs.audio import encode_wav
from gatdist.data.dataset import open_dataset
from gatdist.data.format.shard_files import write_dataset
from gatdist.data.loader import Loader
from gatdist.data.order import SampleOrder, WorkerShare
from gatdist.storage import Store
from gatdist.training.plan import check
from support import refused

COUNT, BATCH = 61, 12
CLIPS = [f"r{i:02d}-{j:05d}" for i in range(20) for j in range(3)]


def write_points(folder, sizes):
    """Write points whose values are their numbers, in shards of these sizes."""
    numbers = iter(range(COUNT))
    shards = [
        [(f"k{i:03d}", {"npy": encode_array(np.float32([i, -i]))}) for i in islice(numbers, n)]
        for n in sizes
    ]
    write_dataset(Store(str(folder)), shards, modality="points", sample_shape=[2])
    return str(folder)


def config_of(folder, *more):
    given = [f"data.url='{folder}'", f"run.global_batch={BATCH}", "data.held_out=0.25", *more]
    return load_config("ring", given)


def numbers_of(dataset):
    samples, _ = dataset.read(np.arange(dataset.num_samples))
    return samples[:, 0].astype(int).tolist()


def trained_on(config, workers, batches):
    """Return the numbers of the samples that all workers load, in the order of the run."""
    found = {}
    for rank in range(workers):
        dataset = open_dataset(config.data)
        loader = Loader(
            dataset,
            SampleOrder.from_config(config, dataset.layout),
            WorkerShare(0, BATCH, rank, workers),
            config=config.data,
        )
        with loader:
            for _ in range(batches):
                batch = next(loader)
                values = batch.samples[:, 0].int().tolist()
                found |= dict(zip(batch.positions.tolist(), values, strict=True))
    return [found[position] for position in sorted(found)]


@pytest.mark.parametrize("is_decoded", [True, False])
def test_no_worker_trains_on_held_out_samples(tmp_path, monkeypatch, is_decoded):
    if not is_decoded:
        monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", 0)
    config = config_of(write_points(tmp_path / "data", [20, 1, 1, 39]))
    training = open_dataset(config.data)
    assert training.is_decoded == is_decoded
    held_out, used = numbers_of(training.held_out()), numbers_of(training)
    assert sorted(held_out + used) == list(range(COUNT))
    assert 5 < len(held_out) < 30
    epochs = -(-2 * len(used) // BATCH)
    alone = trained_on(config, 1, epochs)
    assert sorted(alone[: len(used)]) == used  # an epoch shows each once
    for workers in (2, 3):
        assert trained_on(config, workers, epochs) == alone


def test_the_choice_stays_after_packing_again(tmp_path):
    first = open_dataset(config_of(write_points(tmp_path / "a", [20, 1, 1, 39])).data)
    second = open_dataset(config_of(write_points(tmp_path / "b", [30, 31])).data)
    assert numbers_of(first.held_out()) == numbers_of(second.held_out())


def test_a_larger_share_holds_out_the_same_samples_and_more(tmp_path):
    folder = write_points(tmp_path / "a", [COUNT])
    few = open_dataset(config_of(folder).data).held_out()
    many = open_dataset(config_of(folder, "data.held_out=0.6").data).held_out()
    assert set(numbers_of(few)) < set(numbers_of(many))


def test_clips_of_a_recording_stay_together(tmp_path):
    waves = [
        (key, {"wav": encode_wav(np.full((1, 4), i / 128, np.float32), 8000)})
        for i, key in enumerate(CLIPS)
    ]
    write_dataset(
        Store(str(tmp_path)), [waves], modality="audio", sample_shape=[1, 4], sample_rate=8000
    )
    samples, _ = (part := open_dataset(config_of(tmp_path).data).held_out()).read(
        np.arange(part.num_samples)
    )
    numbers = np.round(samples[:, 0, 0] * 128).astype(int)
    counts = np.bincount(numbers // 3, minlength=20)
    assert set(counts.tolist()) == {0, 3}


def test_the_identity_of_a_run_includes_the_share(tmp_path):
    folder = write_points(tmp_path / "a", [COUNT])
    with_share, without = config_of(folder), config_of(folder, "data.held_out=0.0")
    assert with_share.digest() != without.digest()
    prints = {
        open_dataset(with_share.data).fingerprint,
        open_dataset(with_share.data).held_out().fingerprint,
        open_dataset(without.data).fingerprint,
    }
    assert len(prints) == 3
    assert open_dataset(without.data).held_out() is None


@pytest.mark.parametrize("share", [1e-6, 0.999999])
def test_a_share_that_leaves_a_part_empty_is_refused(tmp_path, share):
    config = config_of(write_points(tmp_path / "a", [COUNT]), f"data.held_out={share}")
    with pytest.raises(ConfigError) as caught:
        open_dataset(config.data)
    assert caught.value.subject == "data.held_out"


def test_one_sample_to_evaluate_is_reported_under_the_key_that_chooses_it(tmp_path):
    def refuse(key, folder, *given):
        with refused(UserError, key):
            check(config_of(folder, *given), str(tmp_path / "run"))

    many, one = write_points(tmp_path / "many", [COUNT]), write_points(tmp_path / "one", [1])
    refuse("data.url", one, "data.held_out=0.0")
    refuse("evaluate.url", many, "data.held_out=0.0", f"evaluate.url='{one}'")
    shares = (f"data.held_out={0.25 * 0.95**i}" for i in range(99))
    is_one = (s for s in shares if open_dataset(config_of(many, s).data).num_samples == COUNT - 1)
    refuse("data.held_out", many, next(is_one))


def test_separate_data_and_a_share_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, "evaluate.url='elsewhere'")
    assert caught.value.subject == "evaluate.url"


@pytest.mark.parametrize("is_decoded", [True, False])
@pytest.mark.parametrize("is_cached", [True, False])
def test_remote_samples_are_read_as_local_ones(tmp_path, monkeypatch, is_decoded, is_cached):
    if not is_decoded:
        monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", 0)
    sizes = [20, 1, 1, 39]
    local = open_dataset(config_of(write_points(tmp_path / "data", sizes)).data)
    url = write_points(f"memory://{tmp_path.name}-{is_decoded}-{is_cached}", sizes)
    cache = [f"data.cache_dir='{tmp_path / 'cache'}'"] if is_cached else []
    config = config_of(url, *cache)
    remote = open_dataset(config.data)
    assert remote.is_cached == is_cached
    assert remote.fingerprint == local.fingerprint
    assert numbers_of(remote) == numbers_of(local)
    held_out = remote.held_out()
    assert numbers_of(held_out) == numbers_of(local.held_out())
    assert numbers_of(held_out) == numbers_of(local.held_out())  # again, perhaps from the cache
    used = numbers_of(local)
    epoch = -(-len(used) // BATCH)
    assert sorted(trained_on(config, 1, epoch)[: len(used)]) == used


def test_held_out_samples_are_fetched_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("gatdist.data.dataset._DECODED_BYTES", 0)
    config = config_of(write_points(tmp_path / "a", [COUNT]))
    held_out = open_dataset(config.data).held_out()
    held_out.read(np.arange(held_out.num_samples))
    one = len(encode_array(np.float32([0, 0])))
    assert held_out.bytes_fetched == held_out.num_samples * one

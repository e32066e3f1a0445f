"""The ring of eight Gaussians: every mode is found, and hardly a sample lies in between."""

import pytest

from benchmarks.cases import ring


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_each_seed_finds_all_modes_and_stays_on_them(seed, tmp_path):
    ring.train(str(tmp_path), [f"run.seed={seed}"])
    found = ring.quality(ring.generate(str(tmp_path)))
    assert found["modes"] == 8
    assert found["share_within_3_sigma"] >= 0.95


def test_third_of_the_preset_finds_all_modes(tmp_path):
    length = 153_600
    rates = [f"optim.{p}.learning_rate.samples={length}" for p in ("generator", "discriminator")]
    ring.train(str(tmp_path), [f"run.total_samples={length}", *rates])
    found = ring.quality(ring.generate(str(tmp_path)))
    assert found["modes"] == 8
    assert found["share_within_3_sigma"] >= 0.7

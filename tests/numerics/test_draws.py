"""Draws are a pure function of (seed, stream, position) with the documented distribution."""

import math

import pytest
import torch

from gatdist.parallel import draws

# Known answers that Random123 publishes for philox4x32-10: counter, key, result.
KNOWN = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert draws.philox(torch.tensor(counter)[:, None], key)[:, 0].tolist() == expected


@pytest.mark.parametrize("draw", [draws.normal, draws.uniform])
@pytest.mark.parametrize("size", [1, 3, 8, 65])
def test_draws_of_a_sample_do_not_depend_on_its_batch(draw, size):
    positions = torch.arange(37) + 2**33
    together = draw(3, "latents", positions, (size,))
    assert torch.equal(
        together, torch.cat([draw(3, "latents", p[None], (size,)) for p in positions])
    )
    strided = torch.cat([draw(3, "latents", positions[rank::3], (size,)) for rank in range(3)])
    assert torch.equal(together[torch.cat([torch.arange(37)[r::3] for r in range(3)])], strided)


def test_seed_stream_and_position_each_change_every_number():
    base = draws.normal(1, "latents", torch.arange(64), (16,))
    for other in (
        draws.normal(2, "latents", torch.arange(64), (16,)),
        draws.normal(1 + 2**40, "latents", torch.arange(64), (16,)),
        draws.normal(1, "labels", torch.arange(64), (16,)),
        draws.normal(1, "latents", torch.arange(64) + 64, (16,)),
        draws.normal(1, "latents", torch.arange(64) + 2**32, (16,)),
    ):
        assert (base == other).float().mean() < 0.01


def test_normal_has_the_moments_of_the_standard_normal():
    x = draws.normal(0, "latents", torch.arange(20_000), (25,), torch.float64).flatten()
    n = len(x)
    # Standard errors of the first, second and fourth moment are 1, √2 and √96, over √n.
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs((x**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_numbers_of_one_sample_are_uncorrelated():
    x = draws.normal(0, "latents", torch.arange(20_000), (8,), torch.float64)
    off_diagonal = torch.corrcoef(x.T) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / math.sqrt(20_000)


def test_uniform_fills_the_open_interval():
    x = draws.uniform(0, "u", torch.arange(100_000), (), torch.float64)
    assert 0 < x.min() < 1e-3
    assert 1 - 1e-3 < x.max() < 1
    assert abs(x.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)


def test_integers_are_uniform():
    counts = torch.bincount(draws.integers(0, "labels", torch.arange(100_000), 10), minlength=10)
    chi_squared = ((counts - 10_000) ** 2 / 10_000).sum()
    assert len(counts) == 10
    assert chi_squared < 33.7  # 9 degrees of freedom, p = 1e-4


def test_both_implementations_of_philox_agree():
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**32, (4, 7, 5), generator=generator)
    for key in ((0, 0), (2**32 - 1, 12345)):
        expected = draws.philox(counter, key)
        assert torch.equal(draws._philox_by_torch(counter, key), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_uniform_numbers_are_below_one_in_every_dtype(dtype, monkeypatch):
    highest = torch.full((1, 3), 2**32 - 1)
    monkeypatch.setattr(draws, "bits", lambda *_: highest)
    assert (draws.uniform(0, "x", torch.zeros(1, dtype=torch.int64), (3,), dtype) < 1).all()


EXTREMES = [0, 1, 2**23 - 1, 2**24, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_uniform_numbers_are_rounded_once(dtype, monkeypatch):
    """They equal (word + ½) / 2³² computed in float64, at ties too."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (100_000,), generator=generator)
    ties = torch.arange(2**24, 2**25, 997) * 2**7 + 2**6  # between two numbers of float32
    words = torch.cat([words, ties[:10_000] % 2**32, torch.tensor(EXTREMES)])[None]
    monkeypatch.setattr(draws, "bits", lambda *_: words)
    found = draws.uniform(0, "x", torch.zeros(1, dtype=torch.int64), words.shape[1:], dtype)
    exact = torch.from_numpy((words.numpy().astype("float64") + 0.5) / 2.0**32)
    assert torch.equal(found, exact.to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2))


def test_normal_numbers_of_a_device_equal_those_of_the_cpu_within_rounding(monkeypatch):
    """What other devices compute, without float64."""
    positions = torch.arange(20_000)
    expected = draws.normal(0, "latents", positions, (9,))
    monkeypatch.setattr(draws, "is_readable", lambda _: False)
    seen = []
    uniform = draws.uniform
    monkeypatch.setattr(draws, "uniform", lambda *given: seen.append(given[-1]) or uniform(*given))
    found = draws.normal(0, "latents", positions, (9,))
    # 1 − u is rounded to 2⁻²⁴, and the radius is √(−2 ln u): coarse near 0 only.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    assert (found - expected).abs().mean() < 1e-6
    exact = draws.normal(0, "latents", positions, (9,), torch.float64)
    assert torch.equal(exact.float(), expected)
    assert seen == [torch.float32, torch.float64]

"""Latents drawn ahead equal those drawn step by step."""

import pytest
import torch

from gatdist.game.latents import Latents
from gatdist.parallel import draws


@pytest.mark.parametrize("n", [1, 6, 5000])
def test_latents_are_a_function_of_seed_stream_and_position(n):
    latents = Latents(7, 5, step_samples=4 * n)
    for step in [0, 1, 2, 40, 41, 3, 31, 32, 33]:
        for rank in (1, 3):  # two parts of a step, like virtual workers
            for stream in ("latents", "latents/generator"):
                positions = torch.arange(n) * 4 + rank + 4 * n * step
                expected = draws.normal(7, stream, positions, (5,), torch.float32)
                assert torch.equal(latents(positions, stream, torch.float32), expected)


def test_positions_in_another_order_are_drawn_anew():
    latents = Latents(0, 3, step_samples=4)
    latents(torch.arange(4), "latents", torch.float64)
    mixed = torch.tensor([4, 6, 5, 7])
    expected = draws.normal(0, "latents", mixed, (3,), torch.float64)
    assert torch.equal(latents(mixed, "latents", torch.float64), expected)
    assert torch.equal(Latents(0, 3)(mixed, "latents", torch.float64), expected)


def test_last_result_is_reused_for_the_same_positions_only():
    latents = Latents(3, 4, step_samples=8)
    positions = torch.arange(8)
    first = latents(positions, "latents", torch.float32)
    assert latents(positions, "latents", torch.float32) is first
    assert not torch.equal(latents(positions, "other", torch.float32), first)
    positions += 8  # as in a step that is replayed from a CUDA graph
    expected = draws.normal(3, "latents", torch.arange(8, 16), (4,))
    assert torch.equal(latents(positions, "latents", torch.float32), expected)

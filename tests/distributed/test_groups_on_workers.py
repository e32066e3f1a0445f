"""Groups of samples that a layer couples are the same for every number of workers."""

import pytest
import torch
from test_equality import LOCAL, require_equal, train_steps

from gatdist.models.image.stylegan2 import MinibatchDeviation
from gatdist.parallel.batch import Batch
from gatdist.parallel.reduction import CanonicalReduction, FastReduction
from support import spawn

SHAPE = (1, 8, 16)
STYLES = "style_size=8, mapping_layers=2, style_mixing=0.9"
# A batch of 24 in groups of 2 or 3.
GAMES = {
    group: [
        f'model.generator={{name="stylegan2", capacity=64, max_width=8, {STYLES}}}',
        f'model.discriminator={{name="stylegan2", capacity=64, max_width=8, {deviation}}}',
        "game.penalties={r1={strength=1.0}, path_length={strength=1.0, every_steps=2}}",
        "game.lazy_penalties=separate",
    ]
    for group, deviation in (
        (0, "minibatch_deviation=0"),
        (2, "minibatch_deviation=2"),
        (3, "minibatch_deviation=3"),
    )
}
CANONICAL = ["run.reduction=canonical", "run.virtual_workers=4", "precision.dtype=float32"]
MICRO = [f"optim.{player}.micro_batch=6" for player in ("generator", "discriminator")]


def train_all(comm, cases):
    return [train_steps(comm, overrides, shape=SHAPE) for overrides in cases]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_canonical_runs_with_groups_have_the_same_bits_on_any_number_of_workers(world_size):
    cases = [GAMES[group] + CANONICAL for group in (2, 3)]
    cases.append([*GAMES[3], *CANONICAL, "game.generator_batch=12"])
    expected = train_all(LOCAL, cases)
    for results in spawn(world_size, train_all, cases):
        for (_, found), (_, alone) in zip(results, expected, strict=True):
            assert found.keys() == alone.keys()
            for name, tensor in alone.items():
                assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("world_size", "group"), [(2, 3), (4, 2), (4, 3)])
def test_fast_runs_with_groups_are_equal_within_rounding_also_in_micro_batches(world_size, group):
    overrides = [*GAMES[group], f"game.generator_batch={group * world_size}"]
    (alone,) = train_all(LOCAL, [overrides])
    for results in spawn(world_size, train_all, [overrides, overrides + MICRO]):
        for found in results:
            require_equal(found, alone, 1e-11)


def test_fast_and_canonical_runs_have_the_same_groups():
    fast, canonical = train_all(LOCAL, [GAMES[3], GAMES[3] + CANONICAL[:2]])
    require_equal(canonical, fast, 1e-11)


def test_result_depends_on_the_groups():
    alone, other = train_all(LOCAL, [GAMES[2], GAMES[3]])
    with pytest.raises(AssertionError):
        require_equal(other, alone, 1e-6)


def positions_by_group(parts, group):
    """Positions that the layer couples: those whose maps change with a sample's features."""
    found = set()
    layer = MinibatchDeviation(group)
    for part in parts:
        for i in range(len(part)):
            x = torch.zeros(len(part), 1, 1, 1)
            x[i] = 1
            coupled = layer(x)[:, 1, 0, 0] > 0.01
            found.add(frozenset(part.positions[coupled].tolist()))
    return found


def test_a_position_is_in_the_same_group_for_every_split_that_keeps_groups_whole():
    batch, group = 48, 4
    expected = {frozenset(range(k, 48, 12)) for k in range(12)}
    for workers in (1, 2, 3, 4, 6, 12):
        for micro_batch in (None, 4, 8, 12):
            found = set()
            for rank in range(workers):
                positions = torch.arange(rank, batch, workers)
                mine = Batch(torch.zeros(len(positions), 1), None, positions, 0, batch)
                split = FastReduction(LOCAL).split(mine, micro_batch)
                if any(len(part) % group for part in split):
                    break
                found |= positions_by_group(split, group)
            else:
                assert found == expected, (workers, micro_batch)
    everything = Batch(torch.zeros(batch, 1), None, torch.arange(batch), 0, batch)
    assert (
        positions_by_group(CanonicalReduction(LOCAL, 4).split(everything, None), group) == expected
    )

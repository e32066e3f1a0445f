"""What the workers of a new epoch agree on, and what they must have in common."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gatdist.common.errors import ConfigError, WorkerLostError
from gatdist.config import load_config
from gatdist.data.dataset import open_dataset
from gatdist.data.unpaired import orders_of
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.members import Members, Membership
from gatdist.training.epochs import Epochs, Standing, agree
from gatdist.training.ledger import Ledger
from gatdist.training.progress import Progress
from gatdist.training.state import TrainState
from support import refused

CPU = torch.device("cpu")


class Says(LocalCommunicator):
    """Several workers that are where ``reached`` says."""

    def __init__(self, *reached):
        super().__init__(CPU)
        self._reached = reached

    def all_gather_object(self, value):
        undid = value[3]
        return [[list(each), {}, rank == 0, undid] for rank, each in enumerate(self._reached)]


@pytest.mark.parametrize(
    ("reached", "sources", "is_written"),
    [
        ([(32, 32), (32, 32)], (0, 1), True),
        ([(32, 32), (48, 48), (48, 48)], (1, 2), False),
        ([(32, 16), (32, 16)], (0,), True),
        ([(32, 16), (32, 32)], (1,), False),
        ([(32, 16), (-1, -1)], (0,), True),
    ],
)
def test_workers_whose_states_may_differ_are_no_sources(reached, sources, is_written):
    """What follows a step may have changed the state of some of them."""
    found = agree(Says(*reached), Standing(reached[0], {}, True), dict)
    assert found.sources == sources
    assert found.is_written == is_written


@pytest.mark.parametrize(
    ("reached", "steps_undone"), [([(32, 32), (32, 32)], 1), ([(32, 32), (48, 48)], 0)]
)
def test_a_step_that_another_worker_has_completed_is_not_repeated(reached, steps_undone):
    workers = [Standing(each, {}, False, undid=each == (32, 32)) for each in reached]
    agreement = agree(Says(*reached), workers[0], dict)
    agreement = replace(agreement, workers=tuple(workers))
    assert agreement.steps_undone == steps_undone


class Nobody(Membership):
    def next(self):
        raise AssertionError

    def is_due(self):
        return False


def test_one_worker_that_may_become_several_has_the_networks_of_several():
    networks = nn.Linear(8, 2), nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    members = Members(LocalCommunicator(CPU), Nobody(), CPU)
    config = load_config("ring", ["game.penalties={}", "evaluate.metrics=[]"])
    with refused(ConfigError, "model.discriminator.name"):
        TrainState(config, members, (2,), 0, networks=networks, traits={})


class JoinsAgain(Nobody):
    joins = True

    def next(self):
        return LocalCommunicator(CPU)


@pytest.fixture
def config():
    return load_config("ring", ["run.global_batch=8", "run.total_samples=8000"])


@pytest.fixture
def dataset(config):
    return open_dataset(config.data, LocalCommunicator(CPU))


def test_a_worker_that_missed_steps_does_not_hold_the_state(config, dataset):
    """It may have seen more samples than the others, if they have gone back to a checkpoint."""
    members = Members(LocalCommunicator(CPU), JoinsAgain(), CPU)
    state = TrainState(config, members, (2,), 0)
    state.rule(config)
    ledger = Ledger(config, state, dataset, orders_of(config, dataset))
    epochs = Epochs(members, state, ledger, {}, Progress())
    assert epochs.is_whole
    with pytest.raises(WorkerLostError, match="no worker is left"):
        epochs.begin()


def test_rows_that_were_logged_before_a_rollback_count_as_logged(config, dataset):
    state = TrainState(config, LocalCommunicator(CPU), (2,), 0)
    ledger = Ledger(config, state, dataset, orders_of(config, dataset))
    state.samples_seen = 32
    saved = ledger.state() | {"attempt": 3}
    ledger.rows.extend({"samples_seen": seen} for seen in (16, 32, 48))
    ledger.load(saved)
    assert [row["samples_seen"] for row in ledger.rows] == [16, 32]


def test_workers_that_join_know_which_checkpoint_is_evaluated(config, dataset):
    state = TrainState(config, LocalCommunicator(CPU), (2,), 0)
    first, joins = (Ledger(config, state, dataset, orders_of(config, dataset)) for _ in range(2))
    first.evaluated_attempt = 3
    joins.take_over(first.handover(), 0)
    joins.note_evaluation({}, "running", "")
    assert joins.evaluated[0]["attempt"] == 3

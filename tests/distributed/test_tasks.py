"""Games with inputs, maps of logits and terms do not depend on the number of workers."""

import pytest
import torch

from conditional_games import REUSED, SMALL, SMALL_BATCHES, TRANSLATION, VOCODER, train
from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from support import spawn

CASES = {
    "alternating": TRANSLATION,
    "reused": [*TRANSLATION, *REUSED],
    "simultaneous": [*TRANSLATION, "game.update_rule=simultaneous"],
    "extragradient": [*TRANSLATION, "game.update_rule=extragradient"],
    "consensus": [
        *TRANSLATION,
        "game.update_rule=consensus",
        "game.rule_options={strength=0.1}",
    ],
    "micro_batches": [*TRANSLATION, *SMALL_BATCHES],
    "r1": [*TRANSLATION, "game.penalties={r1={strength=1.0, every_steps=2}}"],
    "vocoder": [*VOCODER, *REUSED],
    "vocoder, simultaneous": [*VOCODER, "game.update_rule=simultaneous"],
    "vocoder, micro_batches": [*VOCODER, *SMALL_BATCHES],
}


def train_steps(comm, overrides):
    return train(comm, load_config("digits", [*SMALL, *overrides]))


def train_all(comm, cases):
    return [train_steps(comm, overrides) for overrides in cases]


@pytest.fixture(scope="module")
def alone():
    return dict(
        zip(CASES, train_all(LocalCommunicator(torch.device("cpu")), CASES.values()), strict=True)
    )


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_workers_gives_what_one_gives(workers, alone):
    for rank in spawn(workers, train_all, list(CASES.values())):
        for (name, expected), found in zip(alone.items(), rank, strict=True):
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(
                    found[key],
                    tensor,
                    rtol=1e-11,
                    atol=1e-9,
                    msg=lambda m, k=key, n=name: f"{n} {k}: {m}",
                )


def test_terms_and_inputs_change_the_result(alone):
    config = [*TRANSLATION, "game.terms={l1={weight=100.0}}"]
    without = train_steps(LocalCommunicator(torch.device("cpu")), config)
    assert not torch.equal(
        without["generator/downs.0.0.weight"], alone["alternating"]["generator/downs.0.0.weight"]
    )

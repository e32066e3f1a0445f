"""The result does not depend on how many workers computed it: real groups, the real loop."""

import pytest
import torch

from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints
from gatdist.storage import Store
from gatdist.training.loop import run
from support import spawn

SMALL = [
    "run.total_samples=600",
    "run.global_batch=12",
    "run.checkpoint_samples=100000",
    "precision.dtype=float64",
    "model.latent_size=8",
    "model.conditional=true",
    'model.generator={name="residual", width=4}',
    'model.discriminator={name="residual", width=4}',
    "game.penalties={r1={strength=1.0, every_steps=2}, r2={strength=1.0, every_steps=2}}",
    "evaluate.metrics=[]",
    "evaluate.every_samples=0",
    "monitor.tensorboard=false",
]


def train(comm, overrides, folder):
    """Fifty steps of the real loop on this worker."""
    return run(load_config("digits", SMALL + overrides), comm, Store(folder))


def trained(folder):
    return Checkpoints(Store(f"{folder}/checkpoints")).newest().tensors


@pytest.mark.parametrize("rule", ["alternating", "simultaneous", "one_stage"])
def test_two_and_three_workers_train_what_one_trains(rule, tmp_path):
    overrides = [f"game.update_rule={rule}", "game.loss=relativistic"]
    train(LocalCommunicator(torch.device("cpu")), overrides, str(tmp_path / "1"))
    expected = trained(tmp_path / "1")
    untrained = {}
    for world_size in (2, 3):
        folder = str(tmp_path / str(world_size))
        outcomes = spawn(world_size, train, overrides, folder)
        assert [o["samples_seen"] for o in outcomes] == [600] * world_size
        found = trained(folder)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    # The comparison must be able to fail: another seed ends elsewhere.
    train(
        LocalCommunicator(torch.device("cpu")), [*overrides, "run.seed=1"], str(tmp_path / "seed")
    )
    untrained = trained(tmp_path / "seed")
    assert max((untrained[n] - t).abs().max() for n, t in expected.items()) > 1e-3


@pytest.mark.parametrize("loss", ["minimax", "nonsaturating"])
def test_every_loss_is_equal_on_two_workers(loss, tmp_path):
    overrides = [
        f"game.loss={loss}",
        "game.order=generator_first",
        "game.latents=shared",
        "run.total_samples=240",
    ]
    train(LocalCommunicator(torch.device("cpu")), overrides, str(tmp_path / "1"))
    spawn(2, train, overrides, str(tmp_path / "2"))
    expected, found = trained(tmp_path / "1"), trained(tmp_path / "2")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


def poison_one_rank(comm, folder):
    """A loss that is NaN on worker 1 alone, at one step."""
    from gatdist.game import Loss, register_loss
    from gatdist.game.losses import losses

    calls = []

    def discriminator(real, fake):
        calls.append(1)
        loss = losses["nonsaturating"].discriminator(real, fake)
        return loss * float("nan") if comm.rank == 1 and len(calls) == 5 else loss

    register_loss("poisoned", Loss(discriminator, losses["nonsaturating"].generator))
    outcome = train(comm, ["game.loss=poisoned", "run.total_samples=240"], folder)
    return outcome["status"]


def test_a_step_that_is_not_finite_on_one_worker_is_skipped_on_all(tmp_path):
    assert spawn(2, poison_one_rank, str(tmp_path)) == ["finished", "finished"]
    tensors = trained(tmp_path)
    assert tensors["counters/skipped"] == 1
    assert all(t.isfinite().all() for t in tensors.values())
    steps = {
        int(t)
        for name, t in tensors.items()
        if name.startswith("optimizer_discriminator") and name.endswith("step")
    }
    assert steps == {19}  # of 20, one did not move


def stop_from_one_rank(comm, folder):
    """Worker 1 alone is asked to stop."""
    asked = []

    def should_stop():
        asked.append(1)
        return comm.rank == 1 and len(asked) >= 7

    config = load_config("digits", [*SMALL, "run.total_samples=60000"])
    return run(config, comm, Store(folder), should_stop=should_stop)


def test_a_request_to_one_worker_stops_all_after_the_same_step_with_a_checkpoint(tmp_path):
    first, second = spawn(2, stop_from_one_rank, str(tmp_path))
    assert first == second
    assert first["status"] == "interrupted"
    assert (
        Checkpoints(Store(f"{tmp_path}/checkpoints")).newest().state["samples_seen"]
        == first["samples_seen"]
    )


def all_operations(comm):
    tensor = torch.arange(3.0) + comm.rank
    return {
        "sum": comm.all_reduce_(tensor.clone()).tolist(),
        "gathered": comm.all_gather(tensor).tolist(),
        "first": comm.broadcast_(tensor.clone()).tolist(),
        "object": comm.broadcast_object({"from": comm.rank, "text": "ψ" * 1000}),
        "any": (comm.any(comm.rank == 1), comm.any(False)),
        "objects": comm.all_gather_object(["é" * comm.rank, comm.rank]),
    }


def test_the_torch_communicator_does_what_it_says():
    first, second = spawn(2, all_operations)
    assert first == second
    assert first["sum"] == [1.0, 3.0, 5.0]
    assert first["gathered"] == [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]
    assert first["first"] == [0.0, 1.0, 2.0]
    assert first["object"] == {"from": 0, "text": "ψ" * 1000}
    assert first["any"] == (True, False)
    assert first["objects"] == [["", 0], ["é", 1]]

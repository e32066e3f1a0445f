"""Worker 0 reads a checkpoint for all, and its values are those of all."""

from __future__ import annotations

from pathlib import Path

import torch

from gatdist.common.errors import CheckpointError, GatdistError
from gatdist.config import load_config
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints
from gatdist.storage import Store
from gatdist.training.loop import run
from support import spawn

LOCAL = LocalCommunicator(torch.device("cpu"))
SETTINGS = [
    "run.global_batch=16",
    "run.log_every_samples=64",
    "run.reduction=canonical",
    "run.virtual_workers=2",
    *(f'model.{player}={{name="residual", width=4}}' for player in ("generator", "discriminator")),
    "evaluate.metrics=[]",
]


def gathered(comm):
    """Gather tensors of several shapes, and share what worker 0 computes."""
    mine = [
        torch.tensor(comm.rank),
        torch.tensor([comm.rank, 2.5], dtype=torch.float64),
        torch.full((2, 3), comm.rank, dtype=torch.uint8).T,
        torch.zeros(3, 0),
    ]
    rows = [comm.all_gather(tensor) for tensor in mine]
    said = comm.of_main(lambda: {"rank": comm.rank, "values": [1.5, None]})
    try:
        comm.of_main(refuse)
    except GatdistError as error:
        return rows, said, (type(error), str(error))


def refuse():
    raise CheckpointError("checkpoint", "is damaged")


def test_collectives_return_the_same_on_every_worker():
    for rows, said, error in spawn(2, gathered):
        assert [row.shape for row in rows] == [(2,), (2, 2), (2, 3, 2), (2, 3, 0)]
        assert rows[0].tolist() == [0, 1]
        assert rows[1].tolist() == [[0, 2.5], [1, 2.5]]
        assert rows[2].unique(dim=0).shape == (2, 3, 2)
        assert rows[2].dtype == torch.uint8
        assert said == {"rank": 0, "values": [1.5, None]}
        assert error[0] is CheckpointError
        assert "checkpoint" in error[1]


def train(comm, folder, total, reads=True):
    if not reads:
        Checkpoints.read = refuse
    config = load_config("digits", [*SETTINGS, f"run.total_samples={total}"])
    try:
        return run(config, comm, Store(folder))
    except CheckpointError as error:
        return str(error)


def first_reads(comm, folder, total):
    return train(comm, folder, total, reads=comm.is_main)


def digest_of(folder):
    return Checkpoints(Store(f"{folder}/checkpoints")).newest().digest()


def test_only_worker_0_reads_the_checkpoint(tmp_path):
    train(LOCAL, f"{tmp_path}/whole", 192)
    train(LOCAL, f"{tmp_path}/parts", 96)
    outcomes = spawn(2, first_reads, f"{tmp_path}/parts", 192)
    assert [outcome["samples_seen"] for outcome in outcomes] == [192, 192]
    assert digest_of(f"{tmp_path}/parts") == digest_of(f"{tmp_path}/whole")


def test_damage_is_reported_by_every_worker(tmp_path):
    train(LOCAL, f"{tmp_path}/run", 32)
    for file in Path(tmp_path, "run", "checkpoints").glob("*/generator.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    messages = spawn(2, train, f"{tmp_path}/run", 64)
    assert all("damaged" in message for message in messages)

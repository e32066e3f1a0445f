"""Cost of being able to undo a step, and of workers that may change: DCGAN-64 on two processes.

Steps with and without a copy of the state at their start, and with the communicator of workers that
may change instead of a plain one, alternate in the same processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.case import parser, positive, save
from gatdist.bench.cases import GatdistCase, Size
from gatdist.bench.processes import Report, together
from gatdist.parallel.communicator import Communicator, TorchCommunicator
from gatdist.parallel.members import Members, Membership
from gatdist.training.epochs import StepStart

SIZE = Size("dcgan64_w64", "dcgan", {"width": 64}, (3, 64, 64), 16)
TARGET = {"ratio": 1.02, "seconds": 0.003}
_STEPS = 2


class _Fixed(Membership):
    """Of workers that do not change."""

    def next(self) -> Communicator:
        raise NotImplementedError

    def is_due(self) -> bool:
        return False


def _member(comm: TorchCommunicator, report: Report, rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    config = SIZE.config({}, comm.world_size)
    real = SIZE.real(config)
    plain = GatdistCase(config, real, comm)
    undoable = GatdistCase(config, real, Members(comm, _Fixed(), comm.device))
    start = StepStart(undoable.state)

    def step_with_copy() -> None:
        start.begin()
        undoable.step()
        start.end()

    ways: dict[str, Callable[[], None]] = {
        "plain": plain.step,
        "undoable": step_with_copy,
        "copy": start.begin,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            comm.any(False)  # so that both begin together
            began = time.perf_counter()
            for _ in range(_STEPS):
                way()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - began) / _STEPS)
        report(f"round {number} of {rounds}")
    return times


def main() -> None:
    arguments = parser("undo", __doc__)
    arguments.add_argument("--rounds", type=positive, default=15)
    given = arguments.parse_args()
    times = together(2, _member, given.rounds, report=print, silence_s=120.0)[0]
    pairs = list(zip(times["undoable"], times["plain"], strict=True))
    result: dict[str, Any] = {
        "size": SIZE.name,
        "batch_per_worker": SIZE.batch,
        "workers": 2,
        "step_s": median(times["plain"]),
        "ratio": median(with_copy / plain for with_copy, plain in pairs),
        "added_s": median(with_copy - plain for with_copy, plain in pairs),
        "copy_s": median(times["copy"]),
        "target": TARGET,
        "times_s": times,
    }
    save(given.out, result)
    print({name: value for name, value in result.items() if name != "times_s"})


if __name__ == "__main__":
    main()

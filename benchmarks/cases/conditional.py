"""Steps of vocoders and translation, compared with hand-written loops of the same mathematics.

In one process: time and peak memory. In two: HiFi-GAN V1, compared with its published method, one
DistributedDataParallel per network and a discriminator that is not frozen in the generator's phase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.case import parser, positive, save
from gatdist.bench.cases import Case, GatdistCase
from gatdist.bench.memory import measure_memory
from gatdist.bench.presets import PRESETS, PresetCase
from gatdist.bench.processes import Report, together
from gatdist.bench.rounds import (
    TURN_S,
    Seconds,
    compare,
    harmonic,
    interleave,
    settled,
    speed,
    steps_in_a_turn,
)
from gatdist.config import Config
from gatdist.parallel.communicator import Communicator, LocalCommunicator

CPU = torch.device("cpu")
FLOAT32 = ["precision.dtype=float32"]
# By preset: samples per process.
ALONE = {"hifigan-v2": 2, "prompts-vocos": 8, "emoji-pix2pix": 16}
TOGETHER, WORKERS = ("hifigan-v1", 1), 2


def main() -> None:
    arguments = parser("conditional", __doc__)
    arguments.add_argument("--rounds", type=positive, default=7)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows = [alone(replace(PRESETS[name], batch=n), given.rounds) for name, n in ALONE.items()]
    result: dict[str, Any] = {"one_process": rows}
    print(pair := in_two_processes(given.rounds))
    save(given.out, result | {"two_processes": pair})


def gatdist_case(case: PresetCase, config: Config, comm: Communicator) -> GatdistCase:
    mine = slice(comm.rank, None, comm.world_size)
    inputs = {name: field[mine] for name, field in case.inputs(config, CPU).items()}
    real = case.real(config, CPU)[mine]
    return GatdistCase(config, real, comm, metadata=case.metadata, inputs=inputs)


def alone(case: PresetCase, rounds: int) -> dict[str, Any]:
    config, comm = case.config(FLOAT32), LocalCommunicator(CPU)
    ways: dict[str, Callable[[], Case]] = {
        "gatdist": lambda: gatdist_case(case, config, comm),
        "bare": lambda: case.hand_written(config, CPU, case.networks(config)),
    }
    memory = {name: measure_memory(build) for name, build in ways.items()}
    built: Mapping[str, Case] = {name: build() for name, build in ways.items()}
    steps = steps_in_a_turn(built["bare"].run(1).wall, TURN_S)
    with settled():
        turns = interleave(list(built), rounds, lambda way: built[way].run(steps))
    peaks = {name: each.state_bytes + each.peak_bytes for name, each in memory.items()}
    row = {
        "preset": case.preset,
        "batch": case.batch,
        **speed(steps * config.step_samples, turns["gatdist"], turns["bare"]),
        "memory_to_bare": peaks["gatdist"] / peaks["bare"],
    }
    print(row)
    return row


def in_two_processes(rounds: int) -> dict[str, Any]:
    answers = together(WORKERS, _member, rounds, report=print)
    wall = {
        name: harmonic([[turn.wall for turn in answer["turns"][name]] for answer in answers])
        for name in ("gatdist", "published")
    }
    return {
        "preset": TOGETHER[0],
        "batch": TOGETHER[1],
        **compare(wall["gatdist"], wall["published"]).named("ratio_to_published"),
        "numbers_sent": answers[0]["numbers"],
    }


def _member(comm: Communicator, report: Report, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, batch = TOGETHER
    case = replace(PRESETS[name], batch=batch)
    config = replace(case, batch=batch * comm.world_size).config(FLOAT32)
    mine = gatdist_case(case, config, comm)
    theirs = case.hand_written(case.config(FLOAT32), CPU, case.networks(config))
    theirs.freezes = False  # type: ignore[attr-defined]
    replicate = partial(DistributedDataParallel, broadcast_buffers=False)
    theirs.generator = replicate(theirs.generator)
    theirs.discriminator = replicate(theirs.discriminator)
    cases: Mapping[str, Case] = {"gatdist": mine, "published": theirs}

    def turn(name: str, num_steps: int) -> Seconds:
        comm.any(False)  # both start at the same time
        return cases[name].run(num_steps)

    steps: int = comm.broadcast_object(steps_in_a_turn(turn("published", 1).wall, TURN_S))
    sizes = {
        name: sum(p.numel() for p in getattr(mine, name).parameters())
        for name in ("generator", "discriminator")
    }
    both = sizes["generator"] + sizes["discriminator"]
    numbers = {"gatdist": both, "published": both + sizes["discriminator"]}
    with settled():
        turns = interleave(list(cases), rounds, partial(turn, num_steps=steps), report)
    return {"turns": turns, "numbers": numbers}


if __name__ == "__main__":
    main()

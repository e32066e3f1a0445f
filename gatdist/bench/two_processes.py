"""Two processes: gatdist, plain DistributedDataParallel, and two independent processes (limit)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from gatdist.bench.cases import RULES, Case, Size, alone, gatdist_case
from gatdist.bench.processes import Report, together
from gatdist.bench.reference import Plain
from gatdist.bench.rounds import Seconds, compare, harmonic, interleave, settled, steps_in_a_turn
from gatdist.parallel.communicator import Communicator

PLAIN = "ddp"
TWO_PROCESSES = (
    PLAIN,
    "alternating",
    "simultaneous",
    "one_stage",
    "one_stage_bfloat16",
    "canonical",
)
_WORKERS = 2


def measure_two_processes(
    sizes: Sequence[Size],
    names: Sequence[str],
    rounds: int,
    threads: int,
    turn_s: float,
    report: Report,
) -> list[dict[str, Any]]:
    """Measure the cases of ``names`` in :data:`TWO_PROCESSES`, and always plain DDP.

    Returns:
        A row per size and case; ``cpu_to_ddp`` is of both processes.

    Raises:
        WorkerLostError: A process died or hangs.
    """
    requested = {PLAIN, *names}
    if "canonical" in requested:
        requested.add("alternating")  # for ratio_to_fast
    chosen = [name for name in TWO_PROCESSES if name in requested]
    rows = []
    for size in sizes:

        def report_size(text: str, name: str = size.name) -> None:
            report(f"{name} in two processes: {text}")

        arguments = size, chosen, rounds, threads, turn_s
        answers = together(_WORKERS, _member, *arguments, report=report_size)
        turns = [answer["turns"] for answer in answers]
        wall, cpu = {}, {}
        for name in turns[0]:
            both = [by_name[name] for by_name in turns]
            wall[name] = harmonic([[turn.wall for turn in taken] for taken in both])
            cpu[name] = [sum(turn.cpu for turn in pair) for pair in zip(*both, strict=True)]
        rows += [_row(size, name, answers[0]["steps"], wall, cpu) for name in chosen]
    return rows


def _member(
    comm: Communicator,
    report: Report,
    size: Size,
    names: Sequence[str],
    rounds: int,
    threads: int,
    turn_s: float,
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    cases: dict[str, Case] = {}
    for name in names:
        cases[name], cases[_limit(name)] = _pair(size, name, comm)

    def turn(name: str, num_steps: int) -> Seconds:
        comm.any(False)  # both start at the same time
        return cases[name].run(num_steps)

    steps: int = comm.broadcast_object(steps_in_a_turn(turn(PLAIN, 1).wall, turn_s))
    with settled():
        found = interleave(list(cases), rounds, partial(turn, num_steps=steps), report)
    return {"steps": steps, "turns": found}


def _limit(name: str) -> str:
    return f"limit of {'alternating' if name == 'canonical' else name}"


def _pair(size: Size, name: str, comm: Communicator) -> tuple[Case, Case]:
    if name == PLAIN:
        return Plain(size, DistributedDataParallel), Plain(size, lambda network: network)
    return gatdist_case(size, RULES[name], comm), gatdist_case(size, alone(name))


def _row(
    size: Size, name: str, steps: int, wall: dict[str, list[float]], cpu: dict[str, list[float]]
) -> dict[str, Any]:
    step_s = median(wall[name]) / steps
    row = {
        "name": name,
        "size": size.name,
        "samples_per_s": _WORKERS * size.batch / step_s,
        **compare(wall[name], wall[PLAIN]).named("ratio_to_ddp"),
        **compare(wall[name], wall[_limit(name)]).named("ratio_to_limit"),
        **compare(cpu[PLAIN], cpu[name]).named("cpu_to_ddp"),
        "step_s": step_s,
    }
    if name == "canonical":
        row["ratio_to_fast"] = compare(wall[name], wall["alternating"]).median
    return row

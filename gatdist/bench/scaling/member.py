"""What every worker of a group does: steps that communicate and steps that do not, in turn."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from gatdist.bench.case import Size
from gatdist.bench.environment import machine, memory_bytes, versions
from gatdist.bench.gatdist_case import RULES, GatdistCase
from gatdist.bench.processes import Report
from gatdist.bench.rounds import interleave, settled, steps_in_a_turn
from gatdist.bench.scaling.traffic import reduced_bytes, sent_by_interface
from gatdist.parallel.communicator import Communicator, LocalCommunicator

TOGETHER, ALONE = "together", "alone"


@dataclass(frozen=True)
class Work:
    """What one group measures in one go.

    Attributes:
        size: its batch is that of one worker.
        mode: ``strong`` or ``weak``.
        rule: of :data:`~gatdist.bench.gatdist_case.RULES`.
        rounds: that count.
        turn_s: what a turn should take.
    """

    size: Size
    mode: str
    rule: str
    rounds: int
    turn_s: float


@dataclass(frozen=True)
class _Turn:
    """Of one worker, a step's mean."""

    seconds: float
    phases: dict[str, float]
    communication_s: float
    sent_bytes: float | None


def take_turns(
    comm: Communicator, report: Report, interface: str, works: Sequence[Work]
) -> dict[str, Any]:
    """Measure, together with all other workers of the group.

    Args:
        comm: the group.
        report: gets lines of progress.
        interface: of the network, which leads to other hosts; "" where there is none.
        works: what to measure, alike on all workers.

    Returns:
        JSON values of this worker: ``host`` (what it runs on) and ``measured``, an entry for each
        of ``works``: ``steps`` in a turn; ``seconds``, of each round's turn, ``together`` and
        ``alone``; ``phases`` and ``communication_s``, seconds a step of those that communicate;
        ``reduced_bytes`` a step; ``sent_bytes`` a step by the host's interface, or None.
    """
    with settled():
        measured = [_measure(comm, report, interface, work) for work in works]
    return {"host": host(comm.device), "measured": measured}


def host(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions of this process's host, as JSON values."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "host": socket.gethostname(),
        **machine(),
        "memory_bytes": memory_bytes(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "packages": versions(("gatdist", "torch", "ray")),
    }


def _measure(comm: Communicator, report: Report, interface: str, work: Work) -> dict[str, Any]:
    # Alone, a canonical step would do all lanes.
    rule = "alternating" if work.rule == "canonical" else work.rule
    cases = {
        TOGETHER: GatdistCase(work.size, RULES[work.rule], comm),
        ALONE: GatdistCase(work.size, RULES[rule], LocalCommunicator(comm.device)),
    }
    for case in cases.values():
        case.step()
    reduced = reduced_bytes(cases[TOGETHER])
    seconds = _turn(cases[TOGETHER], comm, 1, "").seconds
    steps: int = comm.broadcast_object(steps_in_a_turn(1, seconds, work.turn_s))
    turns: list[_Turn] = []

    def turn(name: str) -> float:
        taken = _turn(cases[name], comm, steps, interface)
        if name == TOGETHER:
            turns.append(taken)
        return taken.seconds * steps

    def report_with_workers(text: str) -> None:
        many = f"{comm.world_size} worker{'s' * (comm.world_size > 1)}"
        report(f"{work.size.name}, {work.mode}, {many}: {text}")

    found = interleave(list(cases), work.rounds, turn, report_with_workers)
    counted = turns[-work.rounds :]
    sent = [turn.sent_bytes for turn in counted if turn.sent_bytes is not None]
    return {
        "steps": steps,
        "seconds": found,
        "phases": {
            name: median(turn.phases[name] for turn in counted) for name in counted[0].phases
        },
        "communication_s": median(turn.communication_s for turn in counted),
        "reduced_bytes": reduced,
        "sent_bytes": median(sent) if sent else None,
    }


def _turn(case: GatdistCase, comm: Communicator, num_steps: int, interface: str) -> _Turn:
    """Take steps, begun by all workers at the same time, after one that warms the caches up."""
    case.step()
    case.timer.collect()
    comm.take_communication_s()
    comm.any(False)
    sent = sent_by_interface(interface)
    began = perf_counter()
    for _ in range(num_steps):
        case.step()
    phases = case.timer.collect(num_steps)  # waits for the device
    seconds = perf_counter() - began
    sent_then = sent_by_interface(interface)
    return _Turn(
        seconds / num_steps,
        {name.removeprefix("time/").removesuffix("_s"): s for name, s in phases.items()},
        comm.take_communication_s() / num_steps,
        None if sent is None or sent_then is None else (sent_then - sent) / num_steps,
    )

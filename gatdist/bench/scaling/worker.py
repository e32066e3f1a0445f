"""Work of one worker of a group: communicating and independent steps, and the bytes they send."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gatdist.bench.cases import RULES, GatdistCase, Size, alone, gatdist_case
from gatdist.bench.environment import environment
from gatdist.bench.processes import Report
from gatdist.bench.rounds import interleave, settled, steps_in_a_turn
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import Communicator, LocalCommunicator
from gatdist.parallel.reduction import Reduction, Tensors

T = TypeVar("T")
TOGETHER, ALONE = "together", "alone"


@dataclass(frozen=True)
class Work:
    """One measurement of a group; ``size`` has the batch of one worker."""

    size: Size
    mode: str
    rule: str
    rounds: int
    turn_s: float


class _Turn(NamedTuple):
    """Means per step on one worker."""

    seconds: float
    phases: dict[str, float]
    communication_s: float
    sent_bytes: float | None


def take_turns(
    comm: Communicator, report: Report, interface: str, works: Sequence[Work]
) -> dict[str, Any]:
    """Measure ``works``, identical on every rank, together with all other workers of the group.

    Returns:
        JSON values of this worker: ``host`` (hardware and versions) and ``measured``, one entry per
        work: ``steps`` per turn; ``seconds`` of each round's turn, ``together`` and ``alone``;
        ``phases`` and ``communication_s``, seconds per communicating step; ``reduced_bytes`` per
        step; ``sent_bytes`` per step by the host's interface to other hosts, or None.
    """
    with settled():
        measured = [_measure(comm, report, interface, work) for work in works]
    is_gpu = comm.device.type == "cuda"
    host = environment(
        "gatdist",
        "torch",
        "ray",
        host=socket.gethostname(),
        gpu=torch.cuda.get_device_name(comm.device) if is_gpu else None,
        threads=torch.get_num_threads(),
    )
    return {"host": host, "measured": measured}


def _measure(comm: Communicator, report: Report, interface: str, work: Work) -> dict[str, Any]:
    cases = {
        TOGETHER: gatdist_case(work.size, RULES[work.rule], comm),
        ALONE: gatdist_case(work.size, alone(work.rule), LocalCommunicator(comm.device)),
    }
    for case in cases.values():
        case.step()
    reduced = reduced_bytes(cases[TOGETHER])
    seconds = _turn(cases[TOGETHER], comm, 1, "").seconds
    steps: int = comm.broadcast_object(steps_in_a_turn(seconds, work.turn_s))

    def report_work(text: str) -> None:
        workers = f"{comm.world_size} worker{'s' * (comm.world_size > 1)}"
        report(f"{work.size.name}, {work.mode}, {workers}: {text}")

    turns = interleave(
        list(cases),
        work.rounds,
        lambda name: _turn(cases[name], comm, steps, interface),
        report_work,
    )
    counted = turns[TOGETHER]
    sent = [turn.sent_bytes for turn in counted if turn.sent_bytes is not None]
    return {
        "steps": steps,
        "seconds": {
            name: [turn.seconds * steps for turn in taken] for name, taken in turns.items()
        },
        "phases": {
            name: median(turn.phases[name] for turn in counted) for name in counted[0].phases
        },
        "communication_s": median(turn.communication_s for turn in counted),
        "reduced_bytes": reduced,
        "sent_bytes": median(sent) if sent else None,
    }


def _turn(case: GatdistCase, comm: Communicator, num_steps: int, interface: str) -> _Turn:
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


def reduced_bytes(case: GatdistCase) -> int:
    """Return the bytes that a step reduces over the workers; takes a step on every rank."""
    usual = case.state.reduction
    counting = _Counting(usual, 2 if case.config.precision.reduce_dtype == "bfloat16" else None)
    case.state.reduction = counting
    try:
        case.step()
    finally:
        case.state.reduction = usual
    return counting.num_bytes


def ring_bytes(num_bytes: int, workers: int) -> int:
    """Return the bytes a worker sends in a ring: 2 (p − 1) / p n (Patarasuk and Yuan 2009)."""
    return round(2 * (workers - 1) / workers * num_bytes)


def sent_by_interface(interface: str) -> int | None:
    """Return the counter of bytes sent by a network interface; None if there is none."""
    if not interface:
        return None
    try:
        return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
    except OSError:
        return None


class _Counting(Reduction):
    """Counts the bytes that pass through another reduction."""

    def __init__(self, inner: Reduction, element_bytes: int | None) -> None:
        super().__init__(inner.comm)
        self._inner, self._element_bytes = inner, element_bytes
        self.num_bytes = 0

    def replicate(self, network: nn.Module, *, may_skip: bool = False) -> nn.Module:
        return self._inner.replicate(network, may_skip=may_skip)

    def split(self, batch: Batch, micro_batch: int | None) -> list[Batch]:
        return self._inner.split(batch, micro_batch)

    def mean(self, parts: Iterable[Tensors]) -> Tensors:
        total = self._inner.mean(parts)
        self.num_bytes += sum(t.nbytes for t in total)
        return total

    def gradients(
        self, networks: Sequence[nn.Module], parts: Sequence[Batch], backward: Callable[[Batch], T]
    ) -> list[T]:
        found = self._inner.gradients(networks, parts, backward)
        self.num_bytes += sum(
            self._bytes_of(p) for network in networks for p in network.parameters()
        )
        return found

    def _bytes_of(self, parameter: Tensor) -> int:
        if not parameter.requires_grad:
            return 0
        return parameter.numel() * (self._element_bytes or parameter.element_size())

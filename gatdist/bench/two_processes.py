"""Two processes: gatdist, plain DistributedDataParallel, and the limit of both.

Every process has the size's batch, whatever the number of processes. The limit of a case is the
same work by two processes at the same time that do not communicate: each runs the one-process step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

from gatdist.bench.case import Case, HandWritten, Size, adam
from gatdist.bench.gatdist_case import RULES, GatdistCase
from gatdist.bench.processes import Report, together
from gatdist.bench.rounds import compare, interleave, settled, steps_in_a_turn
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


class Plain(HandWritten):
    """A loop as torch's manual writes it: each network in a DistributedDataParallel, no more.

    The discriminator is not frozen while the generator learns, so its gradients are computed and
    sent for nothing; the fakes are made once, as in the manual's DCGAN: 3 g + 9 d.

    Args:
        size: of the networks and the batch.
        wrap: makes the two networks distributed.
    """

    def __init__(self, size: Size, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(size)
        self.networks = wrap(self.generator), wrap(self.discriminator)
        self.g_optimizer = adam(self.generator.parameters(), self.config.optim.generator)
        self.d_optimizer = adam(self.discriminator.parameters(), self.config.optim.discriminator)

    def step(self) -> None:
        """Discriminator, then generator."""
        generator, discriminator = self.networks
        fakes = generator(self.latents())
        self.d_optimizer.zero_grad()
        real, fake = discriminator(self.real), discriminator(fakes.detach())
        loss = softplus(-real).mean() + softplus(fake).mean()
        loss.backward()
        self.d_optimizer.step()
        self.g_optimizer.zero_grad()
        loss = softplus(-discriminator(fakes)).mean()
        loss.backward()
        self.g_optimizer.step()


def measure_two_processes(
    sizes: Sequence[Size],
    names: Sequence[str],
    rounds: int,
    threads: int,
    turn_s: float,
    report: Report,
) -> list[dict[str, Any]]:
    """The rows of ``two_processes``, a size and case each.

    Args:
        sizes: to measure.
        names: of :data:`TWO_PROCESSES`; plain DDP is measured in any case.
        rounds: that count.
        threads: of each process.
        turn_s: what a case's turn in a round should take.
        report: gets lines of progress.

    Raises:
        WorkerLostError: a process died or hangs.
    """
    rows = []
    requested = {PLAIN, *names}
    if "canonical" in requested:
        requested.add("alternating")  # which it is compared with
    chosen = [name for name in TWO_PROCESSES if name in requested]
    for size in sizes:
        arguments = size, chosen, rounds, threads, turn_s
        say = partial(_say, report, size)
        answers = together(_WORKERS, _member, *arguments, report=say)
        steps = answers[0]["steps"]
        seconds = _both([answer["seconds"] for answer in answers])
        rows += [_row(size, name, steps, seconds) for name in chosen]
    return rows


def _say(report: Report, size: Size, text: str) -> None:
    report(f"{size.name} in two processes: {text}")


def _member(
    comm: Communicator,
    report: Report,
    size: Size,
    names: Sequence[str],
    rounds: int,
    threads: int,
    turn_s: float,
) -> dict[str, Any]:
    """One process's share: seconds of its turns by case, those of the limits beside them."""
    torch.set_num_threads(threads)
    cases: dict[str, Case] = {}
    for name in names:
        cases[name], cases[_limit(name)] = _pair(size, name, comm)

    def turn(name: str, num_steps: int) -> float:
        comm.any(False)  # both begin at the same time
        return cases[name].run(num_steps)

    seconds = turn(PLAIN, 1)
    steps: int = comm.broadcast_object(steps_in_a_turn(1, seconds, turn_s))
    with settled():
        found = interleave(list(cases), rounds, lambda name: turn(name, steps), report)
    return {"steps": steps, "seconds": found}


def _limit(name: str) -> str:
    # A canonical step of one process would do both lanes.
    return f"limit of {'alternating' if name == 'canonical' else name}"


def _pair(size: Size, name: str, comm: Communicator) -> tuple[Case, Case]:
    """The case, and what one process does by itself."""
    if name == PLAIN:
        return Plain(size, DistributedDataParallel), Plain(size, lambda network: network)
    alone = RULES["alternating" if name == "canonical" else name]
    return GatdistCase(size, RULES[name], comm), GatdistCase(size, alone)


def _both(by_rank: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Seconds of each round in which both processes together, at their rates, do one's work twice.

    That is the harmonic mean, so that a limit counts what both have done, not who was last.
    """
    return {
        name: [
            len(taken) / sum(1 / seconds for seconds in taken)
            for taken in zip(*(answer[name] for answer in by_rank), strict=True)
        ]
        for name in by_rank[0]
    }


def _row(size: Size, name: str, steps: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    to_ddp = compare(seconds[name], seconds[PLAIN])
    to_limit = compare(seconds[name], seconds[_limit(name)])
    step_s = median(seconds[name]) / steps
    row = {
        "name": name,
        "size": size.name,
        "samples_per_s": _WORKERS * size.batch / step_s,
        "ratio_to_ddp": to_ddp.median,
        "ratio_to_ddp_low": to_ddp.low,
        "ratio_to_ddp_high": to_ddp.high,
        "ratio_to_limit": to_limit.median,
        "ratio_to_limit_low": to_limit.low,
        "ratio_to_limit_high": to_limit.high,
        "step_s": step_s,
    }
    if name == "canonical":
        row["ratio_to_fast"] = compare(seconds[name], seconds["alternating"]).median
    return row

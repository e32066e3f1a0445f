"""Strong and weak scaling: the plan, its checks, and what the workers' turns amount to.

The limit of a group of workers is as many processes that do not communicate, in the same places at
the same time: it has in it what the workers take from one another on their hosts (cores, memory,
the clock of the processor), and leaves communication alone. Efficiency is the share of it that is
reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Protocol

from gatdist.bench.case import SIZES, Size
from gatdist.bench.gatdist_case import RULES
from gatdist.bench.rounds import TURN_S, compare
from gatdist.bench.scaling.member import ALONE, TOGETHER, Work, take_turns
from gatdist.bench.scaling.traffic import ring_bytes
from gatdist.common.errors import ConfigError, nearest

MODES = ("strong", "weak")
USUAL_SIZE = "dcgan64_w32"


class Launch(Protocol):
    """Starts a group of workers somewhere, and ends it once each has answered."""

    def __call__(self, world_size: int, function: Any, *args: Any) -> tuple[list[Any], float]:
        """Run ``function(comm, tell, interface, *args)`` in each worker.

        Returns:
            What it returned, by rank, and the seconds until the group had formed.
        """


@dataclass(frozen=True)
class Plan:
    """What is to be measured; made by :func:`plan`.

    Attributes:
        counts: of workers, ascending.
        sizes: with the batch that is the global one under ``strong``, a worker's under ``weak``.
        modes: of :data:`MODES`.
        rule: of :data:`~gatdist.bench.gatdist_case.RULES`.
        rounds: that count.
        turn_s: what a turn should take.
    """

    counts: tuple[int, ...]
    sizes: tuple[Size, ...]
    modes: tuple[str, ...]
    rule: str
    rounds: int
    turn_s: float

    def works(self, workers: int) -> list[Work]:
        """What a group of so many workers measures."""
        return [
            Work(self._for_one(size, mode, workers), mode, self.rule, self.rounds, self.turn_s)
            for size in self.sizes
            for mode in self.modes
        ]

    @staticmethod
    def _for_one(size: Size, mode: str, workers: int) -> Size:
        return replace(size, batch=size.batch // workers) if mode == "strong" else size


def plan(
    counts: Sequence[int],
    *,
    sizes: Sequence[str] = (),
    modes: Sequence[str] = MODES,
    rule: str = "alternating",
    batch: int | None = None,
    rounds: int = 5,
    turn_s: float = TURN_S,
) -> Plan:
    """Check what is asked for, before anything is started.

    Args:
        counts: of workers (≥ 1), in any order.
        sizes: names of :data:`~gatdist.bench.case.SIZES`; none: :data:`USUAL_SIZE`.
        modes: ``strong`` (one global batch, shared) and ``weak`` (a batch for each worker).
        rule: name of :data:`~gatdist.bench.gatdist_case.RULES`.
        batch: samples, instead of those of the sizes.
        rounds: that count (≥ 1).
        turn_s: what a turn should take, in seconds.

    Raises:
        ConfigError: an unknown name, a number that is not above 0, a global batch that some count
            can't share, or a count that the rule excludes.
    """
    for option, value in (
        ("--rounds", rounds),
        ("--batch", batch),
        *(("--workers", n) for n in counts),
    ):
        if value is not None and value < 1:
            raise ConfigError(option, "must be above 0", value=value)
    _require_known("--size", sizes, SIZES)
    _require_known("--mode", modes, MODES)
    _require_known("--rule", [rule], RULES)
    chosen = [SIZES[name] for name in SIZES if name in (sizes or [USUAL_SIZE])]
    made = Plan(
        tuple(sorted(set(counts))),
        tuple(replace(size, batch=batch or size.batch) for size in chosen),
        tuple(mode for mode in MODES if mode in modes),
        rule,
        rounds,
        turn_s,
    )
    for size in made.sizes:
        for workers in made.counts:
            if "strong" in made.modes:
                _require_shares(size, workers)
            for work in made.works(workers):
                work.size.config(RULES[rule], workers).check_workers(workers)
    return made


def measure(made: Plan, launch: Launch) -> dict[str, Any]:
    """Measure all points, a group of workers after the other.

    Args:
        made: what to measure.
        launch: starts the groups.

    Returns:
        JSON values. ``points``, by size, mode and count. Of each: ``workers``, ``mode``, ``size``,
        ``rule``, ``global_batch``; ``samples_per_s`` and ``limit_samples_per_s`` of all workers
        together, medians over the rounds; ``efficiency``, the one by the other, and the lowest and
        highest of a round (``efficiency_low``, ``efficiency_high``); ``speedup`` over the smallest
        count; ``step_s``; ``phases``, seconds a step by name, and ``communication_s``, during which
        gradients were on their way (None on GPUs), means over workers; ``bytes_sent`` a step by
        each worker as computed, and ``bytes_measured`` by the hosts' network interfaces, a worker
        (None on one host); ``hosts``, workers by name; ``start_s``, until the group had formed.
        ``hosts``: what each of them is.
    """
    points: list[dict[str, Any]] = []
    hosts: dict[str, dict[str, Any]] = {}
    for workers in made.counts:
        works = made.works(workers)
        answers, start_s = launch(workers, take_turns, works)
        hosts |= {answer["host"]["host"]: answer["host"] for answer in answers}
        names = [answer["host"]["host"] for answer in answers]
        on_gpu = any(answer["host"]["gpu"] for answer in answers)
        for index, work in enumerate(works):
            point = _point(work, names, [answer["measured"][index] for answer in answers])
            if on_gpu:  # where the host's clock does not see the network
                point["communication_s"] = None
            points.append(point | {"hosts": Counter(names), "start_s": start_s})
    order = {size.name: number for number, size in enumerate(made.sizes)}
    points.sort(key=lambda p: (order[p["size"]], p["mode"], p["workers"]))
    _compare_with_smallest(points)
    return {"points": points, "hosts": [hosts[name] for name in sorted(hosts)]}


def _point(
    work: Work, hosts: Sequence[str], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a group's turns amount to."""
    workers, steps = len(answers), answers[0]["steps"]
    together, alone = (
        _seconds([answer["seconds"][name] for answer in answers]) for name in (TOGETHER, ALONE)
    )
    global_batch = work.size.batch * workers
    step_s, limit_step_s = median(together) / steps, median(alone) / steps
    ratio = compare(together, alone)
    efficiency = (global_batch / step_s) / (global_batch / limit_step_s)
    return {
        "workers": workers,
        "mode": work.mode,
        "size": work.size.name,
        "rule": work.rule,
        "global_batch": global_batch,
        "samples_per_s": global_batch / step_s,
        "limit_samples_per_s": global_batch / limit_step_s,
        "efficiency": efficiency,
        # The ratio of medians need not be one of the rounds'.
        "efficiency_low": min(ratio.low, efficiency),
        "efficiency_high": max(ratio.high, efficiency),
        "step_s": step_s,
        "phases": {
            name: fmean(answer["phases"][name] for answer in answers)
            for name in answers[0]["phases"]
        },
        "communication_s": fmean(answer["communication_s"] for answer in answers),
        "bytes_sent": ring_bytes(answers[0]["reduced_bytes"], workers),
        "bytes_measured": _measured_bytes(hosts, answers),
    }


def _seconds(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of each round in which the workers, at their rates, do one's work each.

    That is the harmonic mean, so that a limit counts what all have done, not who was last.
    """
    rounds = zip(*by_rank, strict=True)
    return [len(taken) / sum(1 / seconds for seconds in taken) for taken in rounds]


def _measured_bytes(hosts: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> float | None:
    """What the hosts' interfaces sent in a step, a worker; workers of one host share one."""
    sent = {host: answer["sent_bytes"] for host, answer in zip(hosts, answers, strict=True)}
    if len(sent) == 1 or None in sent.values():
        return None
    return sum(sent.values()) / len(answers)


def _compare_with_smallest(points: Sequence[dict[str, Any]]) -> None:
    smallest: dict[tuple[str, str], float] = {}
    for point in points:
        unit = smallest.setdefault((point["size"], point["mode"]), point["samples_per_s"])
        point["speedup"] = point["samples_per_s"] / unit


def _require_known(
    option: str, requested: Sequence[str], known: Sequence[str] | Mapping[str, Any]
) -> None:
    for name in requested:
        if name not in known:
            raise ConfigError(option, f"not known. {nearest(name, known)}", value=name)


def _require_shares(size: Size, workers: int) -> None:
    batch = size.batch
    if batch % workers:
        fitting = [n for n in range(1, batch + 1) if batch % n == 0]
        near = " or ".join(map(str, sorted(sorted(fitting, key=lambda n: abs(n - workers))[:2])))
        raise ConfigError(
            "--workers",
            f"can't share {size.name}'s global batch of {batch} equally, as strong scaling does",
            value=workers,
            hint=f"Use {near}, or --batch {-(-batch // workers) * workers}, or --mode weak",
        )

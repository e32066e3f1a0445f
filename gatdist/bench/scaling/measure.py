"""Strong and weak scaling: the plan, its checks, and the evaluation of the workers' turns.

The limit is N independent processes (no communication) in the same places at the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Protocol

from gatdist.bench.cases import RULES, SIZES, Size, chosen
from gatdist.bench.rounds import TURN_S, compare, harmonic
from gatdist.bench.scaling.worker import ALONE, TOGETHER, Work, ring_bytes, take_turns
from gatdist.common.errors import ConfigError

MODES = ("strong", "weak")
USUAL_SIZE = "dcgan64_w32"


class Launch(Protocol):
    """Run ``function(comm, report, interface, *args)`` in a group of workers.

    Returns the results by rank, and the seconds until the group had formed.
    """

    def __call__(self, world_size: int, function: Any, *args: Any) -> tuple[list[Any], float]: ...


@dataclass(frozen=True)
class Plan:
    """What to measure; made by :func:`plan`. Batches are global if strong, per worker if weak."""

    counts: tuple[int, ...]
    sizes: tuple[Size, ...]
    modes: tuple[str, ...]
    rule: str
    rounds: int
    turn_s: float

    def works(self, workers: int) -> list[Work]:
        works = []
        for size in self.sizes:
            for mode in self.modes:
                batch = size.batch // workers if mode == "strong" else size.batch
                local = replace(size, batch=batch)
                works.append(Work(local, mode, self.rule, self.rounds, self.turn_s))
        return works


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
    """Check a request before anything is started.

    Raises:
        ConfigError: An unknown name, a number below 1, a global batch that does not divide by a
            number of workers, or a number of workers that the rule excludes.
    """
    for option, value in (
        ("--rounds", rounds),
        ("--batch", batch),
        *(("--workers", n) for n in counts),
    ):
        if value is not None and value < 1:
            raise ConfigError(option, "must be above 0", value=value)
    names = chosen("--size", sizes or [USUAL_SIZE], SIZES)
    chosen("--rule", [rule], RULES)
    made = Plan(
        tuple(sorted(set(counts))),
        tuple(replace(SIZES[name], batch=batch or SIZES[name].batch) for name in names),
        tuple(chosen("--mode", modes, MODES)),
        rule,
        rounds,
        turn_s,
    )
    for size in made.sizes:
        for workers in made.counts:
            if "strong" in made.modes:
                _require_divisible(size, workers)
            for work in made.works(workers):
                work.size.config(RULES[rule], workers).check_workers(workers)
    return made


def measure(made: Plan, launch: Launch) -> dict[str, Any]:
    """Measure all points, one group of workers after the other.

    Returns:
        JSON values. ``points``, by size, mode and number of workers: ``workers``, ``mode``,
        ``size``, ``rule``, ``global_batch``; ``samples_per_s`` and ``limit_samples_per_s`` of all
        workers together, medians over the rounds; ``efficiency``, their ratio, and the lowest and
        highest of a round (``efficiency_low``, ``efficiency_high``); ``speedup`` over the smallest
        number of workers; ``step_s``; ``phases``, seconds per step by name, and
        ``communication_s``, the time with gradients in flight, means over workers;
        ``bytes_sent`` per step and worker as computed, and ``bytes_measured`` by the hosts' network
        interfaces (None on one host); ``hosts``, workers by name; ``start_s``, until the group had
        formed. ``hosts``: hardware and versions of each.
    """
    points: list[dict[str, Any]] = []
    hosts: dict[str, dict[str, Any]] = {}
    for workers in made.counts:
        works = made.works(workers)
        answers, start_s = launch(workers, take_turns, works)
        hosts |= {answer["host"]["host"]: answer["host"] for answer in answers}
        names = [answer["host"]["host"] for answer in answers]
        for index, work in enumerate(works):
            point = _point(work, names, [answer["measured"][index] for answer in answers])
            points.append(point | {"hosts": Counter(names), "start_s": start_s})
    order = {size.name: number for number, size in enumerate(made.sizes)}
    points.sort(key=lambda p: (order[p["size"]], p["mode"], p["workers"]))
    smallest: dict[tuple[str, str], float] = {}
    for point in points:
        unit = smallest.setdefault((point["size"], point["mode"]), point["samples_per_s"])
        point["speedup"] = point["samples_per_s"] / unit
    return {"points": points, "hosts": [hosts[name] for name in sorted(hosts)]}


def _point(
    work: Work, hosts: Sequence[str], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    workers, steps = len(answers), answers[0]["steps"]
    together, alone = (
        harmonic([answer["seconds"][name] for answer in answers]) for name in (TOGETHER, ALONE)
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
        # The ratio of medians need not lie between those of single rounds.
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


def _measured_bytes(hosts: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> float | None:
    """Bytes sent per step and worker; workers of one host share its interface."""
    sent = {host: answer["sent_bytes"] for host, answer in zip(hosts, answers, strict=True)}
    if len(sent) == 1 or None in sent.values():
        return None
    return sum(sent.values()) / len(answers)


def _require_divisible(size: Size, workers: int) -> None:
    batch = size.batch
    if batch % workers:
        fitting = [n for n in range(1, batch + 1) if batch % n == 0]
        near = " or ".join(map(str, sorted(sorted(fitting, key=lambda n: abs(n - workers))[:2])))
        raise ConfigError(
            "--workers",
            f"must divide {size.name}'s global batch of {batch} for strong scaling",
            value=workers,
            hint=f"Use {near}, or --batch {-(-batch // workers) * workers}, or --mode weak",
        )

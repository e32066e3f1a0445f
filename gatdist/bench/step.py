"""``gatdist bench step``: how fast a step is, beside the same mathematics written by others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from gatdist.bench.bare import Bare, BareReusing
from gatdist.bench.case import BFLOAT16, SIZES, USUAL_SIZES, Case, Size
from gatdist.bench.environment import environment
from gatdist.bench.gatdist_case import RULES, GatdistCase
from gatdist.bench.memory import Memory, measure_memory
from gatdist.bench.peers import PEERS
from gatdist.bench.processes import Report
from gatdist.bench.rounds import TURN_S, interleave, settled, speed, steps_in_a_turn
from gatdist.bench.two_processes import TWO_PROCESSES, measure_two_processes
from gatdist.common.errors import ConfigError, nearest

BARE = "bare"
CASES: dict[str, Callable[[Size], Case]] = {
    BARE: Bare,
    "bare_reusing": BareReusing,
    "bare_bfloat16": partial(Bare, overrides=BFLOAT16),
    **PEERS,
    **{name: partial(GatdistCase, overrides=overrides) for name, overrides in RULES.items()},
}


def measure(
    sizes: Sequence[str] = (),
    cases: Sequence[str] = (),
    *,
    rounds: int = 7,
    threads: int = 1,
    two_processes: bool = False,
    turn_s: float = TURN_S,
    report: Report = lambda text: None,
) -> dict[str, Any]:
    """Measure steps, all cases in turn, so that a ratio compares what ran at the same time.

    Args:
        sizes: names of :data:`~gatdist.bench.case.SIZES`; none: the usual ones.
        cases: names of :data:`CASES` and, with two processes, of theirs; none: all. The unit of a
            ratio is measured in any case.
        rounds: that count (≥ 1).
        threads: of torch, in each process (≥ 1).
        two_processes: measure two processes too.
        turn_s: what a case's turn in a round should take.
        report: gets lines of progress.

    Returns:
        JSON values. ``cases``: a row for each size and case that could be measured. Ratios are of
        speeds, round by round: the median round, the lowest and the highest; ``peak_bytes`` and
        ``state_bytes`` are those of :class:`~gatdist.bench.memory.Memory`.
        ``two_processes``: likewise, as :func:`measure_two_processes` makes them. ``skipped``:
        cases whose library is not installed. ``environment``: what it was measured on.

    Raises:
        ConfigError: an unknown name, or a number that is not above 0.
        WorkerLostError: one of two processes died or hangs.
    """
    for option, value in (("--rounds", rounds), ("--threads", threads)):
        if value < 1:
            raise ConfigError(option, "must be above 0", value=value)
    pairs = TWO_PROCESSES if two_processes else ()
    usual = [size.name for size in USUAL_SIZES]
    chosen_sizes = [SIZES[name] for name in _chosen("--size", sizes or usual, SIZES)]
    chosen = _chosen("--case", cases, [*CASES, *(name for name in pairs if name not in CASES)])
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with settled(), _threads(threads):
        for size in chosen_sizes:
            some, skipped = _measure_size(size, chosen, rounds, turn_s, report)
            rows += some
    pair_rows = []
    if two_processes:
        pair_rows = measure_two_processes(chosen_sizes, chosen, rounds, threads, turn_s, report)
    return {
        "cases": rows,
        "two_processes": pair_rows,
        "skipped": skipped,
        "environment": environment(threads),
    }


def _chosen(option: str, requested: Sequence[str], known: Iterable[str]) -> list[str]:
    """The known names that are wanted, in their own order; all if none is."""
    known = list(known)
    for name in requested:
        if name not in known:
            raise ConfigError(option, f"not known. {nearest(name, known)}", value=name)
    return [name for name in known if name in requested or not requested]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_size(
    size: Size, names: Sequence[str], rounds: int, turn_s: float, report: Report
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The rows of one size, and the cases that could not be built here."""
    cases: dict[str, Case] = {}
    skipped = []
    for name, build in CASES.items():
        if name == BARE or name in names:
            try:
                cases[name] = build(size)
            except ImportError as error:
                hint = "pip install 'gatdist[bench]'"
                skipped.append({"name": name, "reason": f"{error}", "hint": hint})
    cases[BARE].run(1)
    steps = steps_in_a_turn(1, cases[BARE].run(1), turn_s)
    seconds = interleave(
        list(cases),
        rounds,
        lambda name: cases[name].run(steps),
        lambda text: report(f"{size.name}: {text}"),
    )
    report(f"{size.name}: memory")
    memory = {name: measure_memory(partial(CASES[name], size)) for name in cases}
    return [_row(size, name, steps, seconds, memory) for name in cases], skipped


def _row(
    size: Size,
    name: str,
    steps: int,
    seconds: Mapping[str, Sequence[float]],
    memory: Mapping[str, Memory],
) -> dict[str, Any]:
    return {
        "name": name,
        "size": size.name,
        **speed(size.batch * steps, seconds[name], seconds[BARE]),
        "step_s": median(seconds[name]) / steps,
        "peak_bytes": memory[name].peak_bytes,
        "peak_to_bare": memory[name].peak_bytes / memory[BARE].peak_bytes,
        "state_bytes": memory[name].state_bytes,
    }

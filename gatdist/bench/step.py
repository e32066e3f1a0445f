"""``gatdist bench step``: a training step compared with reference implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any

from gatdist.bench.cases import (
    BFLOAT16,
    RULES,
    SIZES,
    USUAL_SIZES,
    Case,
    Size,
    chosen,
    gatdist_case,
)
from gatdist.bench.environment import environment
from gatdist.bench.memory import measure_memory
from gatdist.bench.peers import PEERS
from gatdist.bench.processes import Report
from gatdist.bench.reference import Bare, BareReusing
from gatdist.bench.rounds import TURN_S, interleave, settled, speed, steps_in_a_turn, walls
from gatdist.bench.two_processes import TWO_PROCESSES, measure_two_processes
from gatdist.common.errors import ConfigError
from gatdist.common.numerics import kernels, tf32, torch_threads
from gatdist.monitor.numbers import aligned, number

BARE = "bare"
CASES: dict[str, Callable[[Size], Case]] = {
    BARE: Bare,
    "bare_reusing": BareReusing,
    "bare_bfloat16": partial(Bare, overrides=BFLOAT16),
    **PEERS,
    **{name: partial(gatdist_case, overrides=overrides) for name, overrides in RULES.items()},
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
    """Measure steps of all cases in interleaved rounds.

    Args:
        sizes: Names of :data:`~gatdist.bench.cases.SIZES`; none: the usual ones.
        cases: Names of :data:`CASES` and :data:`TWO_PROCESSES`; none: all. Bare is always measured.
        rounds: Number of rounds (≥ 1).
        threads: Torch's threads per process (≥ 1).
        two_processes: Also measure two communicating processes.
        turn_s: Duration of a case's turn in a round.
        report: Gets lines of progress.

    Returns:
        ``cases`` (see :func:`measure_cases`, with the memory), ``two_processes`` (see
        :func:`measure_two_processes`), ``skipped`` (library not installed), ``environment``.

    Raises:
        ConfigError: An unknown name, or a number below 1.
        WorkerLostError: One of two processes died or hangs.
    """
    for option, value in (("--rounds", rounds), ("--threads", threads)):
        if value < 1:
            raise ConfigError(option, "must be above 0", value=value)
    pairs = TWO_PROCESSES if two_processes else ()
    usual = [size.name for size in USUAL_SIZES]
    chosen_sizes = [SIZES[name] for name in chosen("--size", sizes or usual, SIZES)]
    names = chosen("--case", cases, dict.fromkeys((*CASES, *pairs)))
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with settled(), torch_threads(threads), kernels(deterministic=False), tf32(False):
        for size in chosen_sizes:
            some, skipped = _measure_size(size, names, rounds, turn_s, report)
            rows += some
    pair_rows = []
    if two_processes:
        pair_rows = measure_two_processes(chosen_sizes, names, rounds, threads, turn_s, report)
    return {
        "cases": rows,
        "two_processes": pair_rows,
        "skipped": skipped,
        "environment": environment("gatdist", "torch", "lightning", "accelerate", threads=threads),
    }


def measure_cases(
    size: Size, cases: Mapping[str, Case], rounds: int, turn_s: float, report: Report
) -> list[dict[str, Any]]:
    """Measure cases, one of which is :data:`BARE`, in interleaved rounds.

    Returns:
        A row per case; times are medians, ratios to the bare loop (median, lowest, highest) are
        taken round by round.
    """
    cases[BARE].run(1)
    steps = steps_in_a_turn(cases[BARE].run(1).wall, turn_s)
    turns = interleave(
        list(cases),
        rounds,
        lambda name: cases[name].run(steps),
        lambda text: report(f"{size.name}: {text}"),
    )
    return [
        {
            "name": name,
            "size": size.name,
            **speed(size.batch * steps, taken, turns[BARE]),
            "step_s": median(walls(taken)) / steps,
            "cpu_step_s": median(turn.cpu for turn in taken) / steps,
        }
        for name, taken in turns.items()
    ]


def _measure_size(
    size: Size, names: Sequence[str], rounds: int, turn_s: float, report: Report
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    cases: dict[str, Case] = {}
    skipped = []
    for name, build in CASES.items():
        if name == BARE or name in names:
            try:
                cases[name] = build(size)
            except ImportError as error:
                hint = "pip install 'gatdist[bench]'"
                skipped.append({"name": name, "reason": f"{error}", "hint": hint})
    rows = measure_cases(size, cases, rounds, turn_s, report)
    report(f"{size.name}: memory")
    memory = {name: measure_memory(partial(CASES[name], size)) for name in cases}
    for row in rows:
        state_bytes, peak_bytes = memory[row["name"]]
        row["peak_bytes"], row["state_bytes"] = peak_bytes, state_bytes
        row["peak_to_bare"] = peak_bytes / memory[BARE].peak_bytes
    return rows, skipped


def table(found: Mapping[str, Any]) -> str:
    """Format the result of :func:`measure`, one block per size."""
    blocks = []
    for size, rows in groupby(found["cases"], key=lambda row: row["size"]):
        head = (size, "samples/s", "step", "× bare", "", "CPU", "× bare", "", "memory", "× bare")
        blocks.append(aligned([head, *map(_row, rows)]))
    for size, rows in groupby(found["two_processes"], key=lambda row: row["size"]):
        ratios = ("× DDP", "", "× limit", "", "CPU × DDP", "")
        titles = (f"{size}, two processes", "samples/s", "step", *ratios)
        blocks.append(aligned([titles, *map(_row_of_two, rows)]))
    return "\n\n".join([*blocks, "\n".join(_notes(found))])


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        number(row["samples_per_s"]),
        _time(row["step_s"]),
        *_ratio(row, "ratio_to_bare", "ratio"),
        _time(row["cpu_step_s"]),
        *_ratio(row, "cpu_to_bare"),
        f"{row['peak_bytes'] / 2**20:.1f} MiB",
        f"{row['peak_to_bare']:.3f}",
    )


def _row_of_two(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        number(row["samples_per_s"]),
        _time(row["step_s"]),
        *_ratio(row, "ratio_to_ddp"),
        *_ratio(row, "ratio_to_limit"),
        *_ratio(row, "cpu_to_ddp"),
    )


def _notes(found: Mapping[str, Any]) -> list[str]:
    facts = found["environment"]
    notes = [
        "Ratios are medians over the rounds, with the lowest and the highest: × bare of speeds,",
        "CPU × bare of CPU time (user + system) per step, which varies less on a busy machine.",
        "Memory: peak of a step in addition to weights, optimizers, EMA and batch.",
    ]
    notes += [
        f"{row['size']}: canonical runs at {row['ratio_to_fast']:.3f} × fast."
        for row in found["two_processes"]
        if "ratio_to_fast" in row
    ]
    notes.append(
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} thread(s) per process, "
        f"torch {facts['packages']['torch']}, load {facts['load']}"
    )
    return notes + [f"skipped {c['name']}: {c['reason']}; {c['hint']}" for c in found["skipped"]]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _ratio(row: Mapping[str, Any], name: str, spread: str | None = None) -> tuple[str, str]:
    spread = spread or name
    return f"{row[name]:.3f}", f"{row[f'{spread}_low']:.3f} to {row[f'{spread}_high']:.3f}"

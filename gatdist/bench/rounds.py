"""Fair timing on a machine that is never quite quiet: rounds in which everyone has a turn."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

# What one case's turn in a round should take.
TURN_S = 1.0


@contextmanager
def settled() -> Iterator[None]:
    """In this context the garbage collector looks at new objects only, so that it is quick.

    Thousands of modules' objects would otherwise be gone through before each turn.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, compared round by round: the median round and the extremes."""

    median: float
    low: float
    high: float


def interleave(
    names: Sequence[str], rounds: int, turn: Callable[[str], float], message: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds that each case's turns took, round by round; a first round is not counted.

    Args:
        names: of the cases. Their order is shuffled in each round, by a fixed seed, so that none
            always comes after the same other one.
        rounds: to count.
        turn: takes a case's steps; returns seconds.
        message: gets a line of progress each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order, shuffler = list(names), random.Random(0)
    for number in range(rounds + 1):
        message(f"round {number} of {rounds}" if number else "warming up")
        shuffler.shuffle(order)
        for name in order:
            gc.collect()  # nobody pays for what another left behind
            seconds[name].append(turn(name))
    return {name: taken[1:] for name, taken in seconds.items()}


def steps_in_a_turn(num_steps: int, seconds: float, turn_s: float) -> int:
    """How many steps to take, where ``num_steps`` of the unit's took so many seconds."""
    return max(1, round(turn_s * num_steps / seconds))


def compare(seconds: Sequence[float], unit: Sequence[float]) -> Ratio:
    """How many times as fast as ``unit``, in seconds for the same work in the same rounds."""
    ratios = [theirs / mine for mine, theirs in zip(seconds, unit, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def speed(samples: int, seconds: Sequence[float], bare: Sequence[float]) -> dict[str, float]:
    """Samples a second, of so many in each round, and how many times that of a bare loop."""
    ratio = compare(seconds, bare)
    return {
        "samples_per_s": samples / median(seconds),
        "ratio_to_bare": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }

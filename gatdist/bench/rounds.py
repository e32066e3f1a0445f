"""Timing in interleaved rounds, so that cases are compared under the same load of the machine."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# Duration of one case's turn in a round.
TURN_S = 1.0


class Seconds(NamedTuple):
    """Wall time, and CPU time (user + system) of this process."""

    wall: float
    cpu: float


def timed(function: Callable[[], object]) -> Seconds:
    """Time a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


@contextmanager
def settled() -> Iterator[None]:
    """Exclude existing objects from garbage collection, so that collections are quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def interleave(
    names: Sequence[str],
    rounds: int,
    turn: Callable[[str], T],
    report: Callable[[str], object] = lambda text: None,
) -> dict[str, list[T]]:
    """Give every case a turn in each round, in shuffled order; the first round is dropped.

    Returns:
        The times by case, in the order of the rounds.
    """
    taken: dict[str, list[T]] = {name: [] for name in names}
    order, shuffler = list(names), random.Random(0)
    for number in range(rounds + 1):
        report(f"round {number} of {rounds}" if number else "warm-up")
        shuffler.shuffle(order)
        for name in order:
            gc.collect()  # so that no case collects another's garbage
            taken[name].append(turn(name))
    return {name: times[1:] for name, times in taken.items()}


def steps_in_a_turn(seconds: float, turn_s: float) -> int:
    """Return the number of steps per turn, if one takes ``seconds``."""
    return max(1, round(turn_s / seconds))


class Ratio(NamedTuple):
    """Ratios round by round: median, lowest, highest."""

    median: float
    low: float
    high: float

    def named(self, name: str, spread: str | None = None) -> dict[str, float]:
        """Return JSON values ``name``, ``<spread>_low`` and ``<spread>_high``."""
        spread = spread or name
        return {name: self.median, f"{spread}_low": self.low, f"{spread}_high": self.high}


def compare(seconds: Sequence[float], unit: Sequence[float]) -> Ratio:
    """Return the speed relative to ``unit``, from times for the same work in the same rounds."""
    ratios = [theirs / mine for mine, theirs in zip(seconds, unit, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def walls(turns: Sequence[Seconds]) -> list[float]:
    """Return the wall times."""
    return [turn.wall for turn in turns]


def speed(samples: int, turns: Sequence[Seconds], bare: Sequence[Seconds]) -> dict[str, float]:
    """Return ``samples_per_s``, ``ratio_to_bare`` of speeds, and ``cpu_to_bare`` of CPU times."""
    cpu = compare([turn.cpu for turn in bare], [turn.cpu for turn in turns])
    return {
        "samples_per_s": samples / median(walls(turns)),
        **compare(walls(turns), walls(bare)).named("ratio_to_bare", "ratio"),
        **cpu.named("cpu_to_bare"),
    }


def harmonic(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Return each round's harmonic mean, by which independent processes count by total work."""
    rounds = zip(*by_rank, strict=True)
    return [len(taken) / sum(1 / seconds for seconds in taken) for taken in rounds]

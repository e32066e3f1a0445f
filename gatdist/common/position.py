"""The position of this process in its run, and a hook for tests at named places of the code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Position:
    """Rank of this worker, start of the run (from 1), and steps made since the run began."""

    rank: int = 0
    attempt: int = 0
    step: int = 0


here = Position()
hook: Callable[[str], object] | None = None  # None outside of tests and benchmarks


def reached(place: str) -> None:
    """Call the hook, if any, with the name of the place that the code has reached.

    Places are the phases (``data``, those of the update rule, ``optimizer``, ``log``,
    ``evaluation``, ``commit``), ``members`` and ``heal`` when workers change, ``commit/FILE``
    before a file of a checkpoint is published, and ``commit/retire`` before older checkpoints are
    deleted.
    """
    if hook is not None:
        hook(place)

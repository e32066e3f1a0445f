"""Fault injection by place, worker and step, for plugins that the workers of a test import.

============================ =====================================================================
place                        reached
============================ =====================================================================
``data``                     before waiting for the batch of a step
``discriminator`` …          before the phase of that name; all phases of an update rule
``optimizer``                after a phase's gradients are reduced, before its optimizer steps
``log``, ``evaluation``      before metrics are written; before fakes are measured
``members``                  before waiting for the workers of the next epoch
``heal``                     before some of them get their state from others
``commit``                   before a checkpoint is handed to its writer
``commit/FILE``              before the writer publishes that file; ``MANIFEST.json`` is last
``commit/retire``            after a checkpoint is committed, before older ones are deleted
============================ =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gatdist.common import position
from gatdist.common.position import here

# Prefix of a plugin: workers do not have the tests' folder on their import path.
IMPORT = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from fault_injection import always_at, fail_at, here
"""


@dataclass(frozen=True)
class _Fault:
    place: str
    action: Callable[[], object]
    rank: int | None
    step: int
    attempt: int | None

    def is_due(self, place: str) -> bool:
        return (
            self.place == place
            and self.rank in (None, here.rank)
            and self.attempt in (None, here.attempt)
            and here.step >= self.step
        )


_waiting: list[_Fault] = []
_always: list[tuple[str, Callable[[], object]]] = []


def fail_at(
    place: str,
    action: Callable[[], object],
    *,
    rank: int | None = None,
    step: int = 0,
    attempt: int | None = 1,
) -> None:
    """Call ``action`` once, the first time that ``place`` is reached at or after ``step``.

    Args:
        place: See the table of the module.
        action: May raise, kill or freeze the process, or cut the network.
        rank: Rank of the worker; None for every worker.
        step: Number of steps since the start of the run.
        attempt: Attempt of the run, from 1; None for any.
    """
    position.hook = _reached
    _waiting.append(_Fault(place, action, rank, step, attempt))


def always_at(place: str, action: Callable[[], object]) -> None:
    """Call ``action`` each time that ``place`` is reached."""
    position.hook = _reached
    _always.append((place, action))


def _reached(place: str) -> None:
    for at, action in _always:
        if at == place:
            action()
    for fault in list(_waiting):
        if fault.is_due(place):
            _waiting.remove(fault)
            fault.action()

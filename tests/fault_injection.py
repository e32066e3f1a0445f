"""Faults by name, worker and step, for plugins that the workers of a test import.

============================ =====================================================================
place                        reached
============================ =====================================================================
``data``                     before the batch of a step is waited for
``discriminator`` …          before the phase of that name; all phases of an update rule have one
``optimizer``                once a phase's gradients are reduced, before its players move
``log``, ``evaluation``      before numbers are written; before fakes are measured
``commit``                   before a checkpoint is handed to its writer
``commit/FILE``              before the writer publishes that file; ``MANIFEST.json`` comes last
``commit/retire``            once a checkpoint is committed, before older ones are deleted
============================ =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gatdist.common import position
from gatdist.common.position import here

# The first lines of a plugin: workers do not have the folder of the tests on their path.
IMPORT = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from fault_injection import fail_at, here
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


def fail_at(
    place: str,
    action: Callable[[], object],
    *,
    rank: int | None = None,
    step: int = 0,
    attempt: int | None = 1,
) -> None:
    """Call ``action`` once, where ``place`` is first reached at or after ``step``.

    Args:
        place: see the module's table.
        action: may raise, kill, freeze or cut.
        rank: of the worker; None for every one.
        step: steps made since the run began.
        attempt: start of the run, from 1; None for any.
    """
    position.hook = _reached
    _waiting.append(_Fault(place, action, rank, step, attempt))


def _reached(place: str) -> None:
    for fault in list(_waiting):
        if fault.is_due(place):
            _waiting.remove(fault)
            fault.action()

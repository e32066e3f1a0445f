"""Faults on purpose, for tests: what goes wrong is said by name, worker and step.

A test's plugin, which every worker imports, calls :func:`fail_at`; the code calls :func:`reached`
at the places that have names. Where nothing was asked for, that costs a look at an empty list.

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


@dataclass
class Place:
    """Where this process is.

    Attributes:
        rank: of this worker.
        attempt: the start of the run that this is, from 1.
        step: steps made since the run began.
    """

    rank: int = 0
    attempt: int = 0
    step: int = 0


@dataclass(frozen=True)
class _Fault:
    name: str
    do: Callable[[], object]
    rank: int | None
    step: int
    attempt: int | None


here = Place()
_waiting: list[_Fault] = []


def fail_at(
    name: str,
    do: Callable[[], object],
    *,
    rank: int | None = None,
    step: int = 0,
    attempt: int | None = 1,
) -> None:
    """Do something once, where ``name`` is first reached at or after ``step``.

    Args:
        name: of the place; see the module's table.
        do: what goes wrong: may raise, kill, freeze or cut.
        rank: on which worker; None for every one.
        step: how many steps have been made.
        attempt: in which start of the run, counted from 1; None for any.
    """
    _waiting.append(_Fault(name, do, rank, step, attempt))


def reached(name: str) -> None:
    """Called where the code reaches a place."""
    if not _waiting:
        return
    for fault in list(_waiting):
        if (
            fault.name == name
            and fault.rank in (None, here.rank)
            and fault.attempt in (None, here.attempt)
            and here.step >= fault.step
        ):
            _waiting.remove(fault)
            fault.do()

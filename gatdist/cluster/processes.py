"""Ends the processes that this one has started, by their ids."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants(root: int) -> list[int]:
    """Ids of the children of process ``root``, their children, and so on (Linux)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            # The name, in parentheses, may hold blanks; the parent is the second field after it.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [root]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


def end_descendants() -> None:
    """Kill all that this process has started, at once."""
    for process in descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

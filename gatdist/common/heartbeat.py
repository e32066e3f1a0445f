"""Counts heartbeats of long operations.

A worker without a heartbeat for ``cluster.heartbeat_timeout_s`` counts as hung. Steps are
heartbeats; what takes long between them (reading, evaluating) calls :func:`beat` after each part.
So should a metric, feature extractor or network of your own that takes minutes in one call. A beat
costs an addition: another thread sends the count.
"""

from __future__ import annotations

import threading

_trainer = 0
_beats = 0


def watch_this_thread() -> None:
    """Count the beats of the calling thread from now on, and no other thread's."""
    global _trainer
    _trainer = threading.get_ident()


def beat() -> None:
    """Count a heartbeat of the training thread. Calls from other threads do nothing."""
    global _beats
    if threading.get_ident() == _trainer:
        _beats += 1


def beats() -> int:
    """Return the number of beats in this process."""
    return _beats

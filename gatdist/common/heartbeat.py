"""Signs of life of long operations: each part that is done is counted, in memory.

A worker that counts nothing for ``cluster.heartbeat_timeout_s`` is taken for one that hangs. Steps
count by themselves; what takes long between them (reading, evaluating) calls :func:`beat` after
each part. So should a metric, feature extractor or network of your own that takes minutes in one
call. The count is sent by a thread that runs anyway, so that a beat costs no more than an addition.
"""

from __future__ import annotations

import threading

_trainer = 0
_beats = 0


def watch_this_thread() -> None:
    """From now on, the calling thread's beats count, and no other thread's."""
    global _trainer
    _trainer = threading.get_ident()


def beat() -> None:
    """Count a sign of life of the training thread. Other threads' calls do nothing."""
    global _beats
    if threading.get_ident() == _trainer:
        _beats += 1


def beats() -> int:
    """How many beats there have been in this process."""
    return _beats

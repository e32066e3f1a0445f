"""Where a worker's training thread is, for those who watch it from other threads."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from typing import Any

from gatdist import faults

# A thread that waits for the other workers stands in one of these: autograd's C++ engine waits for
# the reduction of the last bucket, and collectives are called by torch.distributed.
_WAITING = ("torch/autograd/graph.py", "torch/distributed/")


class Progress:
    """Told by the training thread at each phase that it enters; asked by any other.

    Attributes:
        phase: the one it is in.
        moves: how many it has entered.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.moves = 0
        self._entered = time.monotonic()
        self._thread = threading.get_ident()

    def enter(self, phase: str) -> None:
        """The calling thread, which is the training thread, enters a phase."""
        self._thread = threading.get_ident()
        self.phase, self._entered = phase, time.monotonic()
        self.moves += 1
        faults.reached(phase)

    def report(self) -> dict[str, Any]:
        """JSON values: ``phase``, ``moves``, ``step``, and for how long (s) it has been there."""
        return {
            "phase": self.phase,
            "moves": self.moves,
            "step": faults.here.step,
            "still_s": time.monotonic() - self._entered,
        }

    def stacks(self) -> dict[str, Any]:
        """What all threads are at, as JSON values.

        ``text`` holds their stacks; ``waits`` says whether the training thread waits for other
        workers.
        """
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        texts = [
            f"Thread {names.get(ident, ident)}{' (trains)' * (ident == self._thread)}:\n"
            + "".join(traceback.format_stack(frame))
            for ident, frame in sorted(frames.items(), key=lambda item: item[0] != self._thread)
        ]
        frame = frames.get(self._thread)
        waits = frame is not None and any(
            part in f"{call.filename}"
            for call in traceback.extract_stack(frame)[-3:]
            for part in _WAITING
        )
        return {"text": "\n".join(texts), "waits": waits}

"""The position of a worker's training thread, for threads that monitor it."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gatdist.common.heartbeat import beat, beats, watch_this_thread
from gatdist.common.position import here, reached
from gatdist.parallel.flight import flight

# Files of the innermost frames of a thread that waits for the other workers: autograd's C++ engine
# waits for the reduction of the last bucket; torch.distributed calls collectives.
_WAITING = ("torch/autograd/graph.py", "torch/distributed/")


class Progress:
    """Written by the training thread, read by others.

    Attributes:
        phase: of the step or loop.
        num_phases: number of phases entered since these workers train together.
        samples_seen: by the steps made so far.
        saved_samples: by the newest complete checkpoint.
        is_ending: whether the run is over and writes its last files.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.num_phases = 0
        self.samples_seen = self.saved_samples = 0
        self.is_ending = False
        self._lengthy = 0
        self._starts = True
        self._thread = threading.get_ident()
        self._last, self._last_at = (0, 0), time.monotonic()
        watch_this_thread()

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.num_phases += 1
        reached(phase)

    def begin_epoch(self) -> None:
        """Count phases anew, as all workers of a new epoch do at this point."""
        self.num_phases = 0

    def start(self, samples_seen: int) -> None:
        self._thread = threading.get_ident()
        watch_this_thread()
        self.samples_seen = self.saved_samples = samples_seen

    def step(self, samples_seen: int) -> None:
        self.samples_seen = samples_seen
        self._starts = False

    @property
    def is_saved(self) -> bool:
        """Whether no progress would be lost if the training thread ended now."""
        return self.samples_seen == self.saved_samples

    @contextmanager
    def lengthy(self) -> Iterator[None]:
        """Allow ``cluster.startup_timeout_s`` without a heartbeat in this context."""
        self._lengthy += 1
        try:
            yield
        finally:
            self._lengthy -= 1
            beat()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Treat each compilation by torch in this context as :meth:`lengthy`."""
        from torch._dynamo.callback import callback_handler

        within: list[AbstractContextManager[None]] = []

        def begin(_: object) -> None:
            within.append(self.lengthy())
            within[-1].__enter__()

        def end(_: object) -> None:
            if within:
                within.pop().__exit__(None, None, None)

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(begin)
            callback_handler.remove_end_callback(end)

    def report(self) -> dict[str, Any]:
        """Return JSON values of a heartbeat, for one thread only."""
        sign = self.num_phases, beats()
        if sign != self._last:
            self._last, self._last_at = sign, time.monotonic()
        return {
            "phase": self.phase,
            "num_phases": self.num_phases,
            "step": here.step,
            "still_s": time.monotonic() - self._last_at,
            "lengthy": bool(self._starts or self._lengthy),
            "samples_seen": self.samples_seen,
            "is_saved": self.is_saved,
        }

    def stacks(self) -> dict[str, Any]:
        """Return the stacks of all threads, and what the training thread waits for.

        Returns:
            ``text``; ``waits``, whether it waits for other workers, as far as its stack shows; and
            ``flight``, the numbers of its collectives (launched, started, completed), if known.
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
        record = flight()
        if record:
            texts.append(record.text)
        return {"text": "\n".join(texts), "waits": waits, "flight": record and record[:3]}

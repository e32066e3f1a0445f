"""TensorBoard's event files, on local disks and object stores."""

from __future__ import annotations

import io
import os
import re
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gatdist.common.background import Background, Coalesced
from gatdist.monitor.grid import Pixels
from gatdist.monitor.tags import Chart
from gatdist.monitor.uploads import MAX_BYTES, MIN_GROWTH, RETRY_BUDGET_S

if TYPE_CHECKING:
    from gatdist.storage import Store

TENSORBOARD_FOLDER = "tensorboard"
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{10})\.", re.ASCII)
# Images and audio that wait to be encoded.
_MAX_QUEUED = 64

# Name, arguments and options of a function of torch.utils.tensorboard.summary.
_Summary = tuple[str, tuple[Any, ...], dict[str, Any]]


class _Work(NamedTuple):
    summaries: Sequence[_Summary]
    step: int | None
    may_drop: bool
    time: float


class TensorBoard:
    """Event files, written in the background in the order of the calls, which never wait.

    On a local disk, one event file per attempt. Elsewhere each upload is an event file of its own,
    a segment: TensorBoard reads the files of a folder in the order of their names as one run.
    Uploads become rarer as the run grows; see :data:`MIN_GROWTH`. The next :meth:`flush` retries
    what could not be written. TensorBoard hides events of earlier files at ``purge_step`` and
    above.
    """

    def __init__(self, run_dir: Store, purge_step: int, background: Background) -> None:
        self._run_dir = run_dir
        self._hasty = run_dir.with_retry_budget(RETRY_BUDGET_S)
        self._purge_step = purge_step
        self._queue: deque[_Work] = deque()
        self._flushes = self._finishes = self._is_patient = False
        # Touched by the thread alone:
        self._events = io.BytesIO()
        self._has_head = False
        self._prefix = ""
        self._segment: tuple[str, bytes] | None = None  # that may or may not be stored
        self._num_segments, self._sent_bytes = 0, 0
        self.error = ""
        self.num_dropped = 0
        self._drain = Coalesced(background, self._run)
        self._submit(None)  # writes the head of the file

    @property
    def is_complete(self) -> bool:
        return not (self._queue or self._segment or self._events.tell() or self.num_dropped)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._submit(step, *(("scalar", item, {}) for item in values.items()))

    def layout(self, step: int, groups: Mapping[str, Sequence[Chart]]) -> None:
        """Set the charts of the tab *Custom scalars*, by group."""
        # TensorBoard matches the beginning of a tag only.
        charts = {
            name: {chart.title: ["Multiline", [f"({chart.pattern})$"]] for chart in group}
            for name, group in groups.items()
        }
        self._submit(step, ("custom_scalars", (charts,), {}))

    def image(self, step: int, tag: str, image: Pixels) -> None:
        """Add an image, uint8 [height, width, C]."""
        self._submit(step, ("image", (tag, image), {"dataformats": "HWC"}), may_drop=True)

    def audio(self, step: int, tag: str, clip: NDArray[np.float32], rate: int) -> None:
        """Add audio, float32 [C, t], as one channel; ``rate`` in hertz."""
        mono = clip.mean(axis=0, keepdims=True)
        self._submit(step, ("audio", (tag, mono), {"sample_rate": rate}), may_drop=True)

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._submit(step, ("text", (tag, markdown), {}))

    def hparams(self, values: Mapping[str, str | float], metrics: list[str]) -> None:
        """Set the row in the table of runs: hyperparameters, and tags of the scalars to compare."""
        # SummaryWriter.add_hparams would open another run.
        self._submit(None, ("hparams", (dict(values), dict.fromkeys(metrics, 0)), {}))

    def flush(self) -> None:
        self._flushes = True
        self._drain.request()

    def finish(self, *, patient: bool) -> None:
        self._finishes, self._is_patient = True, patient
        self._drain.request()

    def _submit(self, step: int | None, *summaries: _Summary, may_drop: bool = False) -> None:
        if may_drop and len(self._queue) >= _MAX_QUEUED:
            self.num_dropped += 1
            return
        self._queue.append(_Work(summaries, step, may_drop, time.time()))
        self._drain.request()

    def _run(self) -> None:
        flushes, self._flushes = self._flushes, False
        while self._queue:
            work = self._queue.popleft()
            if work.may_drop and self._events.tell() > MAX_BYTES:
                self.num_dropped += 1
                continue
            try:
                self._add(work)
            except Exception as error:
                self.error = f"TensorBoard: {error}"
                self.num_dropped += 1
        if flushes or self._finishes:
            self._write(self._run_dir if self._is_patient else self._hasty, self._finishes)

    def _add(self, work: _Work) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import summary

        if not self._has_head:
            self._has_head = True
            start = SessionLog(status=SessionLog.START)
            self._record(Event(file_version="brain.Event:2", step=self._purge_step))
            self._record(Event(session_log=start, step=self._purge_step))
        for name, args, options in work.summaries:
            found = getattr(summary, name)(*args, **options)
            # Of hparams' three summaries, the last ends the session.
            for one in found[:2] if name == "hparams" else (found,):
                self._record(Event(summary=one, step=work.step, wall_time=work.time))

    def _record(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event.wall_time = event.wall_time or time.time()
        RecordWriter(self._events).write(event.SerializeToString())

    def _write(self, store: Store, force: bool) -> None:
        try:
            if not self._prefix:
                self._prefix = _prefix_after(store.list(TENSORBOARD_FOLDER))
            if not store.is_local:
                self._upload(store, force)
            elif self._events.tell():
                store.append(f"{TENSORBOARD_FOLDER}/{self._prefix}", self._events.getvalue())
                self._events = io.BytesIO()
        except Exception as error:
            self.error = str(error)
        else:
            self.error = ""

    def _upload(self, store: Store, force: bool) -> None:
        # First the segment that failed, unchanged: it may have been stored, and its answer lost.
        self._send(store)
        num_bytes = self._events.tell()
        if num_bytes and (force or num_bytes >= MIN_GROWTH * self._sent_bytes):
            name = f"{TENSORBOARD_FOLDER}/{self._prefix}.{self._num_segments:06d}"
            self._segment = (name, self._events.getvalue())
            self._events = io.BytesIO()
            self._num_segments += 1
            self._send(store)

    def _send(self, store: Store) -> None:
        if self._segment:
            name, data = self._segment
            store.publish(name, data)
            self._sent_bytes += len(data)
            self._segment = None


def _prefix_after(names: list[str]) -> str:
    """The name of an event file that TensorBoard reads after these.

    Names begin with a time in seconds; the clock of the host that wrote the others may be ahead.
    """
    times = [int(found[1]) for name in names if (found := _EVENT_FILE.match(name))]
    start = max(int(time.time()), *(t + 1 for t in times)) if times else int(time.time())
    return f"events.out.tfevents.{start:010d}.{socket.gethostname()}.{os.getpid()}"

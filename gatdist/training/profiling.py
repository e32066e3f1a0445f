"""Profiles of a run's steps (``monitor.profile_steps``): time and memory of each operation.

Every worker writes into ``profiles/steps-FIRST-STOP-attempt-N`` in the run directory:

=========================== ======================================================================
file                        holds
=========================== ======================================================================
``rank-0.pt.trace.json.gz`` all operations, for Perfetto and the trace viewers of Chrome and
                            TensorBoard; steps and their phases are ranges
``rank-0.txt``              tables of the operations that took most time and memory
``rank-0.memory.pickle``    on CUDA: each allocation with its stack, for PyTorch's memory viewer
=========================== ======================================================================
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gatdist.common.background import Background, Coalesced
from gatdist.common.errors import ConfigError
from gatdist.common.position import here
from gatdist.config import Config
from gatdist.monitor.timing import PhaseTimer
from gatdist.monitor.uploads import Uploads
from gatdist.parallel.communicator import Communicator
from gatdist.runs import Checkpoints
from gatdist.runs.checkpoints import Name
from gatdist.storage import Store

FOLDER = "profiles"
# TensorBoard looks for this ending.
TRACE_ENDING = ".pt.trace.json.gz"
_ROWS = 30
_MOST_ALLOCATIONS = 200_000


class Profiler:
    """Profile a window of steps, once, without changing what is computed."""

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        timer: PhaseTimer,
        note: Callable[[str], None],
    ) -> None:
        self._steps = range(*(config.monitor.profile_steps or (0, 0)))
        self._rank, self._on_cuda = comm.rank, comm.device.type == "cuda"
        self._timer, self._note = timer, note
        self._profile: profile | None = None
        self._first = 0
        self._uploads: Uploads | None = None

    def step(self, number: int) -> AbstractContextManager[object]:
        """Return the context of step ``number``, counted from 0 since the run began."""
        if self._profile is None and number in self._steps:
            self._start(number)
        if self._profile is None:
            return nullcontext()
        return record_function(f"ProfilerStep#{number}")  # a name that viewers know

    def is_due(self, steps_made: int) -> bool:
        """Return whether the window is over and its profile is to be written."""
        return self._profile is not None and steps_made >= self._steps.stop

    def write(self, steps_made: int, store: Store, background: Background) -> None:
        """End the profile, if there is one, and write it to ``store`` in the background.

        :meth:`retry` writes again what fails.
        """
        if self._profile is None:
            if steps_made <= self._steps.start < self._steps.stop and self._rank == 0:
                self._note(f"the run has ended before step {self._steps.start}: no profile")
            return
        finished = self._stop()
        attempt = f"attempt-{here.attempt}"
        folder = f"{FOLDER}/steps-{self._first:06d}-{steps_made:06d}-{attempt}"
        self._steps = range(0)  # once: a run that is rolled back may come here again
        try:
            files = _files(finished, self._on_cuda)
        except OSError as error:  # the folder of temporary files is full
            self._note(f"a profile could not be written: {error}")
            return
        self._uploads = Uploads(store)
        for ending, content in files.items():
            self._uploads.add(f"{folder}/rank-{self._rank}{ending}", content)
        self._upload = Coalesced(background, self._uploads.flush)
        self.retry()
        if self._rank == 0:
            steps = f"steps {self._first} to {steps_made - 1}"
            self._note(f"profile of {steps}: {store.url}/{folder}; Perfetto opens *{TRACE_ENDING}")

    def retry(self) -> None:
        if self._uploads and self._uploads.missing:
            self._upload.request()

    def close(self) -> None:
        """Write what is not written yet; discard an unfinished profile."""
        if self._uploads and not self._uploads.flush(patient=True):
            self._note(f"a profile could not be written: {self._uploads.error}")
        if self._profile is not None:
            self._stop()
            if self._on_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _start(self, number: int) -> None:
        self._first = number
        activities = [ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()
        self._timer.makes_ranges = True

    def _stop(self) -> profile:
        assert self._profile is not None
        stopped, self._profile = self._profile, None
        self._timer.makes_ranges = False
        stopped.stop()
        return stopped


def _files(finished: profile, on_cuda: bool) -> dict[str, bytes]:
    """Return the contents of a profile's files, by extension."""
    with tempfile.TemporaryDirectory(prefix="gatdist-profile-") as folder:
        trace = Path(folder) / f"trace{TRACE_ENDING}"
        finished.export_chrome_trace(str(trace))
        files = {TRACE_ENDING: trace.read_bytes()}
        if on_cuda:
            snapshot = Path(folder) / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            files[".memory.pickle"] = snapshot.read_bytes()
    files[".txt"] = _tables(finished, on_cuda).encode()
    return files


def _tables(finished: profile, on_cuda: bool) -> str:
    device = "device" if on_cuda else "cpu"
    averages: Any = finished.key_averages()
    return "\n\n".join(
        f"{title}\n{averages.table(sort_by=key, row_limit=_ROWS, max_name_column_width=60)}"
        for title, key in (
            ("Operations by their own time", f"self_{device}_time_total"),
            ("Operations by memory", f"self_{device}_memory_usage"),
        )
    )


def require_ahead(config: Config, run_dir: str) -> None:
    """Raise ConfigError for a profile of steps that the run in ``run_dir`` has made already."""
    if config.monitor.profile_steps is None:
        return
    store = Store(run_dir, config.run.storage_options)
    names = map(Name.parse, Checkpoints(store.child("checkpoints")).committed())
    made = max((name.samples_seen for name in names if name), default=0) // config.step_samples
    first, stop = config.monitor.profile_steps
    if stop <= made:
        raise ConfigError(
            "monitor.profile_steps (--profile)",
            f"the run in {run_dir} has made {made:,} steps already",
            value=[first, stop],
            hint=f"Use {made}:{made + stop - first}, or another --run-dir",
        )

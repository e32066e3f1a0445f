"""Where the numbers and pictures of a run go: ``metrics.jsonl`` and TensorBoard.

Only worker 0 has a :class:`Monitor`. ``metrics.jsonl`` is written before a call returns, so that a
checkpoint committed after a tick never knows of more than the file does. TensorBoard's files are
written by a thread of their own: nothing resumes from them, and the first step need not wait until
its library is imported.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gatdist.background import Background
from gatdist.config import Config
from gatdist.monitor.charts import Chart, charts_of
from gatdist.monitor.grid import Pixels

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from gatdist.storage import Store

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Monitor:
    """The numbers, pictures and texts of a run.

    On resume, what earlier attempts wrote past the checkpoint is taken back: lines are cut from
    ``metrics.jsonl``, and TensorBoard is told to forget the steps.

    Args:
        run_dir: the run directory.
        tensorboard: whether TensorBoard's files are written too.
        resume_samples: the clock at which training goes on; 0 for a fresh run.

    Attributes:
        complaints: what went wrong with TensorBoard's files, which is no reason to end a run.
    """

    def __init__(
        self, run_dir: Store, *, tensorboard: bool = True, resume_samples: int = 0
    ) -> None:
        self.complaints: list[str] = []
        self._resume_samples = resume_samples
        self._tags: dict[str, None] = {}
        self._lines = JsonLines(run_dir, METRICS_FILE, resume_samples)
        self._board = (
            TensorBoard(run_dir, resume_samples + 1, self.complaints.append)
            if tensorboard
            else None
        )

    def tick(self, samples_seen: int, values: Mapping[str, float]) -> None:
        """Write one tick's values. A second call at the same ``samples_seen`` adds to its line.

        Args:
            samples_seen: the clock; never less than in the call before.
            values: by TensorBoard tag; a name without a slash, such as ``world_size``, is no tag.
        """
        self._lines.write(samples_seen, values)
        if self._board:
            scalars = {tag: value for tag, value in values.items() if "/" in tag}
            self._lay_out(samples_seen, scalars)
            self._board.scalars(samples_seen, scalars)

    def exhibit(
        self,
        samples_seen: int,
        tag: str,
        picture: Pixels | None = None,
        sound: tuple[NDArray[np.float32], int] | None = None,
        text: str | None = None,
    ) -> None:
        """Show samples in TensorBoard.

        Args:
            samples_seen: the clock.
            tag: of what is shown; of a sound with ``/audio`` behind it.
            picture: uint8 [height, width, C].
            sound: float32 [C, t] and its sample rate in hertz.
            text: one sample a line.
        """
        if self._board is None:
            return
        if picture is not None:
            self._board.image(samples_seen, tag, picture)
        if sound is not None:
            # TensorBoard takes all that has one tag for the kind that it saw first.
            self._board.sound(samples_seen, f"{tag}/audio", *sound)
        if text is not None:
            self._board.text(samples_seen, tag, _verbatim(text))

    def text(self, tag: str, markdown: str) -> None:
        """Show a text in TensorBoard, at the clock where this attempt began."""
        if self._board:
            self._board.text(self._resume_samples, tag, markdown)

    def hparams(self, config: Config) -> None:
        """Give the run a row in TensorBoard's table of runs: what makes its result, and metrics."""
        if self._board:
            # What people compare, since the table shows its first columns by name: not paths, nor
            # how data is read.
            compared = config.mathematics().items()
            values = _hparam_values({k: v for k, v in compared if not k.startswith("data.")})
            self._board.hparams(values, [f"metric/{name}" for name in config.evaluate.metrics])

    def _lay_out(self, samples_seen: int, scalars: Mapping[str, float]) -> None:
        """Tell TensorBoard which curves go together: at the first tick, and as metrics come."""
        assert self._board
        before = charts_of(self._tags)
        self._tags |= dict.fromkeys(scalars)
        if (now := charts_of(self._tags)) != before:
            self._board.layout(samples_seen, now)

    def close(self, *, publish: bool = True) -> None:
        """Wait until all is written; unless ``publish``, TensorBoard's last words are let go."""
        if self._board:
            self._board.close(publish=publish)


class JsonLines:
    """A file of one JSON object a line, ``samples_seen`` strictly increasing.

    Args:
        store: folder of the file.
        name: of the file.
        resume_samples: lines with more samples are cut off, and so is a last line torn by a kill.
    """

    def __init__(self, store: Store, name: str, resume_samples: int) -> None:
        self._store = store
        self._name = name
        self._last: dict[str, Any] = {"samples_seen": -1}
        if not store.exists(name):
            return
        old = store.read(name)
        kept = ""
        for line in old.decode(errors="replace").splitlines():
            record = _parsed(line)
            if record and self._last["samples_seen"] < record["samples_seen"] <= resume_samples:
                kept += line + "\n"
                self._last = record
        if kept.encode() != old:
            store.publish(name, kept.encode())

    def write(self, samples_seen: int, values: Mapping[str, Any]) -> None:
        """Append JSON values, or add them to the last line if it has the same ``samples_seen``."""
        last = self._last["samples_seen"]
        assert samples_seen >= last, f"the clock went back from {last} to {samples_seen}"
        new = {key: _json_value(value) for key, value in values.items()}
        new = {"samples_seen": samples_seen} | new
        if samples_seen > last:
            self._last = new
            self._store.append(self._name, json.dumps(new) + "\n")
            return
        self._last |= new
        lines = self._store.read(self._name).splitlines()
        lines[-1] = json.dumps(self._last).encode()
        self._store.publish(self._name, b"\n".join(lines) + b"\n")


class TensorBoard:
    """One event file, written by a thread of its own in the order of the calls.

    The first failure is told, and ends the writing. In a run directory that is not local, the file
    is published at each tick from a local spool folder.

    Args:
        run_dir: the run directory.
        purge_step: what earlier event files hold at this step and above is not shown.
        complain: is told what failed, in the thread.
    """

    def __init__(self, run_dir: Store, purge_step: int, complain: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._purge_step = purge_step
        self._complain = complain
        self._is_broken = False
        self._spool: Path | None = None
        self._writer: SummaryWriter  # touched by the thread alone
        self._opened = ExitStack()  # likewise
        self._background = Background("tensorboard")
        self._submit(self._open)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a tag; also makes everything so far visible to readers."""

        def work() -> None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._publish()

        self._submit(work)

    def layout(self, step: int, groups: Mapping[str, Sequence[Chart]]) -> None:
        """The charts of the tab *Custom scalars*, by group; the last call's are shown."""

        def work() -> None:
            from torch.utils.tensorboard.summary import custom_scalars

            # TensorBoard looks at the beginning of a tag only.
            charts = {
                name: {chart.title: ["Multiline", [f"({chart.pattern})$"]] for chart in group}
                for name, group in groups.items()
            }
            assert self._writer.file_writer is not None
            self._writer.file_writer.add_summary(custom_scalars(charts), step)

        self._submit(work)

    def image(self, step: int, tag: str, picture: Pixels) -> None:
        """A picture, uint8 [height, width, C]."""
        self._submit(lambda: self._writer.add_image(tag, picture, step, dataformats="HWC"))

    def sound(self, step: int, tag: str, clip: NDArray[np.float32], rate: int) -> None:
        """A sound, float32 [C, t], as one channel; ``rate`` in hertz."""
        mono = clip.mean(axis=0, keepdims=True)
        self._submit(lambda: self._writer.add_audio(tag, mono, step, sample_rate=rate))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """A text in Markdown."""
        self._submit(lambda: self._writer.add_text(tag, markdown, step))

    def hparams(self, values: Mapping[str, str | float], metrics: list[str]) -> None:
        """The row in the table of runs: hyperparameters, and tags of the scalars to compare."""

        def work() -> None:
            # SummaryWriter.add_hparams would open a run of its own beside this one.
            from torch.utils.tensorboard.summary import hparams

            tags = dict.fromkeys(metrics, 0)
            experiment, start, _ = hparams(dict(values), tags)
            assert self._writer.file_writer is not None
            self._writer.file_writer.add_summary(experiment)
            self._writer.file_writer.add_summary(start)

        self._submit(work)

    def close(self, *, publish: bool = True) -> None:
        """Write all that is pending; see :meth:`Monitor.close`."""
        if publish:
            self._submit(self._publish)
        self._submit(self._opened.close)
        self._background.close()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not self._run_dir.is_local:
            self._spool = Path(tempfile.mkdtemp(prefix="gatdist-tensorboard-"))
            self._opened.callback(shutil.rmtree, self._spool, ignore_errors=True)
        # Files are read in the order of their names, which only tell the second.
        names = self._run_dir.list(TENSORBOARD_FOLDER)
        while any(f".{int(time.time()):010d}." in name for name in names):
            time.sleep(0.05)
        folder = self._spool or self._run_dir.local_path(TENSORBOARD_FOLDER)
        self._writer = SummaryWriter(str(folder), purge_step=self._purge_step)
        self._opened.callback(self._writer.close)

    def _submit(self, work: Callable[[], None]) -> None:
        self._background.submit(lambda: self._attempt(work))

    def _attempt(self, work: Callable[[], None]) -> None:
        if self._is_broken:
            return
        try:
            work()
        except Exception as error:
            self._is_broken = True
            self._complain(f"TensorBoard's files are not written any more: {error}")
            with suppress(Exception):
                self._opened.close()

    def _publish(self) -> None:
        self._writer.flush()
        if self._spool:
            for path in self._spool.iterdir():
                self._run_dir.publish_file(f"{TENSORBOARD_FOLDER}/{path.name}", path)


def _hparam_values(values: Mapping[str, Any]) -> dict[str, str | float]:
    """Dotted keys and values as the table of runs takes them: numbers, and text for the rest."""
    return {
        key: value
        if isinstance(value, int | float | str) and not isinstance(value, bool)
        else json.dumps(value)
        for key, value in values.items()
        if value is not None
    }


def _verbatim(text: str) -> str:
    """Lines as Markdown that shows them as they are."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("samples_seen"), int)
    return record if whole else None


def _json_value(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

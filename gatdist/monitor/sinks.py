"""Write a run's metrics and previews to ``metrics.jsonl``, TensorBoard and ``samples/``.

Only worker 0 has a :class:`Monitor`. Its failures end no run, and only the constructor and
:meth:`Monitor.close` wait for TensorBoard or previews. What storage rejects is kept, and uploaded
again at the next log interval and at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gatdist.common.background import Background, Coalesced
from gatdist.config import Config
from gatdist.monitor.event_files import TensorBoard
from gatdist.monitor.grid import Pixels
from gatdist.monitor.metrics import MetricsWriter, Record
from gatdist.monitor.tags import charts_of
from gatdist.monitor.uploads import Uploads

if TYPE_CHECKING:
    from gatdist.storage import Store


class Monitor:
    """The metrics, previews and texts of a run.

    On resume, it removes what earlier attempts wrote after the checkpoint.

    Args:
        resume_samples: ``samples_seen`` of the checkpoint; 0 for a fresh run.
        unwritten: metrics in the checkpoint; see :class:`MetricsWriter`.
        uploads: pending files of an earlier monitor of this attempt.
    """

    def __init__(
        self,
        run_dir: Store,
        *,
        tensorboard: bool = True,
        resume_samples: int = 0,
        unwritten: Iterable[Record] = (),
        uploads: Uploads | None = None,
    ) -> None:
        self._resume_samples = resume_samples
        self._tags: dict[str, None] = {}
        self._metrics = MetricsWriter(run_dir, resume_samples, unwritten)
        self._metrics_error = ""
        self.uploads = uploads or Uploads(run_dir)
        self._background = Background("telemetry")
        self._upload = Coalesced(self._background, self.uploads.flush)
        self._board = (
            TensorBoard(run_dir, resume_samples + 1, self._background) if tensorboard else None
        )

    @property
    def error(self) -> str:
        board = self._board.error if self._board else ""
        return self._metrics_error or board or self.uploads.error

    @property
    def missing(self) -> list[str]:
        """Descriptions of what has not been written; complete after :meth:`close`."""
        found = []
        if count := len(self._metrics.unwritten):
            found.append(f"{count:,} records of metrics")
        if self._board and not self._board.is_complete:
            found.append("some events of TensorBoard")
        if count := self.uploads.missing:
            found.append(f"{count:,} other files")
        return found

    @property
    def unwritten(self) -> list[Record]:
        return self._metrics.unwritten

    def tick(self, samples_seen: int, values: Mapping[str, float]) -> None:
        """Add one log interval's values, by TensorBoard tag, which :meth:`flush` writes.

        A second call at the same ``samples_seen`` adds to its record. A name without a slash, such
        as ``world_size``, is no tag.
        """
        self._metrics.add(samples_seen, values)
        self.scalars(samples_seen, {tag: value for tag, value in values.items() if "/" in tag})

    def scalars(self, samples_seen: int, values: Mapping[str, float]) -> None:
        """Show values in TensorBoard only, by tag."""
        if self._board:
            before = charts_of(self._tags)
            self._tags |= dict.fromkeys(values)
            if (now := charts_of(self._tags)) != before:  # a new metric needs a chart
                self._board.layout(samples_seen, now)
            self._board.scalars(samples_seen, values)

    def flush(self, *, force: bool = False) -> None:
        """Write the metrics so far; write the rest in the background.

        Failures are kept for the next call, and set :attr:`error`. With ``force``, even little is
        written to an object store, and retries take longer.
        """
        try:
            self._metrics.flush(force=force)
        except Exception as error:
            self._metrics_error = str(error)
        else:
            self._metrics_error = ""
        if self._board:
            self._board.flush()
        self._upload.request()

    def preview(
        self,
        samples_seen: int,
        tag: str,
        image: Pixels | None = None,
        audio: tuple[NDArray[np.float32], int] | None = None,
        text: str | None = None,
    ) -> None:
        """Show samples in TensorBoard; audio has the tag ``<tag>/audio``.

        Args:
            image: uint8 [height, width, C].
            audio: float32 [C, t] and its sample rate in hertz.
            text: one sample per line.
        """
        if self._board is None:
            return
        if image is not None:
            self._board.image(samples_seen, tag, image)
        if audio is not None:
            # TensorBoard allows one kind of data per tag.
            self._board.audio(samples_seen, f"{tag}/audio", *audio)
        if text is not None:
            code = "\n".join(f"    {line}" for line in text.splitlines())  # a block in Markdown
            self._board.text(samples_seen, tag, code)

    def text(self, tag: str, markdown: str, samples_seen: int | None = None) -> None:
        """Show a text in TensorBoard, by default at the step where this attempt began."""
        if self._board:
            step = self._resume_samples if samples_seen is None else samples_seen
            self._board.text(step, tag, markdown)

    def hparams(self, config: Config) -> None:
        """Add the run to TensorBoard's table of runs: keys that affect the result, and metrics."""
        if self._board:
            # Without data keys: the table shows the first columns by name.
            compared = config.result_keys().items()
            values = _hparam_values({k: v for k, v in compared if not k.startswith("data.")})
            self._board.hparams(values, [f"metric/{name}" for name in config.evaluate.metrics])

    def close(self, *, final: bool = True, publish: bool = True) -> None:
        """Write what is pending, and end the thread.

        Args:
            final: the attempt ends: merge segments of metrics, and retry longer.
            publish: false writes nothing, for storage that is known to be unavailable.
        """
        if publish:
            self.flush(force=final)
            if self._board:
                self._board.finish(patient=final)
            if final:
                self._background.submit(partial(self.uploads.flush, patient=True))
                with suppress(Exception):  # segments are as good
                    self._metrics.merge()
        self._background.close()


def _hparam_values(values: Mapping[str, Any]) -> dict[str, str | float]:
    return {
        key: value
        if isinstance(value, int | float | str) and not isinstance(value, bool)
        else json.dumps(value)
        for key, value in values.items()
        if value is not None
    }

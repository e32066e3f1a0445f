"""Console output: a progress bar on a terminal, plain lines elsewhere.

An event is a kind and fields of JSON values, so that it can travel from a worker to the driver.
Absent fields are not shown.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self, TextIO, cast

import rich.console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gatdist.common.errors import for_terminal
from gatdist.monitor.numbers import count, duration, number, percent, plural, size

Fields = Mapping[str, Any]

_RATE_MEMORY = 0.7  # weight of the past in the rate that predicts the time left
_RATE_AFTER_S = 0.5  # a rate measured over less time is a guess
_DRAW_EVERY_S, _PRINT_EVERY_S = 0.1, 10.0
_FALLBACK_COLUMNS = 80
_MIN_BAR_COLUMNS, _MAX_BAR_COLUMNS = 6, 24
_WARNING, _GOOD = "bold yellow", "green"


class Console:
    """Shows events, usually on standard error. A context manager, which ends the progress bar."""

    def __init__(self, stream: TextIO, is_terminal: bool | None = None) -> None:
        self._file = _UnbreakableFile(stream)
        self._rich = rich.console.Console(
            file=cast(IO[str], self._file),
            force_terminal=stream.isatty() if is_terminal is None else is_terminal,
        )
        self._is_terminal = self._rich.is_interactive  # false on a dumb terminal
        self._live: Live | None = None
        self._progress: _Progress = _RunProgress()
        self._alarms: Counter[str] = Counter()
        self._started_s = self._shown_s = time.monotonic()
        self._queue: deque[tuple[str, Fields]] = deque()
        self._is_busy = False

    @property
    def stream(self) -> TextIO:
        return self._file.stream

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        self._file.stream = stream

    def event(self, kind: str, fields: Fields) -> None:
        """Show one event; see ``_SHOW``."""
        self._queue.append((kind, fields))
        if self._is_busy:  # called by a signal handler while another event is being written
            return
        self._is_busy = True
        try:
            while self._queue:
                kind, fields = self._queue.popleft()
                _SHOW[kind](self, fields)
        finally:
            self._is_busy = False

    def close(self) -> None:
        """Leave the cursor on a fresh line, below the last progress."""
        self._end_progress(remove=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, fields: Fields) -> None:
        self.close()
        self._started_s = time.monotonic()
        data, total, seen = (fields.get(key) for key in ("data", "total_samples", "samples_seen"))
        self._progress = _RunProgress(total or 0, seen or 0)
        head = f"training on {data}"
        if seen and total:
            head = f"resuming on {data} at {count(seen)} of {count(total)} samples"
        parts = []
        if "num_samples" in fields:
            shards = f" in {plural(n, 'shard')}" if (n := fields.get("num_shards")) else ""
            parts.append(plural(fields["num_samples"], "sample") + shards)
        if "workers" in fields:
            device = f" on {fields['device']}" if "device" in fields else ""
            parts.append(plural(fields["workers"], "worker") + device)
        run_dir = fields.get("run_dir")
        self._print(f"{head}: {', '.join(parts)}{f' -> {shown_path(run_dir)}' if run_dir else ''}")
        if parameters := fields.get("parameters"):
            sizes = ", ".join(f"{player} {count(n)}" for player, n in parameters.items())
            self._print(f"parameters: {sizes}")
        if self._is_terminal:
            self._draw()

    def _log(self, fields: Fields) -> None:
        assert isinstance(self._progress, _RunProgress)
        self._progress.advance(fields)
        self._draw()

    def _note(self, fields: Fields) -> None:
        self._print(fields["message"])

    def _warning(self, fields: Fields) -> None:
        self._print(f" {fields['message']}", "warning:", _WARNING)

    def _alarm(self, fields: Fields) -> None:
        self._alarms[fields["name"]] += 1
        if self._alarms[fields["name"]] == 1:  # later ones are in the curves and the summary
            message = f"! {fields['message']} (at {count(fields['samples_seen'])} samples)"
            self._print("", message, _WARNING, wrap=self._is_terminal)

    def _evaluation(self, fields: Fields) -> None:
        assert isinstance(self._progress, _RunProgress)
        self._progress.metrics = fields["metrics"]
        found = metrics_text(fields["metrics"])
        took = duration(fields["seconds"])
        self._print(f"evaluated at {count(fields['samples_seen'])} samples in {took}: {found}")

    def _members(self, fields: Fields) -> None:
        seen, workers = count(fields["samples_seen"]), plural(fields["workers"], "worker")
        again = "repeating a step" if fields["steps_undone"] else "next step"
        took = duration(fields["seconds"])
        self._print(f"continuing with {workers} at {seen} samples after {took}: {again}")

    def _checkpoint(self, fields: Fields) -> None:
        if not self._is_terminal:
            self._print(f"checkpoint at {count(fields['samples_seen'])} samples")

    def _done(self, fields: Fields) -> None:
        self.close()
        metrics, run_dir = fields.get("metrics") or {}, fields.get("run_dir", "")
        message = f"after {duration(time.monotonic() - self._started_s)}"
        message += f" at {count(fields['samples_seen'])} samples"
        message += f": {fields['reason']}" if fields.get("reason") else ""
        alarms = [f"{name} ({plural(n, 'log interval')})" for name, n in self._alarms.items()]
        samples = fields.get("samples")
        rows = {
            "metrics": metrics_text(metrics),
            "alarms": ", ".join(alarms),
            "samples": shown_path(f"{run_dir}/{samples}") if samples else "",
            "curves": tensorboard_command(run_dir) if fields.get("tensorboard") else "",
        }
        stopped = fields.get("status") == "interrupted"
        self._print_summary("stopped" if stopped else "done", message, rows)

    def _work(self, fields: Fields) -> None:
        self._print(fields["message"])
        self._progress = _WorkProgress(fields["total"], unit=fields["unit"])
        self._shown_s = time.monotonic()
        if self._is_terminal:
            self._draw()

    def _advance(self, fields: Fields) -> None:
        assert isinstance(self._progress, _WorkProgress)
        self._progress.seen += fields["done"] + fields["found"]
        self._progress.done += fields["done"]
        is_last = self._progress.seen == self._progress.total
        elapsed_s = time.monotonic() - self._shown_s
        if self._is_terminal:
            is_due = is_last or elapsed_s >= _DRAW_EVERY_S
        else:
            is_due = not is_last and elapsed_s >= _PRINT_EVERY_S  # the summary follows the last
        if is_due:
            self._shown_s += elapsed_s
            self._draw()

    def _summary(self, fields: Fields) -> None:
        self._end_progress(remove=True)
        self._print_summary("done", fields["message"], fields["rows"])

    def _print_summary(self, head: str, message: str, rows: Mapping[str, str]) -> None:
        lines = [f"  {label:<10}{text}" for label, text in rows.items() if text]
        style = _GOOD if head == "done" else _WARNING
        self._print("\n".join([f" {message}", *lines]), head, style)

    def _print(self, text: str, label: str = "", style: str = "", *, wrap: bool = False) -> None:
        """Print lines above the progress bar. Text is never markup; colours in it are kept."""
        self._measure()
        line = Text.assemble((for_terminal(label), style), Text.from_ansi(for_terminal(text)))
        self._rich.print(line, soft_wrap=not wrap)

    def _draw(self) -> None:
        if not self._is_terminal:
            self._print("  ".join(self._progress.parts().values()).rstrip())
            return
        self._measure()
        if self._live is None:
            self._live = Live(
                console=self._rich,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
                get_renderable=self._line,
            )
            self._live.start()
            self._rich.show_cursor(True)  # a killed process must not leave it hidden
        self._live.refresh()

    def _end_progress(self, remove: bool) -> None:
        if self._live:
            self._live.transient = remove
            self._live.stop()
            self._live = None

    def _line(self) -> Table:
        """The progress line; parts that do not fit are dropped, the least important first."""
        columns = self._rich.width - 1
        parts = self._progress.parts()
        for name in [name for name in _DROPPED_FIRST if name in parts]:
            if _columns(parts) + 2 + _MIN_BAR_COLUMNS <= columns:
                break
            del parts[name]
        first, *others = (Text(part) for part in parts.values())
        line = Table.grid(padding=(0, 2, 0, 0))
        bar_columns = min(columns - _columns(parts) - 2, _MAX_BAR_COLUMNS)
        if bar_columns >= _MIN_BAR_COLUMNS:
            bar = ProgressBar(1.0, self._progress.share, width=bar_columns, complete_style=_GOOD)
            line.add_row(first, bar, *others)
        else:
            line.add_row(first, *others)
        return line

    def _measure(self) -> None:
        """Set the width; rich would ask standard input and output instead of the stream."""
        try:
            columns = os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError):  # no terminal
            columns = 0
        self._rich.size = rich.console.ConsoleDimensions(columns or _FALLBACK_COLUMNS, 25)


_SHOW: Mapping[str, Callable[[Console, Fields], None]] = {
    # data, run_dir, total_samples, samples_seen, workers, device, num_samples, num_shards,
    # parameters (by network)
    "start": Console._start,
    "log": Console._log,  # a line of metrics.jsonl
    "alarm": Console._alarm,  # name, message, samples_seen
    "evaluation": Console._evaluation,  # metrics, samples_seen, seconds
    "checkpoint": Console._checkpoint,  # samples_seen
    # A line of worker_changes.jsonl, and totals by tag
    "members": Console._members,
    # status, reason, samples_seen, metrics, run_dir, samples (a name in run_dir)
    "done": Console._done,
    "note": Console._note,  # message
    "warning": Console._warning,  # message
    # Other long work: message, total, unit (noun in the plural, or bytes)
    "work": Console._work,
    "progress": Console._advance,  # done, found (by an earlier start), both since the last event
    "summary": Console._summary,  # message, rows (text by label)
}


class _UnbreakableFile:
    """A stream whose failures end nothing.

    A closed terminal is an OSError, a stream closed in Python a ValueError, and a write by a signal
    handler in the middle of another write a RuntimeError.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:
        return self.stream.encoding or "ascii"

    def write(self, text: str) -> None:
        with suppress(OSError, RuntimeError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, RuntimeError, ValueError):
            self.stream.flush()


# The order in which parts of the progress line give way on a narrow terminal.
_DROPPED_FIRST = ("samples", "rate", "left", "losses", "metric")


def _columns(parts: Mapping[str, str]) -> int:
    return len("  ".join(parts.values()))


@dataclass
class _Progress(ABC):
    total: int = 0
    seen: int = 0

    @property
    def share(self) -> float:
        return min(self.seen / self.total, 1.0) if self.total else 0.0

    @abstractmethod
    def parts(self) -> dict[str, str]:
        """Each part's text, of about constant width."""


@dataclass
class _RunProgress(_Progress):
    rate: float = 0.0
    smooth_rate: float = 0.0
    losses: tuple[Any, Any] = (None, None)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def advance(self, values: Fields) -> None:
        self.seen = values["samples_seen"]
        self.rate = values.get("throughput/samples_per_s") or 0.0
        update = 1 - _RATE_MEMORY if self.smooth_rate else 1
        self.smooth_rate += update * (self.rate - self.smooth_rate)
        self.losses = values.get("loss/generator"), values.get("loss/discriminator")
        metrics = {tag: value for tag, value in values.items() if tag.startswith("metric/")}
        if metrics:
            self.metrics = {tag.removeprefix("metric/"): value for tag, value in metrics.items()}

    def parts(self) -> dict[str, str]:
        total = count(self.total)
        parts = {
            "percent": f"{self.share:4.0%}",
            "samples": f"{count(self.seen):>{len(total)}}/{total}",
        }
        if not self.rate:
            return parts | {"rate": "waiting for the first log interval"}
        left_s = max(self.total - self.seen, 0) / self.smooth_rate
        generator, discriminator = map(number, self.losses)
        parts["rate"] = f"{count(self.rate):>6}/s"
        parts["left"] = f"{duration(left_s):>7} left"
        parts["losses"] = f"loss G {generator:<6} D {discriminator:<6}"
        for name, value in list(self.metrics.items())[:1]:
            parts["metric"] = f"{name} {number(value)}"
        return parts


@dataclass
class _WorkProgress(_Progress):
    """Progress of other long work; ``done`` excludes what an earlier start had done."""

    unit: str = ""
    done: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def parts(self) -> dict[str, str]:
        shown, unit = (size, "") if self.unit == "bytes" else (count, f" {self.unit}")
        total = shown(self.total)
        parts = {
            "percent": f"{self.share:4.0%}",
            "samples": f"{shown(self.seen):>{len(total)}}/{total}{unit}",
        }
        elapsed_s = time.monotonic() - self.started_s
        if self.done and elapsed_s > _RATE_AFTER_S:
            rate = self.done / elapsed_s
            parts["rate"] = f"{shown(rate):>6}/s"
            parts["left"] = f"{duration((self.total - self.seen) / rate):>7} left"
        return parts


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics in words: ``fid 3.21 (1.40 x the real-vs-real FID), kid 0.002, …``."""
    parts = []
    for name, value in metrics.items():
        if name == "class_share_min":
            parts.append(f"rarest class {percent(value)}")
        elif name == "fid" and "fid_over_real_split" in metrics:
            ratio = number(metrics["fid_over_real_split"])
            parts.append(f"fid {number(value)} ({ratio} x the real-vs-real FID)")
        elif not name.startswith(("fid_real_split", "fid_over_real_split", "fid_class_")):
            parts.append(f"{name} {number(value)}")
    return ", ".join(parts)


def shown_path(url: str) -> str:
    """A local path below the current folder relative to it; any other path or URL as it is."""
    inside = os.path.relpath(url) if "://" not in url else url
    return url if inside.startswith("..") else inside


def tensorboard_command(run_dir: str) -> str:
    """The command that shows a run's curves, also where this environment is not activated."""
    installed = Path(sys.executable).parent / "tensorboard"
    name = "tensorboard" if shutil.which("tensorboard") else shown_path(str(installed))
    return shlex.join([name, "--logdir", shown_path(run_dir)])

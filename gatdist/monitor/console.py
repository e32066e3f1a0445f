"""What a person sees while a run goes on: one progress line on a terminal, plain lines elsewhere.

The training loop tells events as a kind and fields of JSON values, so that they can travel from a
worker to the driver, which shows them. Fields that are absent are not shown.

============== ================================================================================
kind           fields
============== ================================================================================
``start``      ``data, run_dir, total_samples, samples_seen, workers, device, num_samples,
               num_shards, parameters`` (by player)
``tick``       the line of ``metrics.jsonl``: ``samples_seen``, ``throughput/samples_per_s``,
               ``loss/generator``, ``loss/discriminator``, ``metric/…``
``note``       ``message``
``warning``    ``message``
``alarm``      ``name, message, samples_seen``
``evaluation`` ``metrics, samples_seen, seconds``
``checkpoint`` ``samples_seen``
``done``       ``status, reason, samples_seen, metrics, run_dir, samples`` (a name in ``run_dir``)
============== ================================================================================
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gatdist.monitor.numbers import count, duration, number, percent
from gatdist.monitor.terminal import MIN_BAR_COLUMNS, Style, Terminal

Fields = Mapping[str, Any]

_RATE_MEMORY = 0.7  # weight of the past in the rate that predicts the time left


class Console(Terminal):
    """Shows the events of a run.

    Args:
        stream: usually standard error.
        is_terminal: whether a line may be rewritten in place, and in colours; None asks the stream.
    """

    def __init__(self, stream: TextIO, is_terminal: bool | None = None) -> None:
        super().__init__(stream, is_terminal)
        self._progress = _Progress()
        self._alarms: Counter[str] = Counter()
        self._began = time.monotonic()
        self._waiting: deque[tuple[str, Fields]] = deque()
        self._is_busy = False
        self._show: dict[str, Callable[[Fields], None]] = {
            "start": self._start,
            "log": self._tick,
            "note": self._note,
            "warning": self._warning,
            "alarm": self._alarm,
            "evaluation": self._evaluation,
            "checkpoint": self._checkpoint,
            "done": self._done,
        }

    def event(self, kind: str, fields: Fields) -> None:
        """Show one event; see the module's table."""
        self._waiting.append((kind, fields))
        if self._is_busy:  # called by a signal handler while another event is being written
            return
        self._is_busy = True
        try:
            while self._waiting:
                kind, fields = self._waiting.popleft()
                self._show[kind](fields)
        finally:
            self._is_busy = False

    def _start(self, fields: Fields) -> None:
        self.close()
        self._began = time.monotonic()
        data, total, seen = (fields.get(key) for key in ("data", "total_samples", "samples_seen"))
        self._progress = _Progress(total or 0, seen or 0)
        if seen and total:
            head = f"resuming on {data} at {count(seen)} of {count(total)} samples"
        else:
            head = f"training on {data}"
        size = _plural(fields.get("num_samples"), "sample")
        size += _plural(fields.get("num_shards"), "shard", " in ")
        workers = _plural(fields.get("workers"), "worker")
        device = f" on {fields['device']}" if "device" in fields else ""
        run_dir = fields.get("run_dir")
        where = f" {self._style.arrow} {shown_path(run_dir)}" if run_dir else ""
        self._say(f"{head}: {', '.join(fact for fact in (size, workers + device) if fact)}{where}")
        if parameters := fields.get("parameters"):
            sizes = ", ".join(f"{player} {count(size)}" for player, size in parameters.items())
            self._say(f"parameters: {sizes}")
        if self._is_terminal:
            self._draw()

    def _tick(self, fields: Fields) -> None:
        self._progress.advance(fields)
        if self._is_terminal:
            self._draw()
        else:
            self._say("  ".join(self._progress.parts().values()).rstrip())

    def _note(self, fields: Fields) -> None:
        self._say(fields["message"])

    def _warning(self, fields: Fields) -> None:
        self._say(f"{self._style.alarm}warning:{self._style.end} {fields['message']}")

    def _alarm(self, fields: Fields) -> None:
        self._alarms[fields["name"]] += 1
        if self._alarms[fields["name"]] > 1:  # said once; the curves and the summary tell how often
            return
        message = textwrap.fill(
            f"! {fields['message']} (at {count(fields['samples_seen'])} samples)",
            self._columns(),
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        self._say(f"{self._style.alarm}{message}{self._style.end}")

    def _evaluation(self, fields: Fields) -> None:
        self._progress.metrics = fields["metrics"]
        found = metrics_text(fields["metrics"])
        took = duration(fields["seconds"])
        self._say(f"evaluated at {count(fields['samples_seen'])} samples in {took}: {found}")

    def _checkpoint(self, fields: Fields) -> None:
        if not self._is_terminal:
            self._say(f"checkpoint at {count(fields['samples_seen'])} samples")

    def _done(self, fields: Fields) -> None:
        self.close()
        metrics, run_dir = fields.get("metrics") or {}, fields.get("run_dir", "")
        stopped = fields.get("status") == "interrupted"
        word = f"{self._style.alarm}stopped" if stopped else f"{self._style.good}done"
        head = f"{word}{self._style.end} after {duration(time.monotonic() - self._began)}"
        head += f" at {count(fields['samples_seen'])} samples"
        head += f": {fields['reason']}" if fields.get("reason") else ""
        alarms = [f"{name} ({_plural(times, 'tick')})" for name, times in self._alarms.items()]
        rows = {
            "metrics": metrics_text(metrics),
            "alarms": ", ".join(alarms),
            "samples": shown_path(f"{run_dir}/{fields['samples']}")
            if fields.get("samples")
            else "",
            "curves": tensorboard_command(run_dir) if run_dir else "",
        }
        lines = [f"  {label:<10}{text}" for label, text in rows.items() if text]
        self._say("\n".join([head, *lines]))

    def _line(self, columns: int) -> str:
        return self._progress.line(columns, self._style)


@dataclass
class _Progress:
    """How far the run is, and how it does."""

    total: int = 0
    seen: int = 0
    rate: float = 0.0
    smooth_rate: float = 0.0
    generator_loss: float | None = None
    discriminator_loss: float | None = None
    metrics: Mapping[str, float] | None = None

    def advance(self, values: Fields) -> None:
        """Take in the values of one tick."""
        self.seen = values["samples_seen"]
        self.rate = values.get("throughput/samples_per_s") or 0.0
        update = 1 - _RATE_MEMORY if self.smooth_rate else 1
        self.smooth_rate += update * (self.rate - self.smooth_rate)
        self.generator_loss = values.get("loss/generator")
        self.discriminator_loss = values.get("loss/discriminator")
        metrics = {tag: value for tag, value in values.items() if tag.startswith("metric/")}
        if metrics:
            self.metrics = {tag.removeprefix("metric/"): value for tag, value in metrics.items()}

    def parts(self) -> dict[str, str]:
        """Each part's text, of about constant width from tick to tick."""
        total = count(self.total)
        parts = {
            "percent": f"{self._share():4.0%}",
            "samples": f"{count(self.seen):>{len(total)}}/{total}",
        }
        if not self.rate:
            return parts | {"rate": "waiting for the first tick"}
        left = max(self.total - self.seen, 0) / self.smooth_rate
        parts["rate"] = f"{count(self.rate):>6}/s"
        parts["left"] = f"{duration(left):>7} left"
        generator, discriminator = number(self.generator_loss), number(self.discriminator_loss)
        parts["losses"] = f"loss G {generator:<6} D {discriminator:<6}"
        for name, value in list((self.metrics or {}).items())[:1]:
            parts["metric"] = f"{name} {number(value)}"
        return parts

    def line(self, columns: int, style: Style) -> str:
        """One line of at most ``columns``; what does not fit goes, the least needed first."""
        parts = self.parts()
        for name in ("samples", "rate", "left", "losses", "metric"):
            if len("  ".join(parts.values())) + 2 + MIN_BAR_COLUMNS <= columns:
                break
            parts.pop(name, None)
        texts = list(parts.values())
        if bar := style.bar(self._share(), columns - len("  ".join(texts)) - 2):
            texts.insert(1, bar)
        return "  ".join(texts)

    def _share(self) -> float:
        return min(self.seen / self.total, 1.0) if self.total else 0.0


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics in words: ``fid 3.21 (1.4 x that of two real halves), kid 0.002, …``."""
    parts = []
    for name, value in metrics.items():
        if name in ("fid_real_split", "fid_over_real_split"):
            continue
        if name == "class_share_min":
            parts.append(f"rarest class {percent(value)}")
        elif name == "fid" and "fid_over_real_split" in metrics:
            ratio = number(metrics["fid_over_real_split"])
            parts.append(f"fid {number(value)} ({ratio} x that of two real halves)")
        else:
            parts.append(f"{name} {number(value)}")
    return ", ".join(parts)


def shown_path(url: str) -> str:
    """A local path below the current folder relative to it; any other path or URL as it is."""
    inside = os.path.relpath(url) if "://" not in url else url
    return url if inside.startswith("..") else inside


def tensorboard_command(run_dir: str) -> str:
    """What to type to see the curves of a run, also where this environment is not activated."""
    beside = Path(sys.executable).parent / "tensorboard"
    name = "tensorboard" if shutil.which("tensorboard") else shown_path(str(beside))
    return shlex.join([name, "--logdir", shown_path(run_dir)])


def _plural(value: int | None, noun: str, before: str = "") -> str:
    """``2 workers``, ``1 worker``, or nothing for None."""
    return "" if value is None else f"{before}{count(value)} {noun}{'' if value == 1 else 's'}"

"""What ``gatdist bench step`` found, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from gatdist.monitor.numbers import aligned, number

_HEAD = ("", "samples/s", "step", "× bare", "", "memory", "× bare")
_HEAD_OF_TWO = ("", "samples/s", "step", "× DDP", "", "× limit", "")


def table(found: Mapping[str, Any]) -> str:
    """The result of :func:`~gatdist.bench.step.measure`, a block for each size."""
    blocks = []
    for size, rows in groupby(found["cases"], key=lambda row: row["size"]):
        blocks.append(aligned([(size, *_HEAD[1:]), *map(_row, rows)]))
    for size, rows in groupby(found["two_processes"], key=lambda row: row["size"]):
        head = f"{size}, two processes"
        blocks.append(aligned([(head, *_HEAD_OF_TWO[1:]), *map(_row_of_two, rows)]))
    blocks.append("\n".join(_notes(found)))
    return "\n\n".join(blocks)


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        number(row["samples_per_s"]),
        _time(row["step_s"]),
        f"{row['ratio_to_bare']:.3f}",
        _spread(row["ratio_low"], row["ratio_high"]),
        f"{row['peak_bytes'] / 2**20:.1f} MiB",
        f"{row['peak_to_bare']:.3f}",
    )


def _row_of_two(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        number(row["samples_per_s"]),
        _time(row["step_s"]),
        f"{row['ratio_to_ddp']:.3f}",
        _spread(row["ratio_to_ddp_low"], row["ratio_to_ddp_high"]),
        f"{row['ratio_to_limit']:.3f}",
        _spread(row["ratio_to_limit_low"], row["ratio_to_limit_high"]),
    )


def _notes(found: Mapping[str, Any]) -> list[str]:
    facts = found["environment"]
    notes = [
        "Ratios of speeds are medians over the rounds, with the lowest and the highest.",
        "Memory: what a step needs at most beside weights, optimizers, average and batch.",
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} thread(s) a process, "
        f"torch {facts['packages']['torch']}, load {facts['load']}",
    ]
    for row in found["two_processes"]:
        if "ratio_to_fast" in row:
            notes.insert(-1, f"{row['size']}: canonical is {row['ratio_to_fast']:.3f} × fast.")
    skipped = [f"skipped {c['name']}: {c['reason']}; {c['hint']}" for c in found["skipped"]]
    return notes + skipped


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _spread(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"

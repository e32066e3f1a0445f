"""Numbers as people read them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any


def count(value: float) -> str:
    """A whole number with commas: ``192,000``."""
    return f"{round(value):,}"


def number(value: Any) -> str:
    """Three digits or so: ``0.693``, ``12.3``, ``1,234``, ``2.1e-07``; ``n/a`` if not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2g}"
    if size >= 100:
        return count(value)
    digits = 2 - math.floor(math.log10(size)) if size else 2
    return f"{value:.{min(digits, 4)}f}"


def percent(share: float) -> str:
    """A share as ``7.2%``; two digits below ten percent are enough."""
    return f"{share:.1%}" if share < 0.0995 or share > 0.985 else f"{share:.0%}"


def duration(seconds: float) -> str:
    """``4.2 s``, ``2:31`` (minutes) or ``3:05:09`` (hours)."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that gives one or more: ``512 B``, ``1.5 MB``, ``12 GB``."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while num_bytes >= 999.5 and power < len(units) - 1:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.{0 if num_bytes >= 10 or power == 0 else 1}f} {units[power]}"


def plural(value: float, noun: str, nouns: str = "") -> str:
    """``1 shard``, ``2 shards``."""
    return f"{count(value)} {noun if value == 1 else nouns or noun + 's'}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, others to the right, a line below the head."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    head, *body = rows
    for column, name in enumerate(head):
        table.add_column(Text(name), justify="right" if column else "left", no_wrap=True)
    for row in body:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())

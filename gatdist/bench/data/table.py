"""What ``gatdist bench data`` and ``bench storage`` found, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from gatdist.monitor.numbers import aligned, number, size


def table_of_data(found: Mapping[str, Any]) -> str:
    """The result of :func:`~gatdist.bench.data.local.measure`."""
    blocks = []
    for resolution, rows in groupby(found["cases"], key=lambda row: row["resolution"]):
        head = (f"{resolution} × {resolution}", "samples/s", "× limit", "")
        lines = [
            (
                row["reader"],
                number(row["samples_per_s"]),
                f"{row['ratio_to_limit']:.3f}",
                f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
            )
            for row in rows
        ]
        blocks.append(aligned([head, *lines]))
    first, memory, order = found["first_batch_s"], found["memory"], found["order"]
    notes = [
        f"first batch: {first['early']:.3f} s at the beginning of an epoch, {first['late']:.3f} s "
        f"late in it ({first['late_to_early']:.2f} ×)",
        f"memory: {size(max(memory['bytes_by_epoch']))} in ten epochs under a ceiling of "
        f"{size(memory['ceiling_bytes'])}, growth {memory['growth']:+.1%}",
        f"order of {order['num_samples']:,} samples: {size(order['resident_bytes'])}",
        *_last(found),
    ]
    return "\n\n".join([*blocks, "\n".join(notes)])


def table_of_storage(found: Mapping[str, Any]) -> str:
    """The result of :func:`~gatdist.bench.data.remote.measure`."""
    lines = [
        (f"{row['concurrency']} ranges at a time", f"{size(row['bytes_per_s'])}/s")
        for row in found["ranges"]
    ]
    head = (found["url"], "")
    epochs = [
        (
            row["case"],
            number(row["samples_per_s"]),
            f"{row['ratio_to_limit']:.3f}",
            f"{row['bytes_ratio']:.3f}",
        )
        for row in found["cases"]
    ]
    caches = [
        (
            f"{row['ranks']} ranks, one cache",
            number(row["samples_per_s"]),
            "",
            f"{row['bytes_ratio']:.3f}",
        )
        for row in found["cache"]
    ]
    notes = [
        f"first byte after {found['first_byte_s'] * 1e3:.0f} ms; decoding alone "
        f"{number(found['decode_samples_per_s'])} samples/s",
    ]
    for row in found["cases"]:
        if "ratio_to_clean" in row:
            same = "the same samples" if found["same_sequence"] else "OTHER SAMPLES"
            notes.append(f"with 1 % faults {row['ratio_to_clean']:.2f} × as fast, {same}")
    return "\n\n".join(
        [
            aligned([head, *lines]),
            aligned([("first epoch", "samples/s", "× limit", "× bytes"), *epochs, *caches]),
            "\n".join([*notes, *_last(found)]),
        ]
    )


def _last(found: Mapping[str, Any]) -> list[str]:
    facts = found["environment"]
    machine = f"{facts['processor']}, {facts['cores']} cores, load {facts['load']}"
    skipped = found.get("skipped")
    return [machine, *([f"not installed: {', '.join(skipped)}"] if skipped else [])]

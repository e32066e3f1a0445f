"""Results of the parts as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
Table = list[tuple[str, ...]]
BASELINE = "hand_written"
# The presets that matter most.
LARGE = ("r3gan-256", "stylegan2-256", "stylegan2-auto-256")
# Kernels per counted operator, and of the computed peak, above which a preset is flagged. Some
# operators launch several kernels; the allocator rounds and caches.
MOST_KERNELS, MOST_MEMORY = 1.3, 1.2
_BUSY = 0.8  # below this share of the time with a kernel, the host is too slow


def is_wrong(found: Mapping[str, Any]) -> bool:
    """Return whether a part failed, or one of its checks did."""
    rows = found.get("rows", ())
    return found["status"] != "done" or any(row["ok"] is False for row in rows)


def compared(results: Results) -> list[dict[str, Any]]:
    """Return a row for each measured step, with the ``ratio`` of its speed to the hand-written one.

    ``ratio_low`` and ``ratio_high`` are those of the slowest and the fastest rounds of both.
    """
    rows = []
    for name, found in results.items():
        kind, _, rest = name.partition("/")
        if kind != "speed" or "steps" not in found:
            continue
        preset, _, implementation = rest.partition("/")
        row: dict[str, Any] = {"preset": preset, "implementation": implementation, **found}
        base = results.get(f"speed/{preset}/{BASELINE}", {})
        if "steps" in base:
            row["ratio"] = base["step_s"] / found["step_s"]
            row["ratio_low"] = _mean(base, "low") / _mean(found, "high")
            row["ratio_high"] = _mean(base, "high") / _mean(found, "low")
        rows.append(row)
    return rows


def _mean(found: Mapping[str, Any], key: str) -> float:
    steps: Mapping[str, Any] = found["steps"]
    return sum(float(step["share"] * step[key]) for step in steps.values())


def budgets(row: Mapping[str, Any], gpu: str) -> list[dict[str, Any]]:
    """Return for each kind of step with a budget what it takes in units of the budget.

    Args:
        row: Of a measured step.
        gpu: Name of the device.

    Returns:
        ``due``, the penalties; ``kernels`` per operator; ``busy``, the share of the time with a
        kernel; ``roofline``, the least time as a share of the measured; ``flags``. Values that are
        not known are None.
    """
    found = []
    for due, limit in row["budget"].items():
        step = row["steps"][due]
        kernels = step["kernels"] / limit["operators"] if "kernels" in step else None
        least = next(
            (ms for name, ms in limit.get("roofline_ms", {}).items() if _is(name, gpu) and ms), None
        )
        busy = step["busy_s"] / step["step_s"] if "busy_s" in step else None
        flags = []
        if kernels and kernels > MOST_KERNELS:
            flags.append(f"launches {kernels:.2f} × the operators of its budget")
        if busy is not None and busy < _BUSY:
            flags.append(f"waits for the host: kernels run in {busy:.0%} of the time")
        found.append(
            {
                "due": due,
                "kernels": kernels,
                "busy": busy,
                "roofline": least / 1e3 / step["step_s"] if least else None,
                "flags": flags,
            }
        )
    peak = max((limit["peak_gib"] for limit in row["budget"].values()), default=None)
    if peak and row["peak_bytes"] > MOST_MEMORY * peak * 2**30:
        ratio = row["peak_bytes"] / 2**30 / peak
        found[0]["flags"].append(f"takes {ratio:.2f} × the memory of its budget")
    return found


def _is(model: str, gpu: str) -> bool:
    """Return whether a device's name is that of a model of the roofline, such as H100 SXM."""
    name = model.replace(" SXM", "")
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", gpu) is not None


def tables(results: Results, gpu: str) -> Iterator[tuple[str, Table]]:
    """Yield a title and a table for each subject that has results."""
    checks = [found for name, found in results.items() if name.startswith("correctness/")]
    rows = [row for found in checks for row in found.get("rows", ())]
    if rows:
        yield "Correctness", [("", "check", "found"), *map(_check, rows)]
    measured = sorted(compared(results), key=lambda row: row["preset"])
    if measured:
        yield "Speed and memory of a step", [_SPEED, *map(_speed, measured)]
    limits = [
        _limit(row, found)
        for row in measured
        if row["implementation"].startswith("gatdist")
        for found in budgets(row, gpu)
    ]
    if limits:
        yield "Compared with the computed costs", [_LIMIT, *limits]
    for name, found in results.items():
        if "kernels" in found and name.startswith("kernels/"):
            title = f"Longest kernels of {name.removeprefix('kernels/')}, all penalties due"
            yield title, [("share", "ms", "launches", "kernel"), *map(_kernel, found["kernels"])]
    missing = [
        (name, found["status"], found["message"])
        if found["status"] != "done"
        else (name, "skipped", found["skipped"])
        for name, found in results.items()
        if found["status"] != "done" or "skipped" in found
    ]
    if missing:
        yield "Parts without a result", [("part", "", "reason"), *missing]


_SPEED = (
    *("preset, batch", "implementation", "samples/s", "× hand-written", "range"),
    *("ms, mean step", "by penalties due", "ms to launch", "peak GiB"),
)
_LIMIT = (
    *("preset", "implementation", "penalties due", "kernels per budgeted operator"),
    *("time with kernels", "share of the roofline", ""),
)


def _check(row: Mapping[str, Any]) -> tuple[str, ...]:
    outcome = {True: "ok", False: "WRONG", None: "–"}[row["ok"]]
    message = row.get("reason", "")
    if "error" in row:
        message = f"error {row['error']:.2g}, at most {row['tolerance']:.2g}"
    if "speedup" in row:
        message += f"; {row['speedup']:.2f} times as fast"
    return outcome, row["name"], message


def _speed(row: Mapping[str, Any]) -> tuple[str, ...]:
    steps = row["steps"]
    by_penalties = [f"{due or 'none'}: {step['step_s'] * 1e3:.4g}" for due, step in steps.items()]
    host_s = sum(step["share"] * step["host_s"] for step in steps.values())
    ratio = ("", "")
    if "ratio" in row:
        ratio = f"{row['ratio']:.3f}", f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
    return (
        f"{row['preset']}, {row['batch']}",
        row["implementation"],
        f"{row['samples_per_s']:.4g}",
        *ratio,
        f"{row['step_s'] * 1e3:.4g}",
        "; ".join(by_penalties),
        f"{host_s * 1e3:.3g}",
        f"{row['peak_bytes'] / 2**30:.3g}",
    )


def _limit(row: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    def shown(key: str, form: str) -> str:
        return "" if found[key] is None else format(found[key], form)

    return (
        row["preset"],
        row["implementation"],
        found["due"] or "none",
        shown("kernels", ".2f"),
        shown("busy", ".0%"),
        shown("roofline", ".0%"),
        "; ".join(found["flags"]),
    )


def _kernel(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = row["name"] if len(row["name"]) <= 90 else f"{row['name'][:89]}…"
    return f"{row['share']:.1%}", f"{row['seconds'] * 1e3:.3f}", f"{row['count']:.0f}", name


def as_markdown(results: Results, gpu: str) -> str:
    """Format all tables as Markdown with aligned columns, which is readable on a terminal, too."""
    blocks = []
    for title, table in tables(results, gpu):
        cells = [[cell.replace("|", r"\|") for cell in row] for row in table]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        head, *rows = (
            f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |"
            for row in cells
        )
        rule = f"| {' | '.join('-' * width for width in widths)} |"
        blocks.append("\n".join([f"## {title}", "", head, rule, *rows]))
    return "\n\n".join(blocks) + "\n"

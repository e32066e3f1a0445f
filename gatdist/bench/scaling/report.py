"""Tables and figures of ``gatdist bench scaling``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from gatdist.monitor.figures import IDEAL, LIMIT, MEASURED, figure, files, tidy
from gatdist.monitor.numbers import aligned, duration, number, size

Points = Sequence[Mapping[str, Any]]
_HEAD = ("", "samples/s", "limit", "efficiency", "", "speedup", "step", "sent", "measured", "start")


def table(found: Mapping[str, Any]) -> str:
    """Format the result of ``gatdist bench scaling``, one block per size and mode."""
    blocks = [_block(points) for points in _curves(found["points"])]
    return "\n\n".join([*blocks, "\n".join(_notes(found))])


def _curves(points: Points) -> Iterator[list[Mapping[str, Any]]]:
    for _, same in groupby(points, key=lambda point: (point["size"], point["mode"])):
        yield list(same)


def _title(point: Mapping[str, Any]) -> str:
    batch = point["global_batch"]
    strong = point["mode"] == "strong"
    shared = f"global batch {batch}" if strong else f"{batch // point['workers']} per worker"
    return f"{point['mode']}: {shared}"


def _block(points: Points) -> str:
    first = points[0]
    metrics = [name for name in first.get("quality", {}) if name != "samples_seen"]
    head = f"{first['size']}, {first['rule']}, {_title(first)}"
    parts = list(first["phases"])
    rows = [_row(point) + tuple(number(point["quality"][m]) for m in metrics) for point in points]
    speeds = aligned([("workers", *_HEAD[1:], *metrics), *rows])
    seconds = aligned([("workers", *parts, "communication"), *map(_phases, points)])
    return f"{head}\n{speeds}\n\n{seconds}"


def _row(point: Mapping[str, Any]) -> tuple[str, ...]:
    measured = point["bytes_measured"]
    return (
        str(point["workers"]),
        number(point["samples_per_s"]),
        number(point["limit_samples_per_s"]),
        f"{point['efficiency']:.1%}",
        f"{point['efficiency_low']:.1%} to {point['efficiency_high']:.1%}",
        f"{point['speedup']:.2f} ×",
        _milliseconds(point["step_s"]),
        size(point["bytes_sent"]),
        "–" if measured is None else size(measured),
        duration(point["start_s"]),
    )


def _phases(point: Mapping[str, Any]) -> tuple[str, ...]:
    taken = [*point["phases"].values(), point["communication_s"]]
    return (str(point["workers"]), *map(_milliseconds, taken))


def _milliseconds(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms"


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [
        "Limit: N independent processes (no communication) in the same places at the same time.",
        "Efficiency: share of the limit, medians over the rounds; then the lowest and highest",
        "round. Sent: bytes per worker and step, as computed and as counted by the interfaces.",
        "Communication: time with gradients in flight, which overlaps with the phases.",
    ]
    if recovery := found["recovery"]:
        notes.append(
            f"Recovery: {duration(recovery['recovery_s'])} from the kill of one of "
            f"{recovery['workers']} workers to the next new step, with its replacement; "
            f"{duration(recovery['elastic_s'])} without it, in an elastic run."
        )
    notes += [f"skipped {s['what']}: {s['reason']}" for s in found["skipped"]]
    return notes + [_host(host) for host in found["hosts"]]


def _host(host: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in host["packages"].items())
    parts = [
        host["processor"],
        f"{host['cores']} cores",
        *filter(None, [host["gpu"]]),
        size(host["memory_bytes"]),
        f"{host['threads']} thread(s) per worker",
        versions,
    ]
    return f"{host['host']}: {', '.join(parts)}"


def draw(found: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw ``scaling.svg`` and ``.png``: speed and efficiency by size, a column per mode.

    Raises:
        ImportError: matplotlib is not installed.
    """
    curves = list(_curves(found["points"]))
    sizes = list(dict.fromkeys(curve[0]["size"] for curve in curves))
    columns = len(curves) // len(sizes)
    with figure(5.2 * columns, 5.6 * len(sizes) + 0.5) as made:
        axes = made.subplots(
            2 * len(sizes), columns, squeeze=False, height_ratios=[3, 2] * len(sizes)
        )
        for number, curve in enumerate(curves):
            row, column = 2 * (number // columns), number % columns
            _draw_speed(axes[row][column], curve, first=number == 0)
            _draw_efficiency(axes[row + 1][column], curve)
        made.supxlabel(_hardware(found["hosts"]), fontsize=8, color="#777777")
        return files(made, "scaling")


def _draw_speed(axis: Any, curve: Points, *, first: bool) -> None:
    counts = [point["workers"] for point in curve]
    speeds = [point["samples_per_s"] for point in curve]
    limits = [point["limit_samples_per_s"] for point in curve]
    ideal = [speeds[0] * count / counts[0] for count in counts]
    axis.plot(counts, ideal, color=IDEAL, linestyle=(0, (4, 3)), linewidth=1.2, label="ideal")
    axis.plot(counts, limits, "s-", color=LIMIT, markersize=5, label="no communication")
    axis.plot(counts, speeds, "o-", color=MEASURED, markersize=6, linewidth=2, label="measured")
    axis.set(title=f"{curve[0]['size']}, {_title(curve[0])}", ylabel="samples / s")
    if _is_wide(counts):
        axis.set_yscale("log", base=2)
    else:
        axis.set_ylim(0, 1.08 * max(*ideal, *limits))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.tick_params(labelbottom=False)
    if first:
        axis.legend(frameon=False, loc="upper left", reverse=True)
    _tidy(axis, counts)


def _draw_efficiency(axis: Any, curve: Points) -> None:
    counts = [point["workers"] for point in curve]
    middle = [100 * point["efficiency"] for point in curve]
    errors = [
        [100 * (point["efficiency"] - point["efficiency_low"]) for point in curve],
        [100 * (point["efficiency_high"] - point["efficiency"]) for point in curve],
    ]
    axis.axhline(100, color=LIMIT, linewidth=1.2)
    axis.errorbar(
        counts, middle, errors, fmt="o-", color=MEASURED, linewidth=2, markersize=6, capsize=4
    )
    for count, value in zip(counts, middle, strict=True):
        axis.annotate(
            f"{value:.0f} %", (count, value), (0, -18), textcoords="offset points", ha="center",
            color=MEASURED, fontsize=9,
        )  # fmt: skip
    highest = max(100 * point["efficiency_high"] for point in curve)
    axis.set(xlabel="workers", ylabel="efficiency, %", ylim=(0, max(112, 1.05 * highest)))
    _tidy(axis, counts)


def _tidy(axis: Any, counts: Sequence[int]) -> None:
    if _is_wide(counts):
        axis.set_xscale("log", base=2)
        axis.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
    else:
        axis.set_xlim(counts[0] - 0.06 * counts[-1], counts[-1] * 1.06)
    axis.set_xticks(counts, [str(count) for count in counts])
    tidy(axis)


def _is_wide(counts: Sequence[int]) -> bool:
    """Whether the axis must be logarithmic."""
    return counts[-1] > 8 * counts[0]


def _hardware(hosts: Points) -> str:
    kinds = [f"{h['gpu'] or h['processor']}, {h['cores']} cores" for h in hosts]
    counted = [f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)]
    versions = ", ".join(f"{name} {version}" for name, version in hosts[0]["packages"].items())
    return f"{'; '.join(counted)}\n{versions}"

"""What ``gatdist bench scaling`` found, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from gatdist.monitor.numbers import aligned, duration, number, size

_HEAD = ("", "samples/s", "limit", "efficiency", "", "speedup", "step", "sent", "measured", "start")


def table(found: Mapping[str, Any]) -> str:
    """The result of ``gatdist bench scaling``, a block for each size and mode."""
    blocks = [_block(points) for points in by_size_and_mode(found["points"])]
    return "\n\n".join([*blocks, "\n".join(_notes(found))])


def by_size_and_mode(points: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Neighbours of the same curve."""
    for _, same in groupby(points, key=lambda point: (point["size"], point["mode"])):
        yield list(same)


def title(point: Mapping[str, Any]) -> str:
    """What stays the same along a point's curve."""
    batch = point["global_batch"]
    strong = point["mode"] == "strong"
    shared = f"a batch of {batch}" if strong else f"{batch // point['workers']} a worker"
    return f"{point['mode']}: {shared}"


def _block(points: Sequence[Mapping[str, Any]]) -> str:
    first = points[0]
    metrics = [name for name in first.get("quality", {}) if name != "samples_seen"]
    head = f"{first['size']}, {first['rule']}, {title(first)}"
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
    return (str(point["workers"]), *("–" if s is None else _milliseconds(s) for s in taken))


def _milliseconds(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms"


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [
        "Limit: as many processes that do not communicate, in the same places at the same time.",
        "Efficiency: samples/s by the limit, medians over the rounds; then the lowest and highest",
        "round. Sent: by each worker in a step, as computed, and as the interfaces counted it.",
        "Communication: how long gradients were on their way, which overlaps with the phases.",
    ]
    if found["recovery"]:
        notes.append(_recovered(found["recovery"]))
    notes += [f"skipped {s['what']}: {s['reason']}" for s in found["skipped"]]
    return notes + [_host(host) for host in found["hosts"]]


def _recovered(recovery: Mapping[str, Any]) -> str:
    return (
        f"Recovery: one of {recovery['workers']} workers was killed, and "
        f"{duration(recovery['recovery_s'])} later a new step was made "
        f"({recovery['steps_repeated']} were repeated)."
    )


def _host(host: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in host["packages"].items())
    parts = [
        host["processor"],
        f"{host['cores']} cores",
        *filter(None, [host["gpu"]]),
        size(host["memory_bytes"]),
        f"{host['threads']} thread(s) a worker",
        versions,
    ]
    return f"{host['host']}: {', '.join(parts)}"

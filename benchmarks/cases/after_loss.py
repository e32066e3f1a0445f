"""Time without a new step after the death of a worker or host, if the others continue.

Elastic runs pause twice: until the other worker repeats the step in progress, and while the
replacement joins. Runs of a fixed size wait for it, unless they have a spare worker. Elastic runs
that restart are measured for comparison. A host returns after 6 s. The host of worker 0 and that of
worker 1 die in turn. ``samples.svg`` shows the samples seen around a fault.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.case import parser, positive, save
from benchmarks.cases.recovery import BACK_AFTER_S, SETTINGS
from benchmarks.hosts import Hosts, require_hosts
from benchmarks.runs_on_hosts import Beat, HostsRun, gaps, kill, kill_host, until
from gatdist.monitor.figures import figure

# Step times of the log are the means of many; here every step counts.
EVERY_S = 0.0
BATCH = 64
# What is drawn, in seconds before and after a fault.
_BEFORE_S, _AFTER_S = 4.0, 20.0


class Mode(NamedTuple):
    """A kind of run: its number of workers, further settings, and what it is called in a figure."""

    workers: str
    label: str
    settings: tuple[str, ...] = ("cluster.after_loss=continue",)

    @property
    def has_spare(self) -> bool:
        return "cluster.spares=1" in self.settings


MODES = {
    "elastic": Mode("1:2", "continues, elastic"),
    "fixed": Mode("2", "continues, fixed size"),
    "spare": Mode(
        "2", "continues, with a spare", ("cluster.after_loss=continue", "cluster.spares=1")
    ),
    "restart": Mode("1:2", "restarts, elastic", ("cluster.after_loss=restart",)),
}
TARGETS_S = {
    "worker, elastic": 2.5,
    "worker, fixed": 8.0,
    "worker, spare": 3.5,
    "host, elastic": 3.0,
}


def main() -> None:
    arguments = parser("after_loss", __doc__)
    arguments.add_argument("--times", type=positive, default=5)
    given = arguments.parse_args()
    require_hosts()
    measured: dict[str, list[dict[str, Any]]] = {}
    # Where a spare finds room, one worker runs on each host.
    settings = [*SETTINGS, "cluster.max_failures=100", "cluster.placement=spread"]
    for name, mode in MODES.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            Hosts(cpus=1 + mode.has_spare) as hosts,
            HostsRun(
                hosts, Path(folder), [*settings, *mode.settings], mode.workers, EVERY_S
            ) as run,
        ):
            run.start()
            for kind in ("worker", "host"):
                if mode.has_spare and kind == "host":
                    continue
                for number in range(given.times):
                    case = f"{kind}, {name}"
                    found = measure(run, mode, kind, number)
                    measured.setdefault(case, []).append(found)
                    record(settings, measured, given.out)
                    times = {key: f"{found[key]:.2f}" for key in TIMES}
                    print(case, times, flush=True)
    draw(measured, given.out / "samples.svg")
    print(table(measured))


TIMES = ("pause_s", "replaced_s", "join_s")


def measure(run: HostsRun, mode: Mode, kind: str, number: int) -> dict[str, Any]:
    """Kill the older or younger worker, or its host; return the seconds that follow.

    Returns:
        ``pause_s``, longest time without a new step that begins with the fault; ``replaced_s``,
        from then on that there was room for the replacement to its first step; ``join_s``, longest
        time without a new step while it joins; ``phases_s``, until the process of the replacement
        starts, has imported all, and makes its first step; ``samples``, seconds since the fault and
        samples seen since then, of some steps.
    """
    until(lambda: len(run.workers()) == 2, "two workers", 120)
    if mode.has_spare:
        until(lambda: sum("spare worker" in line for _, line in run.messages) > number, "it", 120)
    alive = run.workers()
    settled = max(worker.ready for worker in alive)
    until(lambda: time.time() > settled + 5 and run.moves(), "steps of both", 60)
    count, began, victim = len(run.all_workers()), time.time(), alive[number % 2]
    if kind == "worker":
        kill(victim)
    room = began if kind == "worker" else kill_host(run, victim, BACK_AFTER_S)
    replacement = until(lambda: run.all_workers()[count:], "a replacement", 120)[0]
    joined = replacement.ready
    until(lambda: time.time() > max(joined + 3, began + _AFTER_S) and run.moves(), "steps", 60)
    found = gaps(run.beats(), began)
    first = max((gap for gap in found if gap[0] < began + 2), key=lambda gap: gap[1] - gap[0])
    later = [end - start for start, end in found if first[1] <= start and end < joined + 3]
    return {
        "pause_s": first[1] - first[0],
        "replaced_s": joined - room,
        "join_s": max(later, default=0.0),
        "phases_s": {
            "process starts": replacement.started - room,
            "imports": replacement.imported - replacement.started,
            "first step": joined - replacement.imported,
        },
        "samples": _around(run.beats(), began),
    }


def _around(beats: list[Beat], began: float, every_s: float = 0.1) -> list[tuple[float, int]]:
    near = [beat for beat in beats if -_BEFORE_S < beat.time_s - began < _AFTER_S]
    reached = max((beat.step for beat in near if beat.time_s <= began), default=0)
    kept: list[tuple[float, int]] = []
    for beat in near:
        at_s = beat.time_s - began
        if not kept or at_s - kept[-1][0] >= every_s:
            kept.append((round(at_s, 2), (beat.step - reached) * BATCH))
    return kept


def record(settings: list[str], measured: dict[str, list[dict[str, Any]]], out: Path) -> None:
    result: dict[str, Any] = {
        "settings": settings,
        "modes": {name: mode._asdict() for name, mode in MODES.items()},
        "back_after_s": BACK_AFTER_S,
        "targets_s": TARGETS_S,
        "median_s": {case: medians(ones) for case, ones in measured.items()},
        "measured": measured,
    }
    save(out, result)


def medians(ones: list[dict[str, Any]]) -> dict[str, float]:
    return {key: median(one[key] for one in ones) for key in TIMES}


def table(measured: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        f"{'seconds, median':<18}{'no new step':>13}{'target':>8}{'replaced':>10}{'joining':>9}"
    ]
    for case, ones in measured.items():
        pause_s, replaced_s, join_s = medians(ones).values()
        target = f"{TARGETS_S[case]:.1f}" if case in TARGETS_S else "–"
        lines.append(f"{case:<18}{pause_s:>13.2f}{target:>8}{replaced_s:>10.2f}{join_s:>9.2f}")
    return "\n".join(lines)


def draw(measured: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw samples over time around the fault with the median pause, of each mode."""
    titles = {
        "worker": "a worker is killed",
        "host": f"a host is killed, back after {BACK_AFTER_S:.0f} s",
    }
    with figure(9, 3.4) as made:
        axes = made.subplots(1, 2, sharey=True)
        for axis, (kind, title) in zip(axes, titles.items(), strict=True):
            for name, mode in MODES.items():
                ones = sorted(measured.get(f"{kind}, {name}", []), key=lambda one: one["pause_s"])
                if ones:
                    shown = ones[len(ones) // 2]["samples"]
                    axis.plot(*zip(*shown, strict=True), label=mode.label, linewidth=1.5)
            axis.axvline(0, color="tab:red", linewidth=0.8)
            axis.set(title=title, xlabel="seconds since the fault", xlim=(-_BEFORE_S, _AFTER_S))
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("samples seen since the fault")
        axes[0].legend(frameon=False, fontsize=8)
        made.savefig(path)


if __name__ == "__main__":
    main()

"""Time without a new step after the death of a worker or host, if the others continue.

Elastic runs pause twice: until the other worker repeats the step in progress, and while the
replacement joins. Runs of a fixed size wait for it. A host returns after 6 s. The host of worker 0
and that of worker 1 die in turn.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import parser, positive, save
from benchmarks.cases.recovery import BACK_AFTER_S, SETTINGS
from benchmarks.hosts import Hosts, why_not
from benchmarks.runs_on_hosts import HostsRun, Worker, gaps, until

# Step times of the log are the means of many; here every step counts.
EVERY_S = 0.0
SIZES = {"elastic": "1:2", "fixed": "2"}


def main() -> None:
    arguments = parser("after_loss", __doc__)
    arguments.add_argument("--times", type=positive, default=5)
    given = arguments.parse_args()
    if reason := why_not():
        raise SystemExit(f"needs hosts: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts are deleted
    measured: dict[str, list[dict[str, float]]] = {}
    settings = [*SETTINGS, "cluster.after_loss=continue", "cluster.max_failures=100"]
    for size, workers in SIZES.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            Hosts() as hosts,
            HostsRun(hosts, Path(folder), settings, workers, EVERY_S) as run,
        ):
            run.start()
            for (kind, kill), number in itertools.product(KILLS.items(), range(given.times)):
                case = f"{kind}, {size}"
                found = measure(run, kill, number % 2)
                measured.setdefault(case, []).append(found)
                record(settings, measured, given.out)
                print(case, {key: round(value, 2) for key, value in found.items()}, flush=True)
    print(table(measured))


def kill_worker(run: HostsRun, worker: Worker) -> float:
    os.kill(worker.pid, signal.SIGKILL)
    return time.time()


def kill_host(run: HostsRun, worker: Worker) -> float:
    host = run.host_of(worker)
    host.kill()
    time.sleep(BACK_AFTER_S)
    began = time.time()
    run.hosts.join(host)
    return began


KILLS: dict[str, Callable[[HostsRun, Worker], float]] = {
    "worker": kill_worker,
    "host": kill_host,
}


def measure(
    run: HostsRun, kill: Callable[[HostsRun, Worker], float], number: int
) -> dict[str, float]:
    """Kill the older or younger worker; return the seconds that follow.

    Returns:
        ``pause_s``, longest time without a new step until the replacement has started;
        ``replaced_s``, from then on that there was room for it to its first step; ``join_s``,
        longest time without a new step while it joins.
    """
    until(lambda: len(run.workers()) == 2, "two workers", 120)
    alive = run.workers()
    settled = max(worker.ready for worker in alive)
    until(lambda: time.time() > settled + 5 and run.moves(), "steps of both", 60)
    count, began = len(run.all_workers()), time.time()
    room = kill(run, alive[number])
    joined = until(lambda: run.all_workers()[count:], "a replacement", 120)[0].ready
    until(lambda: time.time() > joined + 3 and run.moves(), "steps after it", 60)
    found = gaps(run.beats(), began)
    first = max(found, key=lambda gap: gap[1] - gap[0] if gap[0] < joined - 1 else 0.0)
    later = [end - start for start, end in found if first[1] <= start and end < joined + 3]
    return {
        "pause_s": first[1] - first[0],
        "replaced_s": joined - room,
        "join_s": max(later, default=0.0),
    }


def record(settings: list[str], measured: dict[str, list[dict[str, float]]], out: Path) -> None:
    result: dict[str, Any] = {
        "settings": settings,
        "back_after_s": BACK_AFTER_S,
        "median_s": {case: medians(ones) for case, ones in measured.items()},
        "measured": measured,
    }
    save(out, result)


def medians(ones: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(one[key] for one in ones) for key in ones[0]}


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"{'seconds, median':<18}{'no new step':>13}{'replaced':>10}{'joining':>9}"]
    for case, ones in measured.items():
        pause_s, replaced_s, join_s = medians(ones).values()
        lines.append(f"{case:<18}{pause_s:>13.2f}{replaced_s:>10.2f}{join_s:>9.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Soak test: a long run on two hosts with a fault every minute or two ends in the same bytes.

Faults come in random order, each once before any is repeated. Hosts that died, and a command that
ended early, are restarted. Afterwards the configuration is trained without faults in one process;
with the canonical reduction, both digests must be equal. ``--check RESULT`` only does that.

With ``--after-loss continue``, the others continue without lost workers.

Goodput is the undisturbed time of the run's steps, divided by the time from the first command to
the end of the last. The rest is attributed to the faults: the time from one to the next, minus the
undisturbed time of the new steps in it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import gatdist_command, parser, save
from benchmarks.hosts import Host, Hosts, require_hosts
from benchmarks.runs_on_hosts import SETTINGS, Beat, HostsRun, Worker, gaps, kill, lives, until
from gatdist.monitor.figures import figure
from gatdist.runs.inspection import digest

BATCH, TICK = 64, 8192
TRAINING = [
    f"run.global_batch={BATCH}",
    f"run.log_every_samples={TICK}",
    f"run.checkpoint_every_samples={TICK}",
    "run.reduction=canonical",
    "run.virtual_workers=2",
    'model.generator={name="residual", width=16}',
    'model.discriminator={name="residual", width=16}',
    'game.augmentation={name="ada", adjust_samples=20000}',
]
# Share of the soak's time for steps; the rest is for faults.
SHARE = 0.8
MAX_DRIVER_RESTARTS = 20
CHECKPOINT_FILES = ["generator.safetensors", "discriminator.safetensors", "MANIFEST.json"]


def main() -> None:
    options = parser("soak", __doc__)
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--every", default="60:120", help="seconds between faults, LOW:HIGH")
    options.add_argument("--after-loss", choices=["restart", "continue"], default="continue")
    options.add_argument("--faults", default=",".join(FAULTS), help="names (default: all)")
    options.add_argument("--check", type=Path, help="a result: only train its reference")
    options.add_argument("--reference-s", type=float, default=3 * 3600.0, help="its longest time")
    arguments = options.parse_args()
    out = arguments.check or arguments.out
    if not arguments.check:
        require_hosts()
        low_s, high_s = map(float, arguments.every.split(":"))
        cards = deck(arguments.faults.split(","), arguments.seed)
        gaps = random.Random(arguments.seed)
        with tempfile.TemporaryDirectory() as folder, Hosts() as hosts:
            soak = Soak(hosts, Path(folder), arguments.minutes, out, arguments.after_loss)
            soak.result |= {"seed": arguments.seed, "every_s": [low_s, high_s]}
            soak.run(cards, lambda: gaps.uniform(low_s, high_s))
    result = json.loads((out / "result.json").read_text())
    draw(result, out / "soak.png")
    print(table(result), flush=True)
    if result["finished"]:
        result |= compare(result, arguments.reference_s)
        save(out, result, indent=None)
        print(f"the same bytes as one undisturbed process: {result['equal']}")


def deck(names: list[str], seed: int) -> Iterator[str]:
    shuffler = random.Random(seed)
    while True:
        yield from shuffler.sample(names, len(names))


class Soak:
    """A soak of about ``minutes``; its ``result`` is written to ``out`` after each fault."""

    def __init__(
        self, hosts: Hosts, folder: Path, minutes: float, out: Path, after_loss: str
    ) -> None:
        self.hosts, self.folder, self.out = hosts, folder, out
        self.limit_s = minutes * 60 * 2 + 180
        self.random = random.Random(1)
        calm_s = min(60.0, 7 * minutes)
        self.result: dict[str, Any] = {"minutes": minutes, "finished": False, "faults": []}
        self.result["after_loss"] = after_loss
        self.training = [*TRAINING, f"cluster.after_loss={after_loss}"]
        step_s = self._undisturbed_step_s(calm_s)
        ticks = max(1, round(minutes * 60 * SHARE / step_s * BATCH / TICK))
        settings = [*self.training, f"run.total_samples={ticks * TICK}"]
        self.result |= {"step_s": step_s, "steps": ticks * TICK // BATCH, "settings": settings}
        self.train = HostsRun(hosts, folder / "soak", settings, workers="1:2")
        print(f"undisturbed, a step takes {step_s:.4f} s; {ticks * TICK // BATCH:,} steps to go")

    def _undisturbed_step_s(self, calm_s: float) -> float:
        """Time of a step on two hosts, with log intervals and checkpoints."""
        settings = [*self.training, f"run.total_samples={10**12}"]
        with HostsRun(self.hosts, self.folder / "calm", settings) as run:
            run.start()
            first = until(lambda: run.committed() and run.last(), "a first checkpoint", 180)
            time.sleep(calm_s)
            last = run.last()
            assert last is not None
            return (last.time_s - first.time_s) / (last.step - first.step)

    def run(self, cards: Iterator[str], gap_s: Callable[[], float]) -> None:
        result, began = self.result, time.time()
        result |= {"began": began, "driver_restarts": 0}
        with self.train as train:
            train.start()
            due = time.time() + gap_s()
            while self._goes_on(began):
                self.keep_hosts()
                if time.time() > due and train.moves():
                    fault = self._disturb(next(cards))
                    due = fault["at_s"] + began + gap_s()
                    self._record(time.time() - began)
                time.sleep(0.5)
            ended = time.time()
            if result["finished"]:  # perhaps before the end of the last fault
                ended = until(lambda: train.ended, "the end of the command's output", 30)
            self._record(ended - began)
            if result["finished"]:
                result["digest"] = digest(str(train.run_dir))
            save(self.out, result, indent=None)

    def _goes_on(self, began: float) -> bool:
        status = self.train.status
        if status is None:
            return time.time() - began < self.limit_s
        if status == 0:
            self.result["finished"] = True
        elif self.result["driver_restarts"] < MAX_DRIVER_RESTARTS:
            self.result["driver_restarts"] += 1
            message = self.train.messages[-1][1] if self.train.messages else ""
            print(f"the command ended with {status} ({message}); running it again", flush=True)
            self.train.start()
            return True
        return False

    def keep_hosts(self) -> None:
        alive = self.hosts.alive()
        for host in self.hosts.workers:
            if host.name not in alive:
                host.kill()
                self.join(host)

    def join(self, host: Host) -> None:
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            self.hosts.join(host)

    def _disturb(self, name: str) -> dict[str, Any]:
        before = self.train.last()
        assert before is not None
        fault: dict[str, Any] = {
            "name": name,
            "at_s": time.time() - self.result["began"],
            "step": before.step,
            "attempt": before.attempt,
            "workers": len(self.train.workers()),
        }
        print(f"{fault['at_s']:6.0f} s: {name}", flush=True)
        self.result["faults"].append(fault)
        try:
            fault["note"] = FAULTS[name](self) or ""
        except (OSError, RuntimeError, TimeoutError, ValueError, IndexError) as error:
            fault["note"] = f"failed: {error!r}"
        finally:
            for host in self.hosts.workers:
                host.plug()
        fault["over_s"] = time.time() - self.result["began"]
        return fault

    def _record(self, wall_s: float) -> None:
        result, beats = self.result, self.train.beats()
        result |= {
            "wall_s": wall_s,
            "beats": [
                [round(beat.time_s - result["began"], 1), beat.attempt, beat.step]
                for beat in thinned(beats)
            ],
            "attempts": self.train.attempts(),
            "changes": self.train.changes(),
            "messages": [
                [round(at - result["began"], 1), line]
                for at, line in self.train.messages
                if "samples/s" not in line and ("warning" in line or "continu" in line)
            ],
            "ticks": tick_errors(self.train.ticks(), result["steps"] * BATCH),
        }
        result["step_s_in_soak"] = calm_step_s(beats, result)
        gained = max((beat.step for beat in beats), default=0)
        result["goodput"] = gained * result["step_s"] / wall_s
        result["lost_s"] = losses(beats, result, wall_s)
        note_returns(beats, result, wall_s)
        save(self.out, result, indent=None)

    # What the faults below use.

    def worker(self, rank: int) -> Worker:
        workers = self.train.workers()
        return workers[min(rank, len(workers) - 1)]

    def some_host(self) -> Host:
        return self.train.host_of(self.random.choice(self.train.workers()))

    def await_next_attempt(self, timeout_s: float, without: Worker | None = None) -> None:
        """Wait until the run has started again, or continues without a worker."""
        before = self.result["faults"][-1]["attempt"]

        def again() -> bool:
            last = self.train.last()
            if self.train.status is not None or (last is not None and last.attempt > before):
                return True
            return without is not None and not lives(without)

        with suppress(TimeoutError):
            until(again, "the next start", timeout_s)


def kill_workers(soak: Soak, *ranks: int) -> None:
    workers = [soak.worker(rank) for rank in ranks] if ranks else soak.train.workers()
    for worker in workers:
        kill(worker)


def kill_host(soak: Soak, away_s: float) -> str:
    host = soak.some_host()
    host.kill()
    time.sleep(away_s)
    soak.join(host)
    return host.name


def kill_driver(soak: Soak) -> None:
    soak.train.kill_driver()
    soak.train.start()


def preempt(soak: Soak) -> str:
    host = soak.some_host()
    soak.hosts.drain(host, 12)
    time.sleep(12)
    moved = not any(worker.host == host.name and lives(worker) for worker in soak.train.workers())
    host.kill()
    time.sleep(soak.random.uniform(5, 20))
    soak.join(host)
    return f"{host.name}, {'left in time' if moved else 'not left in time'}"


def cut_network(soak: Soak, seconds: float) -> str:
    host = soak.some_host()
    host.cut()
    time.sleep(seconds)
    host.plug()
    return host.name


def pause_worker(soak: Soak) -> None:
    worker = soak.worker(soak.random.randrange(2))
    os.kill(worker.pid, signal.SIGSTOP)
    time.sleep(8)
    if lives(worker):
        os.kill(worker.pid, signal.SIGCONT)


def stop_worker(soak: Soak) -> str:
    worker = soak.worker(soak.random.randrange(2))
    os.kill(worker.pid, signal.SIGSTOP)
    soak.await_next_attempt(60, without=worker)
    return "its process is still there" if lives(worker) else ""


def flip_bit(soak: Soak) -> str:
    newest = soak.train.committed()[-1]
    file = newest / soak.random.choice(CHECKPOINT_FILES)
    content = bytearray(file.read_bytes())
    content[soak.random.randrange(len(content))] ^= 1 << soak.random.randrange(8)
    file.write_bytes(content)
    kill_workers(soak)
    soak.await_next_attempt(60)
    time.sleep(2)  # for messages of the workers
    met = any(f"{newest}/" in line for _, line in soak.train.messages[-30:])
    return f"{newest.name}/{file.name}, {'passed over' if met else 'not met'}"


def kill_in_upload(soak: Soak) -> str:
    """Kill worker 0 just before it publishes a file of its next checkpoint."""
    file = soak.random.choice(CHECKPOINT_FILES)
    soak.train.die_in_upload(file)
    soak.await_next_attempt(60)
    return f"before {file}"


FAULTS: dict[str, Callable[[Soak], str | None]] = {
    "kill_worker_0": lambda soak: kill_workers(soak, 0),
    "kill_another_worker": lambda soak: kill_workers(soak, 1),
    "kill_all_workers": kill_workers,
    "host_dies_for_6_s": partial(kill_host, away_s=6),
    "host_dies_for_40_s": partial(kill_host, away_s=40),
    "driver_dies": kill_driver,
    "preemption": preempt,
    "network_cut_for_5_s": partial(cut_network, seconds=5),
    "network_cut_for_40_s": partial(cut_network, seconds=40),
    "worker_stops_for_8_s": pause_worker,
    "worker_stops_for_good": stop_worker,
    "bit_flips": flip_bit,
    "upload_dies": kill_in_upload,
}


def thinned(beats: list[Beat], every_s: float = 2.0) -> list[Beat]:
    """Return at most one beat every ``every_s``, and the first and last of each attempt."""
    kept: list[Beat] = []
    for before, beat, after in zip([None, *beats], beats, [*beats[1:], None], strict=False):
        turns = not before or not after or not before.attempt == beat.attempt == after.attempt
        if turns or beat.time_s - kept[-1].time_s >= every_s:
            kept.append(beat)
    return kept


def note_returns(beats: list[Beat], result: dict[str, Any], wall_s: float) -> None:
    """Add to each fault the seconds until the next attempt, or None, and without a new step.

    ``again_after_s``, and ``pause_s``, the longest such time before the next fault.
    """
    faults, began = result["faults"], result["began"]
    for fault, following in itertools.zip_longest(faults, faults[1:]):
        end_s = following["at_s"] if following else wall_s
        pauses = gaps(beats, began + fault["at_s"])
        before = (min(b, began + end_s) - a for a, b in pauses if a < began + end_s)
        fault["pause_s"] = max(before, default=0.0)
        later = (b.time_s - began for b in beats if b.attempt > fault["attempt"])
        at_s = next((at for at in later if at < end_s), None)
        fault["again_after_s"] = None if at_s is None else at_s - fault["at_s"]


def losses(beats: list[Beat], result: dict[str, Any], wall_s: float) -> dict[str, list[float]]:
    began, faults = result["began"], result["faults"]
    edges = [0.0, *(fault["at_s"] for fault in faults), wall_s]
    names = ["start", *(fault["name"] for fault in faults)]
    lost: dict[str, list[float]] = {}
    reached = 0
    for name, (since, until_s) in zip(names, itertools.pairwise(edges), strict=True):
        now = max((b.step for b in beats if b.time_s - began <= until_s), default=0)
        useful_s = (now - reached) * result["step_s"]
        lost.setdefault(name, []).append(until_s - since - useful_s)
        reached = now
    return lost


def numbers_of_workers(result: dict[str, Any]) -> list[tuple[float, int]]:
    """Return the seconds at which the number of workers changed, and to which, by time."""
    found = [(one["time"], one["world_size"]) for one in result["attempts"]]
    found += [(one["time"], one["workers"]) for one in result.get("changes", [])]
    times = [(datetime.fromisoformat(time).timestamp(), workers) for time, workers in found]
    return [(at - result["began"], workers) for at, workers in sorted(times)]


def calm_step_s(beats: list[Beat], result: dict[str, Any]) -> float | None:
    """Return the median step time on two hosts over 5 s or more between faults."""
    changes, began = numbers_of_workers(result), result["began"]
    broken = [(fault["at_s"], fault.get("over_s", float("inf")) + 2) for fault in result["faults"]]
    # Times of changes are whole seconds.
    broken += [(at - 1, at + 2) for at, _ in changes]
    taken = []
    for before, beat in itertools.pairwise(thinned(beats, 5.0)):
        since, until_s = before.time_s - began, beat.time_s - began
        calm = not any(a < until_s and since < b for a, b in broken)
        sizes = [workers for at, workers in changes if at <= since]
        comparable = before.attempt == beat.attempt and sizes[-1:] == [2]
        if calm and comparable and until_s - since >= 5 and beat.step > before.step:
            taken.append((until_s - since) / (beat.step - before.step))
    return median(taken) if taken else None


def tick_errors(ticks: list[dict[str, Any]], total_samples: int) -> dict[str, Any]:
    seen = [tick["samples_seen"] for tick in ticks]
    last = seen[-1] if seen else 0
    return {
        "written": len(seen),
        "missing": sorted(set(range(TICK, last + 1, TICK)) - set(seen)),
        "in_order_and_once": seen == sorted(set(seen)),
        "last": last,
        "total_samples": total_samples,
    }


def compare(result: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Train the configuration in one process without faults, and compare the digests."""
    # A fixed folder, so that an interrupted check is resumed.
    folder = Path(tempfile.gettempdir()) / f"gatdist-soak-{result['digest'][:16]}"
    settings = [*SETTINGS, *result["settings"]]
    command = gatdist_command(
        "train", "digits", "--local", "--run-dir", str(folder), settings=settings
    )
    # As in the workers: another number of threads rounds differently.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(command, check=True, timeout=limit_s, env=environment, capture_output=True)
    found = digest(str(folder))
    shutil.rmtree(folder)
    return {
        "reference_digest": found,
        "reference_s": time.monotonic() - began,
        "equal": found == result["digest"],
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'fault':<24}{'times':>6}{'no new step, s':>17}{'lost, s':>10}{'share':>8}"]
    for name, lost in result["lost_s"].items():
        stood = [
            fault["pause_s"]
            for fault in result["faults"]
            if fault["name"] == name and "pause_s" in fault
        ]
        still = f"{median(stood):.1f}" if stood else "–"
        share = sum(lost) / result["wall_s"]
        lines.append(f"{name:<24}{len(lost):>6}{still:>17}{median(lost):>10.1f}{share:>8.1%}")
    lines.append(
        f"{len(result['faults'])} faults, {len(result['attempts'])} starts, "
        f"{result['driver_restarts']} failed commands; {result['wall_s'] / 60:.1f} minutes; "
        f"finished: {result['finished']}; goodput {result['goodput']:.2f}"
    )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    minutes = result["wall_s"] / 60
    with figure(min(18.0, 9 + minutes / 4), 6) as made:
        axis = made.subplots()
        for _, group in itertools.groupby(result["beats"], key=lambda beat: beat[1]):
            beats = list(group)
            x = [at / 60 for at, _, _ in beats]
            axis.plot(x, [step * BATCH / 1e3 for *_, step in beats], color="tab:blue")
        changes = [*numbers_of_workers(result), (result["wall_s"], 0)]
        for (since, workers), (until_s, _) in itertools.pairwise(changes):
            if workers == 1:
                axis.axvspan(since / 60, until_s / 60, color="0.88", linewidth=0)
        full = result["wall_s"] / result["step_s"] * BATCH / 1e3
        axis.plot([0, minutes], [0, full], color="0.6", linestyle=":", linewidth=1)
        axis.set(xlim=(0, minutes), ylim=(0, result["steps"] * BATCH / 1e3 * 1.03))
        for fault in result["faults"]:
            at, name = fault["at_s"] / 60, fault["name"].replace("_", " ")
            axis.axvline(at, color="tab:red", linewidth=0.6, alpha=0.6)
            place = {"transform": axis.get_xaxis_transform(), "ha": "left", "va": "bottom"}
            axis.text(at, 1.01, name, rotation=60, fontsize=7, **place)
        axis.set_xlabel("minutes (gray: one worker; dotted: two hosts without faults; red: faults)")
        axis.set_ylabel("thousand samples seen")
        axis.spines[["top", "right"]].set_visible(False)
        made.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

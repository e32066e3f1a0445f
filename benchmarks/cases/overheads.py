"""What a step pays for checkpoints in the background, and for being watched.

python -m benchmarks.cases.overheads [--rounds 7] [--turn-s 6] [--size dcgan64_w32]
                                     [--out benchmarks/results/DATE_overheads]

Two gloo processes with a thread each take the steps of `gatdist bench step`, in turns: as they are;
watched (phases told to the watchdog, a pulse twice a second to the mailbox, an actor of a real Ray,
the question whether anybody was asked to stop, and a tick's sums); watched with the tick written,
too (numbers, pictures, TensorBoard); with one checkpoint a turn (replicas compared, snapshot,
written while steps go on; a turn ends when both have); and with checkpoints back to back. All use
the classes that training uses, and the same networks. Both cores are busy, so that what is done in
the background is not free. What is summed up within a step, such as losses and norms, is part of
the step, which `gatdist bench step` holds against a bare loop.

Beside what each costs in time stands what it costs process 0, which does all the writing, in time
on the processor. Where others use the machine that is steadier; it leaves waiting out.

A turn is shorter than what lies between two checkpoints or ticks of a run. So what one of them
costs, in seconds, is also told as the share of a checkpoint every 30 s, and of a tick every
``run.log_every_samples``.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.environment import environment
from gatdist.bench.case import SIZES, Size
from gatdist.bench.gatdist_case import RULES, GatdistCase
from gatdist.bench.processes import Report, together
from gatdist.bench.rounds import interleave, settled, steps_in_a_turn
from gatdist.common.background import Background
from gatdist.common.position import here
from gatdist.data import Loader, SampleOrder, open_dataset
from gatdist.parallel.communicator import Communicator
from gatdist.runs import Checkpoints, RunDirectory
from gatdist.storage import Store
from gatdist.training.integrity import require_equal_replicas
from gatdist.training.log_interval import LogInterval
from gatdist.training.progress import Progress
from gatdist.training.recorder import Recorder

CHECKPOINT_EVERY_S = 30.0
TARGETS = {"watched": 0.01, "checkpoint every 30 s": 0.03}


class Steps:
    """The steps of one process, and what may surround them.

    Args:
        comm: both processes.
        size: of the networks.
        folder: an empty one, for the run directory and Ray's log.
    """

    def __init__(self, comm: Communicator, size: Size, folder: Path) -> None:
        self.comm, self.folder, self.open = comm, folder, ExitStack()
        # The data set is read by nobody; it has the notes and counts that a tick asks for.
        self.ours = GatdistCase(
            size, {**RULES["alternating"], "data": {"url": "builtin:digits"}}, comm
        )
        config, self.state = self.ours.config, self.ours.state
        dataset = open_dataset(config.data, comm)
        order = SampleOrder.from_config(config, dataset)
        self.loader = self.open.enter_context(
            Loader.for_worker(dataset, order, config, comm, position=0)
        )
        self.progress = Progress()
        self.ticks = LogInterval(
            config, comm, self.state, self.ours.rule, dataset, _to_nobody, self.progress
        )
        self.plain = self.ours.statistics, self.ours.timer
        directory = RunDirectory(Store(str(folder / "run")))
        if comm.is_main:
            directory.start_attempt(["here", "here"], None, "a benchmark")
        self.background = Background("run-directory")
        self.open.callback(self.background.close)
        self.recorder = Recorder(
            config, comm, directory, dataset, self.state, _to_nobody, self.background
        )
        self.open.callback(self.recorder.close)
        self.checkpoints = Checkpoints(
            Store(str(folder / "run/checkpoints")), may_commit=directory.require_current
        )
        self.open.callback(self.checkpoints.close)
        self.bridge = self._bridge()
        self.steps_between_commits = 1

    def _bridge(self) -> Any:
        """To the mailbox on a Ray that process 0 starts."""
        from gatdist.cluster.connection import connected  # sets up what Ray's import needs

        # isort: split
        import ray

        from gatdist.cluster.bridge import Bridge, Mailbox

        def connect(address: str) -> None:
            log = self.folder / "ray.log"
            self.open.enter_context(connected(address, log))

        if self.comm.is_main:
            connect("")
        address = self.comm.broadcast_object(
            ray.get_runtime_context().gcs_address if self.comm.is_main else None
        )
        if not self.comm.is_main:
            connect(address)
        self.open.callback(self.comm.any, False)  # nobody takes Ray away from the other
        place = {"name": "mailbox", "namespace": "bench", "get_if_exists": True}
        return Bridge(ray.remote(num_cpus=0)(Mailbox).options(**place).remote())

    def bare(self, num_steps: int) -> float:
        """Steps as they are. Returns seconds, as all the others do."""
        return self._timed(lambda: self._take(num_steps))

    def watched(self, num_steps: int) -> float:
        """With all that tells where the run is and whether it must stop, and one tick's sums."""
        return self._watched(num_steps, lambda values: None)

    def ticked(self, num_steps: int) -> float:
        """Also with that tick written."""

        def write(values: dict[str, Any]) -> None:
            self.recorder.tick(values)
            self.background.wait()

        return self._watched(num_steps, write)

    def checkpointed(self, num_steps: int) -> float:
        """With one checkpoint at the start of the turn."""

        def turn() -> None:
            self._commit()
            self._take(num_steps)
            self.checkpoints.wait()

        return self._timed(turn)

    def back_to_back(self, num_steps: int) -> float:
        """With one after the other."""

        def turn() -> None:
            for step in range(num_steps):
                if step % self.steps_between_commits == 0:
                    self._commit()
                self.ours.step()
            self.checkpoints.wait()

        return self._timed(turn)

    def _timed(self, turn: Callable[[], None]) -> float:
        self.comm.any(False)  # both begin at the same time
        self.ours.step()  # warms the caches up
        began = time.perf_counter()
        turn()
        self.comm.any(False)  # and end so
        return time.perf_counter() - began

    def _take(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.ours.step()

    def _watched(self, num_steps: int, use: Callable[[dict[str, Any]], None]) -> float:
        from gatdist.cluster.worker import _heartbeat

        ours, ticks = self.ours, self.ticks
        ours.statistics, ours.timer = ticks.statistics, ticks.timer
        try:
            with _heartbeat(self.bridge, self.comm.rank, self.progress) as stop:

                def turn() -> None:
                    ticks.start()
                    for _ in range(num_steps):
                        with ticks.timer("data"):
                            pass
                        ours.step()
                        ticks.step()
                        here.step += 1
                        if here.step % ticks.steps_between_polls == 0:
                            self.comm.any(stop.is_set())
                    use(ticks.sum_up(self.loader))

                return self._timed(turn)
        finally:
            ours.statistics, ours.timer = self.plain

    def _commit(self) -> None:
        tensors = self.state.tensors()
        require_equal_replicas(tensors, self.comm)
        if self.comm.is_main:
            seen = self.state.samples_seen
            self.checkpoints.save(seen, tensors, {"samples_seen": seen}, attempt=1)

    def commit_s(self) -> tuple[float, float, float]:
        """Seconds of one checkpoint by itself: replicas compared, snapshot, written."""
        tensors = self.state.tensors()
        began = time.perf_counter()
        require_equal_replicas(tensors, self.comm)
        compared = time.perf_counter()
        if self.comm.is_main:
            self.checkpoints.save(0, tensors, {"samples_seen": 0}, attempt=1)
        held = time.perf_counter()
        self.checkpoints.wait()
        return compared - began, held - compared, time.perf_counter() - held

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint's tensors."""
        return sum(t.numel() * t.element_size() for t in self.state.tensors().values())


def _to_nobody(kind: str, fields: dict[str, Any]) -> None:
    pass


def _member(
    comm: Communicator, report: Report, size: Size, rounds: int, turn_s: float, folder: Path
) -> dict[str, Any]:
    """One process's share: seconds of its turns, by case."""
    torch.set_num_threads(1)
    steps = Steps(comm, size, folder)
    with steps.open:
        steps.bare(1)
        step_s = steps.bare(3) / 3
        num_steps: int = comm.broadcast_object(steps_in_a_turn(1, step_s, turn_s))
        steps.commit_s()
        parts = steps.commit_s()
        between = max(1, math.ceil(1.2 * sum(parts) / step_s))
        steps.steps_between_commits = comm.broadcast_object(between)
        turns: dict[str, Callable[[int], float]] = {
            "bare": steps.bare,
            "watched": steps.watched,
            "watched, tick written": steps.ticked,
            "a checkpoint a turn": steps.checkpointed,
            "checkpoints back to back": steps.back_to_back,
        }
        processor_s: dict[str, list[float]] = {name: [] for name in turns}

        def turn(name: str) -> float:
            began = time.process_time()
            seconds = turns[name](num_steps)
            processor_s[name].append(time.process_time() - began)
            return seconds

        with settled():
            seconds = interleave(list(turns), rounds, turn, report)
        return {
            "seconds": seconds,
            "processor_s": {name: taken[1:] for name, taken in processor_s.items()},
            "steps_in_a_turn": num_steps,
            "steps_between_commits": steps.steps_between_commits,
            "checkpoint_bytes": steps.state_bytes,
            "checkpoint_s": dict(zip(("compare", "snapshot", "write"), parts, strict=True)),
            "samples_in_a_step": steps.ours.config.step_samples,
            "log_every_samples": steps.ours.config.run.log_every_samples,
        }


def sum_up(found: dict[str, Any]) -> dict[str, Any]:
    """Shares of a step that each case costs: of its turns, and at the frequency of a run."""
    seconds = found["seconds"]
    bare = seconds["bare"]
    step_s = median(bare) / found["steps_in_a_turn"]

    def share(mine: Sequence[float], unit: Sequence[float]) -> dict[str, float]:
        shares = [a / b - 1 for a, b in zip(mine, unit, strict=True)]
        return {"median": median(shares), "low": min(shares), "high": max(shares)}

    def shares(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        return {name: share(mine, taken["bare"]) for name, mine in taken.items() if name != "bare"}

    def extra_s(name: str, unit: str) -> float:
        return median(a - b for a, b in zip(seconds[name], seconds[unit], strict=True))

    checkpoint_s, tick_s = (
        extra_s("a checkpoint a turn", "bare"),
        extra_s("watched, tick written", "watched"),
    )
    ticks_apart_s = found["log_every_samples"] / found["samples_in_a_step"] * step_s
    return {
        "step_s": step_s,
        "shares": shares(seconds),
        "processor_shares": shares(found["processor_s"]),
        "a_checkpoint_costs_s": checkpoint_s,
        "checkpoint every 30 s": checkpoint_s / CHECKPOINT_EVERY_S,
        "a_written_tick_costs_s": tick_s,
        "tick every log_every_samples": tick_s / ticks_apart_s,
        "targets": TARGETS,
    }


def main() -> None:
    """Measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-s", type=float, default=6.0)
    parser.add_argument("--size", choices=list(SIZES), default="dcgan64_w32")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_overheads"),
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        given = SIZES[arguments.size], arguments.rounds, arguments.turn_s, Path(folder)
        found = together(2, _member, *given, report=lambda line: print(line, flush=True))[0]
    result = {"size": arguments.size, **sum_up(found), **found, "environment": environment()}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (arguments.out / "result.json").write_text(text + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """For people."""
    rounds = len(result["seconds"]["bare"])
    lines = [f"{'':<26}{'costs':>8}{'processor':>11}   (least, most of {rounds} rounds)"]
    for name, share in result["shares"].items():
        own = result["processor_shares"][name]
        spread = f"{share['low']:+.1%}, {share['high']:+.1%}; {own['low']:+.1%}, {own['high']:+.1%}"
        lines.append(f"{name:<26}{share['median']:>+8.2%}{own['median']:>+11.2%}   {spread}")
    for name, one_s in (
        ("checkpoint every 30 s", result["a_checkpoint_costs_s"]),
        ("tick every log_every_samples", result["a_written_tick_costs_s"]),
    ):
        lines.append(f"{name:<26}{result[name]:>+8.2%}   each costs {one_s:.2f} s")
    parts = ", ".join(f"{name} {s:.3f} s" for name, s in result["checkpoint_s"].items())
    size = result["checkpoint_bytes"] / 1e6
    lines.append(f"a step takes {result['step_s']:.3f} s; a checkpoint of {size:.0f} MB: {parts}")
    lines += [f"target: {name} ≤ {share:.0%}" for name, share in result["targets"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

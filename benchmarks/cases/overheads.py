"""Cost of background checkpoints and monitoring per step.

Two gloo processes with one thread each take the steps of ``gatdist bench step`` in turns: bare;
watched (watchdog, heartbeats to a mailbox actor on a real Ray, drain requests, reductions of a log
interval); watched with the log interval written (metrics, previews, TensorBoard); with one
checkpoint per turn (replicas compared, snapshot, written in the background; a turn ends when it is
written); and with checkpoints back to back. Both cores are busy, so background work is not free.

Costs are given in wall time and in CPU time of process 0, which does all the writing. CPU time is
steadier on a shared machine, and excludes waiting. A turn is shorter than the interval between two
checkpoints or log intervals of a run, so the cost of one is also given as the share of a checkpoint
every 30 s, and of a log interval every ``run.log_every_samples``.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.case import parser, positive, save
from gatdist.bench.cases import RULES, SIZES, Size, gatdist_case
from gatdist.bench.processes import Report, together
from gatdist.bench.rounds import Seconds, interleave, settled, steps_in_a_turn, timed, walls
from gatdist.common.background import Background
from gatdist.common.position import here
from gatdist.data import SampleOrder, open_dataset
from gatdist.data.loader import Loader
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
    """Steps of one process with their overheads; ``folder`` is empty."""

    def __init__(self, comm: Communicator, size: Size, folder: Path) -> None:
        self.comm, self.folder, self.open = comm, folder, ExitStack()
        # The data set is not read, but a log interval asks for its counts.
        overrides = {**RULES["alternating"], "data": {"url": "builtin:digits"}}
        self.case = gatdist_case(size, overrides, comm)
        config, self.state = self.case.config, self.case.state
        dataset = open_dataset(config.data, comm)
        order = SampleOrder.from_config(config, dataset.layout)
        self.loader = self.open.enter_context(
            Loader.for_worker(dataset, order, config, comm, position=0)
        )
        self.progress = Progress()
        self.interval = LogInterval(
            config, comm, self.state, self.case.rule, dataset, _ignore, self.progress
        )
        self.plain = self.case.statistics, self.case.timer
        directory = RunDirectory(Store(str(folder / "run")))
        if comm.is_main:
            directory.start_attempt(["here", "here"], None, "a benchmark")
        self.background = Background("run-directory")
        self.open.callback(self.background.close)
        self.recorder = Recorder(
            config,
            comm,
            directory,
            dataset,
            self.state,
            _ignore,
            self.background,
            unwritten=(),
            resume_samples=0,
        )
        self.open.callback(self.recorder.close)
        self.checkpoints = Checkpoints(
            Store(str(folder / "run/checkpoints")), may_commit=directory.require_current
        )
        self.open.callback(self.checkpoints.close)
        self.bridge = self._bridge()
        self.steps_between_commits = 1

    def _bridge(self) -> Any:
        """Connect to a mailbox on a Ray that process 0 starts."""
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
        self.open.callback(self.comm.any, False)  # Ray is stopped by both at the same time
        place = {"name": "mailbox", "namespace": "bench", "get_if_exists": True}
        return Bridge(ray.remote(num_cpus=0)(Mailbox).options(**place).remote())

    def bare(self, num_steps: int) -> Seconds:
        return self._timed(lambda: self._take(num_steps))

    def watched(self, num_steps: int) -> Seconds:
        return self._watched(num_steps, lambda values: None)

    def ticked(self, num_steps: int) -> Seconds:
        def write(values: dict[str, Any]) -> None:
            self.recorder.log(values)
            self.background.wait()

        return self._watched(num_steps, write)

    def checkpointed(self, num_steps: int) -> Seconds:
        def turn() -> None:
            self._commit()
            self._take(num_steps)
            self.checkpoints.wait()

        return self._timed(turn)

    def back_to_back(self, num_steps: int) -> Seconds:
        def turn() -> None:
            for step in range(num_steps):
                if step % self.steps_between_commits == 0:
                    self._commit()
                self.case.step()
            self.checkpoints.wait()

        return self._timed(turn)

    def _timed(self, turn: Callable[[], None]) -> Seconds:
        def both() -> None:
            turn()
            self.comm.any(False)  # both end at the same time

        self.comm.any(False)  # and start so
        self.case.step()  # warm-up
        return timed(both)

    def _take(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.case.step()

    def _watched(self, num_steps: int, use: Callable[[dict[str, Any]], None]) -> Seconds:
        from gatdist.cluster.worker import _heartbeat

        case, interval = self.case, self.interval
        case.statistics, case.timer = interval.statistics, interval.timer
        try:
            with _heartbeat(self.bridge, self.comm.rank, self.progress) as stop:

                def turn() -> None:
                    interval.start()
                    for _ in range(num_steps):
                        with interval.timer("data"):
                            pass
                        case.step()
                        interval.step()
                        here.step += 1
                        if here.step % interval.steps_between_polls == 0:
                            self.comm.any(stop.is_set())
                    use(interval.summary(self.loader))

                return self._timed(turn)
        finally:
            case.statistics, case.timer = self.plain

    def _commit(self) -> None:
        tensors = self.state.tensors()
        require_equal_replicas(tensors, self.comm)
        if self.comm.is_main:
            seen = self.state.samples_seen
            self.checkpoints.save(seen, tensors, {"samples_seen": seen}, attempt=1)

    def commit_s(self) -> tuple[float, float, float]:
        """Return the seconds of one checkpoint alone: comparing replicas, snapshot, writing."""
        tensors = self.state.tensors()
        began = time.perf_counter()
        require_equal_replicas(tensors, self.comm)
        compared = time.perf_counter()
        if self.comm.is_main:
            self.checkpoints.save(0, tensors, {"samples_seen": 0}, attempt=1)
        held = time.perf_counter()
        self.checkpoints.wait()
        return compared - began, held - compared, time.perf_counter() - held


def _ignore(kind: str, fields: dict[str, Any]) -> None:
    pass


def _member(
    comm: Communicator, report: Report, size: Size, rounds: int, turn_s: float, folder: Path
) -> dict[str, Any]:
    """One process's turns by case."""
    torch.set_num_threads(1)
    steps = Steps(comm, size, folder)
    with steps.open:
        steps.bare(1)
        step_s = steps.bare(3).wall / 3
        num_steps: int = comm.broadcast_object(steps_in_a_turn(step_s, turn_s))
        steps.commit_s()
        parts = steps.commit_s()
        between = max(1, math.ceil(1.2 * sum(parts) / step_s))
        steps.steps_between_commits = comm.broadcast_object(between)
        cases: dict[str, Callable[[int], Seconds]] = {
            "bare": steps.bare,
            "watched": steps.watched,
            "watched, tick written": steps.ticked,
            "a checkpoint a turn": steps.checkpointed,
            "checkpoints back to back": steps.back_to_back,
        }
        with settled():
            turns = interleave(list(cases), rounds, lambda name: cases[name](num_steps), report)
        tensors = steps.state.tensors().values()
        return {
            "seconds": {name: walls(taken) for name, taken in turns.items()},
            "processor_s": {name: [turn.cpu for turn in taken] for name, taken in turns.items()},
            "steps_in_a_turn": num_steps,
            "steps_between_commits": steps.steps_between_commits,
            "checkpoint_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "checkpoint_s": dict(zip(("compare", "snapshot", "write"), parts, strict=True)),
            "samples_in_a_step": steps.case.config.step_samples,
            "log_every_samples": steps.case.config.run.log_every_samples,
        }


def sum_up(found: dict[str, Any]) -> dict[str, Any]:
    """Return the relative cost of each case in its turns, and at the intervals of a run."""
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
    arguments = parser("overheads", __doc__)
    arguments.add_argument("--rounds", type=positive, default=7)
    arguments.add_argument("--turn-s", type=float, default=6.0)
    arguments.add_argument("--size", choices=SIZES, default="dcgan64_w32")
    given = arguments.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # process 1 joins the Ray of process 0
    with tempfile.TemporaryDirectory() as folder:
        plan = SIZES[given.size], given.rounds, given.turn_s, Path(folder)
        found = together(2, _member, *plan, report=print)[0]
    result = {"size": given.size, **sum_up(found), **found}
    save(given.out, result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    rounds = len(result["seconds"]["bare"])
    lines = [f"{'':<26}{'cost':>8}{'CPU':>11}   (lowest, highest of {rounds} rounds)"]
    for name, share in result["shares"].items():
        own = result["processor_shares"][name]
        spread = f"{share['low']:+.1%}, {share['high']:+.1%}; {own['low']:+.1%}, {own['high']:+.1%}"
        lines.append(f"{name:<26}{share['median']:>+8.2%}{own['median']:>+11.2%}   {spread}")
    for name, one_s in (
        ("checkpoint every 30 s", result["a_checkpoint_costs_s"]),
        ("tick every log_every_samples", result["a_written_tick_costs_s"]),
    ):
        lines.append(f"{name:<26}{result[name]:>+8.2%}   {one_s:.2f} s each")
    parts = ", ".join(f"{name} {s:.3f} s" for name, s in result["checkpoint_s"].items())
    size = result["checkpoint_bytes"] / 1e6
    lines.append(f"a step takes {result['step_s']:.3f} s; a checkpoint of {size:.0f} MB: {parts}")
    lines += [f"target: {name} ≤ {share:.0%}" for name, share in result["targets"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

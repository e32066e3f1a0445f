"""Simulation of whole runs: faults, checkpoints, lost work, restarts, absent hosts.

Faults are Poisson processes and absences are exponential, so waiting times have no memory and are
drawn anew after each event. Arrays have one entry per run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from gatdist.bench.simulate.model import Array

Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]

# Of a run with more faults, only a part is simulated, and scaled.
MOST_FAULTS = 600
_MOST_EVENTS = 6_000


@dataclass(frozen=True)
class Kind:
    """A kind of fault, see :class:`~.sections.Fault`; the rate is with all hosts."""

    name: str
    rate_per_s: float
    grows_with_hosts: bool
    detection_s: float
    restart_s: float
    away_s: float
    notice_s: float
    loses_work: bool = True


@dataclass(frozen=True)
class Situation:
    """A run without its faults.

    Attributes:
        work_s: Undisturbed time of all steps on all hosts.
        speeds: Relative speed with 0, 1, 2 … hosts away.
        snapshot_s: Seconds for which a checkpoint stops training.
        write_s: Seconds from then until it is usable.
        grows_at_once: Whether a host that returns interrupts the others to join.
    """

    work_s: float
    hosts: int
    min_hosts: int
    speeds: tuple[float, ...]
    snapshot_s: float
    write_s: float
    kinds: tuple[Kind, ...]
    grows_at_once: bool = True

    def saved(self, kind: Kind) -> bool:
        """Whether the fault loses no work: its notice suffices for a checkpoint."""
        return not kind.loses_work or (
            kind.notice_s >= self.snapshot_s + self.write_s and kind.notice_s > 0
        )

    @property
    def faults_per_s(self) -> float:
        return sum(kind.rate_per_s for kind in self.kinds)

    @property
    def losing_mtbf_s(self) -> float:
        rate = sum(kind.rate_per_s for kind in self.kinds if not self.saved(kind))
        return 1 / rate if rate else math.inf

    @property
    def mean_restart_s(self) -> float:
        if not self.faults_per_s:
            return 0.0
        standing = (k.rate_per_s * (k.detection_s + k.restart_s) for k in self.kinds)
        return sum(standing) / self.faults_per_s


@dataclass
class Outcome:
    """Seconds of simulated runs by use, each of shape (runs,).

    ``useful``: kept steps at full speed; ``slower``: their additional time with hosts away;
    ``repeated``: lost steps; ``standing``: detection, restarts and waiting for hosts.
    """

    useful: Array
    slower: Array
    repeated: Array
    snapshots: Array
    standing: Array
    faults: Array
    finished: Mask

    @property
    def total(self) -> Array:
        return self.useful + self.slower + self.repeated + self.snapshots + self.standing

    @property
    def goodput(self) -> Array:
        return self.useful / np.maximum(self.total, 1e-12)


def young_s(cost_s: float, mtbf_s: float) -> float:
    """Return Young's (1974) best interval: √(2 C M)."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_s(cost_s: float, mtbf_s: float, restart_s: float) -> float:
    """Return Young's interval refined for restarts (Daly, 2006): C + √(2 (M + R) C + C²)."""
    return cost_s + math.sqrt(2 * (mtbf_s + restart_s) * cost_s + cost_s**2)


def play(situation: Situation, intervals_s: Array, seed: int, repeats: int) -> Outcome:
    """Simulate ``repeats`` runs per interval to their end, or to their 6,000th event.

    Every interval gets the same faults as far as possible. The order is (interval, repeat).
    """
    runs = _Runs(situation, np.repeat(intervals_s, repeats), repeats, seed)
    for _ in range(_MOST_EVENTS):
        if not runs.advance():
            break
    return runs.outcome


def part_of(situation: Situation) -> tuple[Situation, float]:
    """Return the part of a run that is simulated, and how many times longer the whole is."""
    times = max(1.0, situation.work_s * situation.faults_per_s / MOST_FAULTS)
    return replace(situation, work_s=situation.work_s / times), times


class _Runs:
    """State of simulated runs; arrays of shape (runs,)."""

    def __init__(self, situation: Situation, intervals_s: Array, repeats: int, seed: int) -> None:
        self.situation, self.repeats = situation, repeats
        self.random = np.random.default_rng(seed)
        runs = len(intervals_s)
        # The next checkpoint waits for the last one's writing.
        self.interval_s = np.maximum(np.maximum(intervals_s, situation.write_s), 1e-6)
        names = [field.name for field in fields(Outcome) if field.name != "finished"]
        zeros = {name: np.zeros(runs) for name in names}
        self.outcome = Outcome(**zeros, finished=np.zeros(runs, dtype=bool))
        self.left_s = np.full(runs, situation.work_s)
        self.down_s = np.zeros(runs)
        self.away = np.zeros((runs, len(situation.kinds)))
        self.rates = np.array([k.rate_per_s for k in situation.kinds], dtype=np.float64)
        self.grows = np.array([k.grows_with_hosts for k in situation.kinds], dtype=bool)
        away_s = np.array([k.away_s for k in situation.kinds], dtype=np.float64)
        self.leaves = away_s > 0
        self.return_rates = np.divide(1.0, away_s, out=np.zeros_like(away_s), where=self.leaves)
        self.down_after_s = np.array([k.detection_s + k.restart_s for k in situation.kinds])
        self.restart_s = np.array([k.restart_s for k in situation.kinds])
        self.saved = np.array([situation.saved(k) for k in situation.kinds], dtype=bool)
        # By event: whether a checkpoint is written for it, if it loses no work.
        self.writes = np.array(
            [*(k.loses_work for k in situation.kinds), *(k.away_s > 0 for k in situation.kinds)],
            dtype=bool,
        )
        self.speeds = np.array(situation.speeds)

    def advance(self) -> bool:
        runs = np.flatnonzero(~self.outcome.finished)
        if not len(runs):
            return False
        there = self.situation.hosts - self.away[runs].sum(axis=1)
        down, enough = self.down_s[runs] > 0, there >= self.situation.min_hosts
        running = ~down & enough
        wait_s, event = self._drawn(runs, running)
        self._stand(runs, wait_s, event, down, enough)
        self._run(runs[running], wait_s[running], event[running], there[running])
        return True

    def _drawn(self, runs: Indices, running: Mask) -> tuple[Array, Indices]:
        """Seconds until the next event, and which: kind k of fault, or kinds + k for a return."""
        # Drawn for every repeat, so that intervals are compared under the same faults.
        times = self.random.standard_exponential(self.repeats)[runs % self.repeats]
        choice = self.random.random(self.repeats)[runs % self.repeats]
        if not len(self.rates):
            return np.full(len(runs), np.inf), np.zeros(len(runs), dtype=np.intp)
        away = self.away[runs]
        share = 1 - away.sum(axis=1) / self.situation.hosts
        faults = self.rates * np.where(self.grows, np.maximum(share, 0.0)[:, None], 1.0)
        returns = away * self.return_rates
        if not self.situation.grows_at_once:
            returns[running] = 0.0  # hosts join at the next restart
        cumulated = np.cumsum(np.hstack([faults, returns]), axis=1)
        total = cumulated[:, -1]
        with np.errstate(divide="ignore"):
            wait_s = times / total
        event = (cumulated < (choice * total)[:, None]).sum(axis=1)
        return wait_s, np.minimum(event, 2 * len(self.rates) - 1)

    def _stand(
        self, runs: Indices, wait_s: Array, event: Indices, down: Mask, enough: Mask
    ) -> None:
        """Update runs that restart or have too few hosts."""
        still = down | ~enough
        # A restart with too few hosts is as long as the wait for them.
        ends = down & enough & (wait_s >= self.down_s[runs])
        taken = np.where(ends, self.down_s[runs], wait_s)
        self.outcome.standing[runs[still]] += taken[still]
        self.down_s[runs[ends]] = 0.0
        hit = still & ~ends
        self._apply(runs[hit], event[hit])
        returned = hit & (event >= len(self.rates))
        # A restarting run takes the host in on the way; one that waited for it restarts now.
        self.down_s[runs[returned]] -= taken[returned]
        waited = returned & ~enough
        self.down_s[runs[waited]] = self.restart_s[event[waited] - len(self.rates)]

    def _apply(self, runs: Indices, event: Indices) -> None:
        """Apply faults, which stop a run and may remove a host, and returns of hosts."""
        kinds = len(self.rates)
        fault = event < kinds
        hit, kind = runs[fault], event[fault]
        self.outcome.faults[hit] += 1
        self.down_s[hit] = self.down_after_s[kind]
        self.away[hit, kind] += self.leaves[kind]
        self.away[runs[~fault], event[~fault] - kinds] -= 1

    def _run(self, runs: Indices, wait_s: Array, event: Indices, there: Array) -> None:
        """Update runs that train until the event, or the end of the run."""
        out, snapshot_s, interval_s = self.outcome, self.situation.snapshot_s, self.interval_s[runs]
        missing = np.minimum(self.situation.hosts - there, len(self.speeds) - 1).astype(np.intp)
        speed = self.speeds[missing]
        # To the end: all steps and checkpoints.
        steps_s = self.left_s[runs] / speed
        snapshots = np.ceil(steps_s / interval_s - 1e-9)
        need_s = steps_s + snapshots * snapshot_s + self.situation.write_s
        ends = wait_s >= need_s
        done = runs[ends]
        out.useful[done] += self.left_s[done]
        out.slower[done] += steps_s[ends] - self.left_s[done]
        out.snapshots[done] += snapshots[ends] * snapshot_s
        out.standing[done] += self.situation.write_s
        out.finished[done] = True
        # To the event.
        goes = ~ends
        runs, wait_s, event = runs[goes], wait_s[goes], event[goes]
        interval_s, speed = interval_s[goes], speed[goes]
        cycle_s = interval_s + snapshot_s
        whole = np.floor(wait_s / cycle_s)
        trained_s = np.minimum(
            whole * interval_s + np.minimum(wait_s - whole * cycle_s, interval_s), steps_s[goes]
        )
        counted = np.maximum(0.0, np.floor((wait_s - self.situation.write_s) / cycle_s))
        kinds = len(self.rates)
        kept = event >= kinds  # a host joins after a checkpoint
        kept[~kept] = self.saved[event[~kept]]
        kept_s = np.where(kept, trained_s, np.minimum(counted * interval_s, trained_s))
        writes = kept & self.writes[event]
        last_s = np.where(writes, snapshot_s, 0.0)
        out.useful[runs] += kept_s * speed
        out.slower[runs] += kept_s * (1 - speed)
        out.repeated[runs] += trained_s - kept_s
        out.snapshots[runs] += np.maximum(wait_s - trained_s, 0.0) + last_s
        out.standing[runs] += np.where(writes, self.situation.write_s, 0.0)
        self.left_s[runs] = np.maximum(self.left_s[runs] - kept_s * speed, 0.0)
        if not self.situation.grows_at_once:
            returned = -np.expm1(-wait_s[:, None] * self.return_rates)
            self.away[runs] -= self.random.binomial(self.away[runs].astype(np.int64), returned)
        self._apply(runs, event)
        back = event >= kinds
        self.down_s[runs[back]] = self.restart_s[event[back] - kinds]


def best_interval(
    situation: Situation, seed: int, candidates: int = 25, repeats: int = 16, faults: int = 100
) -> tuple[float, float, float]:
    """Find the checkpoint interval with the highest goodput by simulation.

    Intervals range from a ninth to nine times Young's. Near its maximum, goodput is a parabola over
    the logarithm of the interval.

    Returns:
        The best interval, and the range of intervals with at most 0.2 % less goodput.
    """
    guess = max(young_s(situation.snapshot_s, situation.losing_mtbf_s), situation.write_s, 1e-3)
    intervals = guess * np.geomspace(1 / 9, 9, candidates)
    intervals = np.unique(np.maximum(intervals, max(situation.write_s, 1e-3)))
    # Other faults cost the same under any interval.
    kinds = tuple(kind for kind in situation.kinds if not situation.saved(kind))
    work_s = faults * situation.losing_mtbf_s
    outcome = play(replace(situation, kinds=kinds, work_s=work_s), intervals, seed, repeats)
    useful, total = (x.reshape(-1, repeats).sum(axis=1) for x in (outcome.useful, outcome.total))
    goodput = useful / total
    logs = np.log(intervals)
    best = _top(logs, goodput)
    near = intervals[goodput >= goodput.max() * (1 - 2e-3)]
    return float(np.exp(best)), float(near.min()), float(near.max())


def _top(logs: Array, values: Array) -> float:
    near = np.abs(logs - logs[np.argmax(values)]) < 1.0
    if near.sum() < 4:
        return float(logs[np.argmax(values)])
    second, first, _ = np.polyfit(logs[near], values[near], 2)
    if second >= 0:
        return float(logs[np.argmax(values)])
    return float(np.clip(-first / (2 * second), logs[near].min(), logs[near].max()))


def mean_and_spread(outcome: Outcome, times: float) -> tuple[float, float, float]:
    """Return a run's mean and 80 % interval in seconds; the spread grows with √times."""
    total = outcome.total
    low, high = np.quantile(total, [0.1, 0.9])
    mean, wide = float(total.mean()), math.sqrt(times)
    return mean * times, mean * times + (low - mean) * wide, mean * times + (high - mean) * wide

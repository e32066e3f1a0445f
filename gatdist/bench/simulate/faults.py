"""Simulation of whole runs: faults, checkpoints, lost work, restarts, absent hosts.

A fault stops a run, which then restarts from its last checkpoint, or continues with the workers
that are left, if there are any. In the latter case a checkpoint is needed only after other faults.

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
# Times beyond this are infinite.
_NEVER_S = 1e12


@dataclass(frozen=True)
class Kind:
    """A kind of fault, see :class:`~.sections.Fault`; the rate is with all hosts.

    Attributes:
        takes: Hosts that are away for ``away_s``; a part of one: some of its workers.
        continue_s: Seconds from the detection until the workers that are left continue; None: all
            restart.
        join_s: Seconds for which a run that has continued stops when the host is back.
    """

    name: str
    rate_per_s: float
    grows_with_hosts: bool
    detection_s: float
    restart_s: float
    away_s: float
    notice_s: float
    loses_work: bool = True
    takes: float = 1.0
    continue_s: float | None = None
    join_s: float = 0.0


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
        """Whether the fault loses no work, unless no worker is left."""
        return not kind.loses_work or kind.continue_s is not None or self.announced(kind)

    def announced(self, kind: Kind) -> bool:
        """Whether its notice suffices for a checkpoint."""
        return kind.notice_s >= self.snapshot_s + self.write_s and kind.notice_s > 0

    @property
    def faults_per_s(self) -> float:
        return sum(kind.rate_per_s for kind in self.kinds)

    @property
    def losing_kinds(self) -> tuple[Kind, ...]:
        """Faults that lose work, including that of all workers at the same time."""
        kinds = tuple(kind for kind in self.kinds if not self.saved(kind))
        survived = [
            kind for kind in self.kinds if kind.continue_s is not None and not self.announced(kind)
        ]
        taken = sum(kind.rate_per_s * kind.takes for kind in survived)
        if not taken:
            return kinds
        away_s = sum(kind.rate_per_s * kind.takes * kind.away_s for kind in survived) / taken
        rate = 1 / all_lost_s(self.hosts, taken / self.hosts, away_s)
        restart_s = max(kind.restart_s for kind in survived)
        return (*kinds, Kind("all workers", rate, False, 0.0, restart_s, 0.0, 0.0))

    @property
    def losing_mtbf_s(self) -> float:
        rate = sum(kind.rate_per_s for kind in self.losing_kinds)
        return 1 / rate if rate > 1 / _NEVER_S else math.inf

    @property
    def mean_restart_s(self) -> float:
        kinds = [kind for kind in self.kinds if kind.continue_s is None]
        rate = sum(kind.rate_per_s for kind in kinds)
        standing = (k.rate_per_s * (k.detection_s + k.restart_s) for k in kinds)
        return sum(standing) / rate if rate else 0.0


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


def all_lost_s(hosts: int, rate_per_s: float, away_s: float) -> float:
    """Return the mean time until all hosts are away at once, if each comes back by itself.

    Of a birth-death process: the next host is lost after h_i = (1 + i μ h_{i−1}) / ((n − i) λ) on
    average if i are away, with λ the rate of a host and μ = 1 / ``away_s``; the sum of all h_i.
    """
    total = next_s = 0.0
    for away in range(hosts):
        next_s = (1 + away * next_s / max(away_s, 1e-9)) / ((hosts - away) * rate_per_s)
        total += next_s
        if total > _NEVER_S:
            return math.inf
    return total


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
        self.takes = np.array([k.takes for k in situation.kinds], dtype=np.float64)
        self.return_rates = np.divide(1.0, away_s, out=np.zeros_like(away_s), where=self.leaves)
        self.down_after_s = np.array([k.detection_s + k.restart_s for k in situation.kinds])
        self.restart_s = np.array([k.restart_s for k in situation.kinds])
        self.joins = np.array([k.continue_s is not None for k in situation.kinds], dtype=bool)
        self.continue_s = np.array([k.detection_s + (k.continue_s or 0.0) for k in situation.kinds])
        self.join_s = np.array([k.join_s for k in situation.kinds])
        self.pauses = np.array([not k.loses_work for k in situation.kinds], dtype=bool)
        self.announced = np.array([situation.announced(k) for k in situation.kinds], dtype=bool)
        self.speeds = np.array(situation.speeds)
        # Since a run has started: time of training and snapshots.
        self.clock_s = np.zeros(runs)
        # Since its last complete checkpoint: time of training, and work.
        self.unsaved_s, self.unsaved_work_s = np.zeros(runs), np.zeros(runs)
        # Whether the workers hold no state, so that they must restart.
        self.empty = np.ones(runs, dtype=bool)

    def advance(self) -> bool:
        runs = np.flatnonzero(~self.outcome.finished)
        if not len(runs):
            return False
        there = self._there(runs)
        down, enough = self.down_s[runs] > 0, there >= self.situation.min_hosts
        running = ~down & enough
        wait_s, event = self._drawn(runs, running)
        self._stand(runs, wait_s, event, down, enough)
        self._run(runs[running], wait_s[running], event[running], there[running])
        return True

    def _there(self, runs: Indices) -> Array:
        """Hosts, some of which may have lost a part of their workers."""
        return np.round(self.situation.hosts - self.away[runs] @ self.takes, 9)

    def _drawn(self, runs: Indices, running: Mask) -> tuple[Array, Indices]:
        """Seconds until the next event, and which: kind k of fault, or kinds + k for a return."""
        # Drawn for every repeat, so that intervals are compared under the same faults.
        times = self.random.standard_exponential(self.repeats)[runs % self.repeats]
        choice = self.random.random(self.repeats)[runs % self.repeats]
        if not len(self.rates):
            return np.full(len(runs), np.inf), np.zeros(len(runs), dtype=np.intp)
        away = self.away[runs]
        share = self._there(runs) / self.situation.hosts
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
        self.down_s[runs[still]] = np.maximum(self.down_s[runs[still]] - taken[still], 0.0)
        hit = still & ~ends
        self._apply(runs[hit], event[hit])
        # A restarting run takes a host in on the way; one that waited for it restarts now.
        waited = hit & ~enough & (event >= len(self.rates))
        self._take_in(runs[waited], event[waited] - len(self.rates))

    def _apply(self, runs: Indices, event: Indices) -> None:
        """Apply faults, which stop a run and may remove a host, and returns of hosts."""
        kinds = len(self.rates)
        fault = event < kinds
        self.away[runs[~fault], event[~fault] - kinds] -= 1
        hit, kind = runs[fault], event[fault]
        self.outcome.faults[hit] += 1
        continues = self._continues(hit, kind)
        self.away[hit, kind] += self.leaves[kind]
        after_s = np.where(continues, self.continue_s[kind], self.down_after_s[kind])
        self.down_s[hit] = np.where(continues, np.maximum(self.down_s[hit], after_s), after_s)
        continues |= self.pauses[kind]
        self._lose(hit[~continues & ~self.announced[kind]])
        self._start_anew(hit[~continues])

    def _continues(self, runs: Indices, kind: Indices) -> Mask:
        """Whether the workers that a fault leaves continue."""
        left = self._there(runs) - self.takes[kind] > 0
        continues: Mask = self.joins[kind] & left & ~self.empty[runs]
        return continues

    def _take_in(self, runs: Indices, kind: Indices) -> None:
        """Let hosts that are back join, which takes a restart if the run does not continue."""
        self.down_s[runs] = np.where(
            self.joins[kind] & ~self.empty[runs],
            self.down_s[runs] + self.join_s[kind],  # not before the loss is detected
            self.restart_s[kind],
        )

    def _lose(self, runs: Indices) -> None:
        """Return to the last checkpoint."""
        out, unsaved_s, work_s = self.outcome, self.unsaved_s[runs], self.unsaved_work_s[runs]
        out.useful[runs] -= work_s
        out.slower[runs] -= unsaved_s - work_s
        out.repeated[runs] += unsaved_s
        self.left_s[runs] += work_s

    def _start_anew(self, runs: Indices) -> None:
        """Forget the workers' state."""
        self.clock_s[runs] = self.unsaved_s[runs] = self.unsaved_work_s[runs] = 0.0
        self.empty[runs] = True

    def _trained_s(self, clock_s: Array, interval_s: Array) -> Array:
        """Return the time of training without snapshots."""
        cycle_s = interval_s + self.situation.snapshot_s
        whole = np.floor(clock_s / cycle_s)
        return whole * interval_s + np.minimum(clock_s - whole * cycle_s, interval_s)

    def _run(self, runs: Indices, wait_s: Array, event: Indices, there: Array) -> None:
        """Update runs that train until the event, or the end of the run."""
        out, snapshot_s, interval_s = self.outcome, self.situation.snapshot_s, self.interval_s[runs]
        self.empty[runs] = False
        speed = np.interp(self.situation.hosts - there, np.arange(len(self.speeds)), self.speeds)
        # To the end: all steps and checkpoints.
        clock_s = self.clock_s[runs]
        before_s = self._trained_s(clock_s, interval_s)
        steps_s = self.left_s[runs] / speed
        snapshots = np.ceil((before_s + steps_s) / interval_s - 1e-9)
        snapshots_s = np.maximum(snapshots * snapshot_s - (clock_s - before_s), 0.0)
        ends = wait_s >= steps_s + snapshots_s + self.situation.write_s
        done = runs[ends]
        out.useful[done] += self.left_s[done]
        out.slower[done] += steps_s[ends] - self.left_s[done]
        out.snapshots[done] += snapshots_s[ends]
        out.standing[done] += self.situation.write_s
        out.finished[done] = True
        # To the event.
        goes = ~ends
        runs, wait_s, event, speed = runs[goes], wait_s[goes], event[goes], speed[goes]
        interval_s, before_s = interval_s[goes], before_s[goes]
        self.clock_s[runs] += wait_s
        after_s = self._trained_s(self.clock_s[runs], interval_s)
        trained_s = np.minimum(after_s - before_s, steps_s[goes])
        out.useful[runs] += trained_s * speed
        out.slower[runs] += trained_s * (1 - speed)
        out.snapshots[runs] += np.maximum(wait_s - trained_s, 0.0)
        self.left_s[runs] = np.maximum(self.left_s[runs] - trained_s * speed, 0.0)
        self._save(runs, trained_s, speed, after_s)
        if not self.situation.grows_at_once:
            returned = -np.expm1(-wait_s[:, None] * self.return_rates)
            self.away[runs] -= self.random.binomial(self.away[runs].astype(np.int64), returned)
        self._write_for(runs, event)
        self._apply(runs, event)
        back = event >= len(self.rates)
        self._take_in(runs[back], event[back] - len(self.rates))

    def _save(self, runs: Indices, trained_s: Array, speed: Array, after_s: Array) -> None:
        """Take note of what has been trained at a speed, and of checkpoints that are complete."""
        interval_s = self.interval_s[runs]
        complete = np.floor(
            (self.clock_s[runs] - self.situation.write_s) / (interval_s + self.situation.snapshot_s)
        )
        total_s = self.unsaved_s[runs] + trained_s
        work_s = self.unsaved_work_s[runs] + trained_s * speed
        unsaved_s = np.minimum(after_s - np.maximum(complete, 0.0) * interval_s, total_s)
        # What was trained before at other speeds is taken as evenly mixed.
        mixed = np.divide(work_s, total_s, out=np.ones_like(work_s), where=total_s > 0)
        self.unsaved_work_s[runs] = unsaved_s * np.where(unsaved_s <= trained_s, speed, mixed)
        self.unsaved_s[runs] = unsaved_s

    def _write_for(self, runs: Indices, event: Indices) -> None:
        """Write a checkpoint before a restart that is announced: by a notice, or for a host."""
        kinds = len(self.rates)
        if not kinds:
            return
        kind, returns = event % kinds, event >= kinds
        announced = self.announced[kind] & ~self.pauses[kind] & ~self._continues(runs, kind)
        runs = runs[np.where(returns, ~self.joins[kind], announced)]
        self.outcome.snapshots[runs] += self.situation.snapshot_s
        self.outcome.standing[runs] += self.situation.write_s
        self._start_anew(runs)


def mean_and_spread(outcome: Outcome, times: float) -> tuple[float, float, float]:
    """Return a run's mean and 80 % interval in seconds; the spread grows with √times."""
    total = outcome.total
    low, high = np.quantile(total, [0.1, 0.9])
    mean, wide = float(total.mean()), math.sqrt(times)
    return mean * times, mean * times + (low - mean) * wide, mean * times + (high - mean) * wide

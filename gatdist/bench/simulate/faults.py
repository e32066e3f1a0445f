"""Whole runs, played from fault to fault: checkpoints, lost work, restarts, hosts that are away.

Between two faults all is determined, so time jumps from one event to the next; many runs are
played at once, one in each lane of the arrays. Faults are Poisson processes, and a host that is
away comes back after an exponential time: so what a lane is waiting for has no memory, and can be
drawn anew after each event.

A checkpoint begins every interval of training: the steps stand still for its snapshot, and it
counts once it is written behind their back. One that is due before then waits. What was trained
since the last that counts is lost when a fault comes unannounced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Of a run with more faults a part is played, and the rest taken to be like it.
MOST_FAULTS = 600
_MOST_EVENTS = 6_000


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: of it.
        rate_per_s: with all hosts there.
        grows_with_hosts: whether fewer hosts have fewer.
        detection_s: standing still before anything is done.
        restart_s: from then to the first new step.
        away_s: mean time for which the host is away; 0 where none is.
        notice_s: by which it is told before.
        loses_work: whether what was trained since the last checkpoint is lost.
    """

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
    """A run, before its faults.

    Attributes:
        work_s: steps of all hosts, undisturbed.
        hosts: at the start.
        min_hosts: with so many it goes on.
        speeds: of steps with 0, 1, 2 … hosts away, as shares of that with all.
        snapshot_s: for which a checkpoint stops the steps.
        write_s: until it counts, from then.
        kinds: of faults.
        grows_at_once: whether a host that comes back stops the others, to take part.
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
        """Whether its notice is enough for a checkpoint, or none is needed."""
        return not kind.loses_work or (
            kind.notice_s >= self.snapshot_s + self.write_s and kind.notice_s > 0
        )

    @property
    def faults_per_s(self) -> float:
        """Of all kinds, with all hosts there."""
        return sum(kind.rate_per_s for kind in self.kinds)

    @property
    def losing_mtbf_s(self) -> float:
        """Mean time between faults that cost the work since the last checkpoint."""
        rate = sum(kind.rate_per_s for kind in self.kinds if not self.saved(kind))
        return 1 / rate if rate else math.inf

    @property
    def mean_restart_s(self) -> float:
        """Standing still after a fault, on average."""
        if not self.faults_per_s:
            return 0.0
        standing = (k.rate_per_s * (k.detection_s + k.restart_s) for k in self.kinds)
        return sum(standing) / self.faults_per_s


@dataclass
class Outcome:
    """Where the time of played runs went, in seconds, each of shape (lanes,).

    Attributes:
        useful: steps at the speed of all hosts, whose result was kept.
        slower: that they took longer, since hosts were away.
        repeated: steps whose result was lost.
        snapshots: standing still for checkpoints.
        standing: being detected, restarting, waiting for hosts.
        faults: how many.
        finished: whether the run came to its end.
    """

    useful: Array
    slower: Array
    repeated: Array
    snapshots: Array
    standing: Array
    faults: Array
    finished: NDArray[np.bool_]

    @property
    def total(self) -> Array:
        """Of the clock on the wall."""
        return self.useful + self.slower + self.repeated + self.snapshots + self.standing

    @property
    def goodput(self) -> Array:
        """The share that was useful."""
        return self.useful / np.maximum(self.total, 1e-12)


def young_s(cost_s: float, mtbf_s: float) -> float:
    """The best interval by Young (1974): √(2 C M)."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_s(cost_s: float, mtbf_s: float, restart_s: float) -> float:
    """Young's, refined for restarts: C + √(2 (M + R) C + C²) (after Daly, 2006)."""
    return cost_s + math.sqrt(2 * (mtbf_s + restart_s) * cost_s + cost_s**2)


def play(situation: Situation, intervals_s: Array, seed: int, repeats: int) -> Outcome:
    """Play runs to their end, or to their 6,000th event: they are getting nowhere then.

    Args:
        situation: of all of them.
        intervals_s: between checkpoints, of shape (n,).
        seed: of the faults, which are the same under every interval as far as they can be.
        repeats: runs under each interval.

    Returns:
        With lanes in the order (interval, repeat).
    """
    players = _Lanes(situation, np.repeat(intervals_s, repeats), repeats, seed)
    for _ in range(_MOST_EVENTS):
        if not players.advance():
            break
    return players.outcome


def part_of(situation: Situation) -> tuple[Situation, float]:
    """The part of a run that is played, and how many times longer the whole is."""
    expected = situation.work_s * situation.faults_per_s
    times = max(1.0, expected / MOST_FAULTS)
    return replace(situation, work_s=situation.work_s / times), times


class _Lanes:
    """Runs under way, one a lane."""

    def __init__(self, situation: Situation, intervals_s: Array, repeats: int, seed: int) -> None:
        self.it, self.repeats = situation, repeats
        self.random = np.random.default_rng(seed)
        lanes = len(intervals_s)
        # The next checkpoint waits for the last one's writing.
        self.interval_s = np.maximum(np.maximum(intervals_s, situation.write_s), 1e-6)
        names = [field.name for field in fields(Outcome) if field.name != "finished"]
        zeros = {name: np.zeros(lanes) for name in names}
        self.outcome = Outcome(**zeros, finished=np.zeros(lanes, dtype=bool))
        self.left_s = np.full(lanes, situation.work_s)
        self.down_s = np.zeros(lanes)
        self.away = np.zeros((lanes, len(situation.kinds)))
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
        """Move every lane to its next event. False once all have ended."""
        lanes = np.flatnonzero(~self.outcome.finished)
        if not len(lanes):
            return False
        there = self.it.hosts - self.away[lanes].sum(axis=1)
        down, enough = self.down_s[lanes] > 0, there >= self.it.min_hosts
        running = ~down & enough
        wait_s, event = self._drawn(lanes, running)
        self._stand(lanes, wait_s, event, down, enough)
        self._run(lanes[running], wait_s[running], event[running], there[running])
        return True

    def _drawn(
        self, lanes: NDArray[np.intp], running: NDArray[np.bool_]
    ) -> tuple[Array, NDArray[np.intp]]:
        """Seconds until the next event, and which: kind k of fault, or kinds + k for a return."""
        # All are drawn for every repeat, so that intervals are compared under the same faults.
        times = self.random.standard_exponential(self.repeats)[lanes % self.repeats]
        choice = self.random.random(self.repeats)[lanes % self.repeats]
        if not len(self.rates):
            return np.full(len(lanes), np.inf), np.zeros(len(lanes), dtype=np.intp)
        away = self.away[lanes]
        share = 1 - away.sum(axis=1) / self.it.hosts
        faults = self.rates * np.where(self.grows, np.maximum(share, 0.0)[:, None], 1.0)
        returns = away * self.return_rates
        if not self.it.grows_at_once:
            returns[running] = 0.0  # they do not matter before the next restart
        cumulated = np.cumsum(np.hstack([faults, returns]), axis=1)
        total = cumulated[:, -1]
        with np.errstate(divide="ignore"):
            wait_s = times / total
        event = (cumulated < (choice * total)[:, None]).sum(axis=1)
        return wait_s, np.minimum(event, 2 * len(self.rates) - 1)

    def _stand(
        self,
        lanes: NDArray[np.intp],
        wait_s: Array,
        event: NDArray[np.intp],
        down: NDArray[np.bool_],
        enough: NDArray[np.bool_],
    ) -> None:
        """Lanes that restart, or have too few hosts to."""
        still = down | ~enough
        # A restart with too few hosts is as long as the wait for them.
        ends = down & enough & (wait_s >= self.down_s[lanes])
        taken = np.where(ends, self.down_s[lanes], wait_s)
        self.outcome.standing[lanes[still]] += taken[still]
        self.down_s[lanes[ends]] = 0.0
        hit = still & ~ends
        self._apply(lanes[hit], event[hit])
        returned = hit & (event >= len(self.rates))
        # One that was restarting takes it in on the way; one that was waiting for it starts now.
        self.down_s[lanes[returned]] -= taken[returned]
        waited = returned & ~enough
        self.down_s[lanes[waited]] = self.restart_s[event[waited] - len(self.rates)]

    def _apply(self, lanes: NDArray[np.intp], event: NDArray[np.intp]) -> None:
        """Faults take hosts away and stop all; returns bring hosts back."""
        kinds = len(self.rates)
        fault = event < kinds
        hit, kind = lanes[fault], event[fault]
        self.outcome.faults[hit] += 1
        self.down_s[hit] = self.down_after_s[kind]
        self.away[hit, kind] += self.leaves[kind]
        self.away[lanes[~fault], event[~fault] - kinds] -= 1

    def _run(
        self, lanes: NDArray[np.intp], wait_s: Array, event: NDArray[np.intp], there: Array
    ) -> None:
        """Lanes whose steps go on until the event, or the end of the run."""
        out, snapshot_s, interval_s = self.outcome, self.it.snapshot_s, self.interval_s[lanes]
        missing = np.minimum(self.it.hosts - there, len(self.speeds) - 1).astype(np.intp)
        speed = self.speeds[missing]
        # Up to the end: all steps, the checkpoints between them, and the last one's.
        steps_s = self.left_s[lanes] / speed
        snapshots = np.ceil(steps_s / interval_s - 1e-9)
        need_s = steps_s + snapshots * snapshot_s + self.it.write_s
        ends = wait_s >= need_s
        done = lanes[ends]
        out.useful[done] += self.left_s[done]
        out.slower[done] += steps_s[ends] - self.left_s[done]
        out.snapshots[done] += snapshots[ends] * snapshot_s
        out.standing[done] += self.it.write_s
        out.finished[done] = True
        # Up to the event.
        goes = ~ends
        lanes, wait_s, event = lanes[goes], wait_s[goes], event[goes]
        interval_s, speed = interval_s[goes], speed[goes]
        cycle_s = interval_s + snapshot_s
        whole = np.floor(wait_s / cycle_s)
        trained_s = np.minimum(
            whole * interval_s + np.minimum(wait_s - whole * cycle_s, interval_s), steps_s[goes]
        )
        counted = np.maximum(0.0, np.floor((wait_s - self.it.write_s) / cycle_s))
        kinds = len(self.rates)
        kept = event >= kinds  # a host that comes is taken in after a checkpoint
        kept[~kept] = self.saved[event[~kept]]
        kept_s = np.where(kept, trained_s, np.minimum(counted * interval_s, trained_s))
        writes = kept & self.writes[event]
        last_s = np.where(writes, snapshot_s, 0.0)
        out.useful[lanes] += kept_s * speed
        out.slower[lanes] += kept_s * (1 - speed)
        out.repeated[lanes] += trained_s - kept_s
        out.snapshots[lanes] += np.maximum(wait_s - trained_s, 0.0) + last_s
        out.standing[lanes] += np.where(writes, self.it.write_s, 0.0)
        self.left_s[lanes] = np.maximum(self.left_s[lanes] - kept_s * speed, 0.0)
        if not self.it.grows_at_once:
            returned = -np.expm1(-wait_s[:, None] * self.return_rates)
            self.away[lanes] -= self.random.binomial(self.away[lanes].astype(np.int64), returned)
        self._apply(lanes, event)
        back = event >= kinds
        self.down_s[lanes[back]] = self.restart_s[event[back] - kinds]


def best_interval(
    situation: Situation, seed: int, candidates: int = 25, repeats: int = 16, faults: int = 100
) -> tuple[float, float, float]:
    """The interval under which most of the time is useful, found by playing.

    A stretch with ``repeats`` × ``faults`` faults that lose work is played under intervals from a
    ninth to nine times Young's; goodput, over the logarithm of the interval, is a parabola near
    its best.

    Returns:
        The best, and the interval range within which goodput is at most 0.2 % lower.
    """
    guess = max(young_s(situation.snapshot_s, situation.losing_mtbf_s), situation.write_s, 1e-3)
    intervals = guess * np.geomspace(1 / 9, 9, candidates)
    intervals = np.unique(np.maximum(intervals, max(situation.write_s, 1e-3)))
    # The others cost the same under any interval.
    kinds = tuple(kind for kind in situation.kinds if not situation.saved(kind))
    work_s = faults * situation.losing_mtbf_s
    stretch = replace(situation, kinds=kinds, work_s=work_s)
    outcome = play(stretch, intervals, seed, repeats)
    goodput = outcome.useful.reshape(len(intervals), repeats).sum(axis=1)
    goodput = goodput / outcome.total.reshape(len(intervals), repeats).sum(axis=1)
    logs = np.log(intervals)
    best = _top(logs, goodput)
    near = intervals[goodput >= goodput.max() * (1 - 2e-3)]
    return float(np.exp(best)), float(near.min()), float(near.max())


def _top(logs: Array, values: Array) -> float:
    """Where a parabola through the neighbourhood of the highest value is highest."""
    near = np.abs(logs - logs[np.argmax(values)]) < 1.0
    if near.sum() < 4:
        return float(logs[np.argmax(values)])
    second, first, _ = np.polyfit(logs[near], values[near], 2)
    if second >= 0:
        return float(logs[np.argmax(values)])
    return float(np.clip(-first / (2 * second), logs[near].min(), logs[near].max()))


def mean_and_spread(outcome: Outcome, times: float) -> tuple[float, float, float]:
    """Seconds of a whole run: mean, and the range of eight tenths of runs.

    A whole that is ``times`` as long as what was played spreads √times as much.
    """
    total = outcome.total
    low, high = np.quantile(total, [0.1, 0.9])
    mean, wide = float(total.mean()), math.sqrt(times)
    return mean * times, mean * times + (low - mean) * wide, mean * times + (high - mean) * wide

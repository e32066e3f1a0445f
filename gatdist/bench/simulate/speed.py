"""From a scenario to steps: what was observed or told becomes a fitted model of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gatdist.bench.simulate.collectives import Link, Topology
from gatdist.bench.simulate.fit import Fit, Known, Observation, fit
from gatdist.bench.simulate.measured import Findings, Timed
from gatdist.bench.simulate.scenario import Scenario, spread
from gatdist.bench.simulate.sections import Observed, Player
from gatdist.bench.simulate.step import DataFlow, Parts, Phase, Ready, StepModel
from gatdist.common.errors import ConfigError

# A batch that nobody told: one step is then as long as these samples.
_UNIT_SAMPLES = 1000
# A batch that all workers share is what published tables of GANs have, of some dozens of samples.
# More workers than that can't share it: then each has a batch of its own.
_LOG_ODDS, _MOST_WHO_SHARE = float(np.log(4.0)), 64
_READY: dict[str, Ready] = {"discriminator": "early", "generator": "late"}
# In units of one forward pass of either network, a backward pass being two, or one where only its
# input's gradient is wanted: D has G's forward, 2 × 3 of its own, of which the last backward counts
# (2 of 7); G has two forwards, one backward through D, and its own (2 of 5).
_BACKWARD_OF_A_PAIR = {"discriminator": 0.3, "generator": 0.4}
_BACKWARD_ALONE = 2 / 3
# Deviation of workers where nothing tells: assumed.
_DEVIATION = 0.01
# What no model knows, as a deviation of the time for each doubling of the workers beyond those that
# were seen. Of 48 published times (benchmarks/validation.py), 42 then lie in the range of eight
# tenths; 14 do without.
_UNSEEN, _EIGHT_TENTHS = 0.04, 1.2816


@dataclass(frozen=True)
class Batch:
    """How many samples a step shows.

    Attributes:
        samples: globally, or of each worker.
        shared: which of both.
        message: whether ``samples`` is known; else times are right in proportion only.
    """

    samples: int
    shared: bool
    message: bool

    def local(self, workers: int, samples: int | None = None) -> float:
        """Samples of the worker that has most, ``samples`` globally in place of the usual."""
        if samples is None and not self.shared:
            return self.samples
        total = self.samples if samples is None else samples
        return -(-total // workers) if self.message else total / workers

    def total(self, workers: int, samples: int | None = None) -> int:
        """Samples of all workers together."""
        if samples is not None:
            return samples
        return self.samples if self.shared else self.samples * workers


@dataclass(frozen=True)
class Point:
    """A step of so many workers.

    Attributes:
        workers: how many.
        samples: of a step, of all workers; where the batch is not known, of a stretch of time.
        parts: seconds of that step.
        range_s: that holds the time with a chance of eight tenths: what the observations allow,
            and what may lie beyond them; as ``parts`` where nothing was observed.
    """

    workers: int
    samples: int
    parts: Parts
    range_s: tuple[float, float]

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return float(self.parts.total)

    @property
    def seconds_per_1000_samples(self) -> float:
        """Of all workers together."""
        return 1000 * self.step_s / self.samples


@dataclass(frozen=True)
class Speed:
    """How fast any number of workers is.

    Attributes:
        batch: of a step.
        model: fitted, where there is a fit.
        fit: None where nothing was observed.
        observations: what it was fitted to, with the samples of each step.
        seen: their workers and seconds for 1,000 samples.
        notes: what was taken for granted.
    """

    batch: Batch
    model: StepModel
    fit: Fit | None
    observations: tuple[Observation, ...]
    seen: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]

    def at(self, workers: int, samples: int | None = None) -> Point:
        """A step of so many workers, ``samples`` globally in place of the usual."""
        local, total = self.batch.local(workers, samples), self.batch.total(workers, samples)
        if self.fit is None:
            parts = Parts(*map(float, self.model.parts(workers, local)))
            return Point(workers, total, parts, (float(parts.total), float(parts.total)))
        parts, range_s = self.fit.predict(workers, local)
        return Point(workers, total, parts, self._widened(workers, range_s, parts))

    def _widened(
        self, workers: int, range_s: tuple[float, float], parts: Parts
    ) -> tuple[float, float]:
        """The range, by what may lie beyond the largest number of workers that was seen.

        That takes no time from what is computed.
        """
        doublings = max(0.0, math.log2(workers / max(seen.workers for seen in self.observations)))
        unseen, middle_s = _EIGHT_TENTHS * _UNSEEN * doublings, float(parts.total)
        below, above = (math.hypot(math.log(end / middle_s), unseen) for end in range_s)
        fastest = min(range_s[0], float(parts.computation))
        return max(middle_s * math.exp(-below), fastest), middle_s * math.exp(above)


def speed(scenario: Scenario, findings: Findings) -> Speed:
    """Fit, or take what is told.

    Raises:
        ConfigError: what is told does not suffice, or a batch can't be shared by the workers.
    """
    model = _model(scenario, findings)
    observed = scenario.observed
    if observed is None and not findings.points:
        made = _reported(scenario, model)
    else:
        steps_s = alone_on_hosts(findings, scenario.workers_per_host)
        seen = [
            (point.workers, 1000 * step_s / point.global_batch)
            for point, step_s in zip(findings.points, steps_s, strict=True)
        ]
        if observed is not None:
            seen = list(zip(observed.workers, observed.seconds_per_1000_samples, strict=True))
        made = _fitted(scenario, findings, model, seen)
    predict = scenario.predict
    requested = spread(predict.global_batch, len(predict.workers))
    for workers, samples in zip(predict.workers, requested, strict=True):
        total = made.batch.total(workers, samples)
        if (made.batch.message or samples) and total < workers:
            raise ConfigError(
                "predict.workers",
                f"can't share a batch of {total}: some would have no sample",
                value=workers,
                hint="Predict fewer workers, or a larger global_batch",
            )
    return made


def alone_on_hosts(findings: Findings, workers_per_host: int) -> list[float]:
    """Seconds of each measured step, as on hosts that so many workers share.

    Workers that were measured on one host take from one another what they would not on hosts of
    their own: cores, memory, the clock. As many that do not communicate tell how much, where each
    has the same batch; it is taken out.
    """
    points = findings.points
    first = points[0].alone_s if points else None
    if first is None or findings.most_on_a_host <= workers_per_host or not shares_none(points):
        return [point.step_s for point in points]
    alone_s = [first if point.alone_s is None else point.alone_s for point in points]
    return [
        first + max(0.0, point.step_s - alone) for point, alone in zip(points, alone_s, strict=True)
    ]


def shares_none(points: Sequence[Timed]) -> bool:
    """Whether each worker has the same batch at every count."""
    return len({point.global_batch / point.workers for point in points}) == 1


def _reported(scenario: Scenario, model: StepModel) -> Speed:
    """Of hardware figures."""
    workload, notes = scenario.workload, []
    if workload.overhead_s is None:
        notes.append("workload.overhead_s is not told: taken as 0")
    if scenario.stragglers is None:
        notes.append(f"stragglers.deviation is not told: taken as {_DEVIATION}")
    samples = workload.global_batch or workload.batch_per_worker
    assert samples is not None
    batch = Batch(samples, workload.global_batch is not None, True)
    return Speed(batch, model, None, (), (), tuple(notes))


def _fitted(
    scenario: Scenario, findings: Findings, model: StepModel, seen: Sequence[tuple[int, float]]
) -> Speed:
    """Of observed points."""
    known = Known(
        scenario.workload.overhead_s,
        None if scenario.stragglers is None else scenario.stragglers.deviation,
    )
    noise = scenario.observed.deviation if scenario.observed else 0.02
    found: list[tuple[float, Speed]] = []
    for batch, odds, note in _possible_batches(scenario, findings):
        observations = tuple(
            _observation(batch, workers, seconds, samples)
            for (workers, seconds), samples in zip(
                seen, _observed_batches(scenario, findings), strict=True
            )
        )
        fitted = fit(model, observations, batch.samples, noise, known)
        made = Speed(batch, fitted.model, fitted, observations, tuple(seen), note)
        found.append((fitted.log_evidence + odds, made))
    return max(found, key=lambda one: one[0])[1]


def _observation(batch: Batch, workers: int, seconds: float, samples: int | None) -> Observation:
    local, total = batch.local(workers, samples), batch.total(workers, samples)
    return Observation(workers, local, seconds * total / 1000)


def _observed_batches(scenario: Scenario, findings: Findings) -> Sequence[int | None]:
    observed: Observed | None = scenario.observed
    if observed is None:
        return [point.global_batch for point in findings.points]
    return spread(observed.global_batch, len(observed.workers))


def _possible_batches(
    scenario: Scenario, findings: Findings
) -> list[tuple[Batch, float, tuple[str, ...]]]:
    """What the batch is or may be, the log odds of each before the points are looked at, notes."""
    workload = scenario.workload
    if workload.global_batch or workload.batch_per_worker:
        samples = workload.global_batch or workload.batch_per_worker
        assert samples is not None
        return [(Batch(samples, workload.global_batch is not None, True), 0.0, ())]
    observed = [samples for samples in _observed_batches(scenario, findings) if samples]
    if observed:
        workers = scenario.observed.workers if scenario.observed else _workers(findings.points)
        each = {samples / many for samples, many in zip(observed, workers, strict=True)}
        grows = len(observed) > 1 and len(each) == 1
        shared = workload.batch != "per_worker" and not grows
        samples = max(observed) if shared else max(1, round(observed[0] / workers[0]))
        return [(Batch(samples, shared, True), 0.0, ())]
    if workload.batch is not None:
        return [(Batch(_UNIT_SAMPLES, workload.batch == "shared", False), 0.0, ())]
    note = "the batch is not told: taken as one {}; [workload] batch = {} is the other kind"
    seen = scenario.observed.workers if scenario.observed else []
    odds = _LOG_ODDS if max(*scenario.predict.workers, *seen) <= _MOST_WHO_SHARE else -_LOG_ODDS
    return [
        (
            Batch(_UNIT_SAMPLES, True, False),
            odds,
            (note.format("that all workers share", '"per_worker"'),),
        ),
        (
            Batch(_UNIT_SAMPLES, False, False),
            0.0,
            (note.format("of each worker", '"shared"'),),
        ),
    ]


def _workers(points: Sequence[Timed]) -> list[int]:
    return [point.workers for point in points]


def _model(scenario: Scenario, findings: Findings) -> StepModel:
    """The step before anything is fitted: work in proportion, and all figures of the network."""
    network, stragglers, data = scenario.network, scenario.stragglers, scenario.data
    topology = _topology(scenario, findings.link)
    phases = _phases(scenario, findings)
    if not any(phase.gradient_bytes for phase in phases):
        topology = None  # nothing says how much is sent
    flow = None
    if data is not None:
        flow = DataFlow(**data.model_dump(), workers_per_host=scenario.workers_per_host)
    more: dict[str, Any] = {}
    if network is not None:
        more = {"bucket_bytes": network.bucket_bytes, "overlap": network.overlap}
    return StepModel(
        phases,
        overhead_s=scenario.workload.overhead_s or 0.0,
        deviation=_DEVIATION if stragglers is None else stragglers.deviation,
        topology=topology,
        data=flow,
        **more,
    )


def _topology(scenario: Scenario, measured: Link | None) -> Topology | None:
    network = scenario.network
    if network is None:
        return Topology(1, measured, measured) if measured else None
    between = measured
    if network.bytes_per_s is not None:
        between = Link(network.latency_s, network.bytes_per_s)
    inside = between
    if network.host_bandwidth_bytes_per_s is not None:
        inside = Link(network.host_latency_s, network.host_bandwidth_bytes_per_s)
    between = between or inside
    if inside is None or between is None:
        return None
    return Topology(network.workers_per_host, inside, between, network.algorithm)


def _phases(scenario: Scenario, findings: Findings) -> tuple[Phase, ...]:
    """One for each player; one of all, where nobody told of players."""
    players = scenario.players
    shares = dict(findings.shares or {})
    if not players:
        names = list(shares) or ["step"]
        sent = (findings.gradient_bytes or 0.0) / len(names)
        return tuple(
            Phase(
                shares.get(name, 1.0),
                sent,
                _BACKWARD_OF_A_PAIR.get(name, _BACKWARD_ALONE),
                _READY.get(name, "evenly"),
            )
            for name in names
        )
    observed = scenario.observed is not None or bool(findings.points)
    phases = []
    for name, player in players.items():
        seconds = _seconds_per_sample(scenario, player)
        if observed and seconds is None:
            seconds = player.share or shares.get(name, 1 / len(players))
        assert seconds is not None
        sent = player.parameters * player.bytes_per_gradient
        if not sent and findings.gradient_bytes:
            sent = findings.gradient_bytes / len(players)
        usual = _BACKWARD_ALONE if len(players) == 1 else _BACKWARD_OF_A_PAIR[name]
        backward = player.backward_share or usual
        phases.append(Phase(seconds, sent, backward, player.gradients_ready or _READY[name]))
    return tuple(phases)


def _seconds_per_sample(scenario: Scenario, player: Player) -> float | None:
    if player.seconds_per_sample is not None:
        return player.seconds_per_sample
    hardware = scenario.hardware
    if player.flop_per_sample is None or hardware is None:
        return None
    return player.flop_per_sample / (hardware.flop_per_s * hardware.utilization)

"""From a scenario to step times: a model of the step, fitted to the observed points if any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gatdist.bench.simulate.fit import Fit, Known, Observation, fit
from gatdist.bench.simulate.measured import Findings
from gatdist.bench.simulate.model import DataFlow, Link, Parts, Phase, Ready, StepModel, Topology
from gatdist.bench.simulate.scenario import Scenario, spread
from gatdist.bench.simulate.sections import Player
from gatdist.common.errors import ConfigError

# If the batch is unknown, a step has this many samples.
_UNIT_SAMPLES = 1000
# Published tables of GANs have a shared batch of some dozens of samples. More workers than that
# can't share it: then each has its own batch.
_LOG_ODDS, _MOST_WHO_SHARE = float(np.log(4.0)), 64
_READY: dict[str, Ready] = {"discriminator": "early", "generator": "late"}
# In units of one forward pass of either network, a backward pass being two, or one if only its
# input's gradient is needed: D has G's forward, 2 × 3 of its own, of which the last backward counts
# (2 of 7); G has two forwards, one backward through D, and its own (2 of 5).
_BACKWARD_OF_A_PAIR = {"discriminator": 0.3, "generator": 0.4}
_BACKWARD_ALONE = 2 / 3
_DEVIATION = 0.01  # assumed deviation of workers
# Model error, as a relative deviation per doubling of the workers beyond the observed ones. With
# it, 42 of 48 published times (benchmarks/validation.py) lie in the 80 % interval; without, 14.
_UNSEEN, _QUANTILE_90 = 0.04, 1.2816


@dataclass(frozen=True)
class Batch:
    """Batch of a step; if it is not ``known``, only ratios of times are meaningful."""

    samples: int
    shared: bool
    known: bool

    def local(self, workers: int, samples: int | None = None) -> float:
        """Largest number of samples on a worker; ``samples`` replaces the global batch."""
        if samples is None and not self.shared:
            return self.samples
        total = self.samples if samples is None else samples
        return -(-total // workers) if self.known else total / workers

    def total(self, workers: int, samples: int | None = None) -> int:
        """Samples of all workers together; ``samples`` replaces the global batch."""
        if samples is not None:
            return samples
        return self.samples if self.shared else self.samples * workers


@dataclass(frozen=True)
class Point:
    """A step: samples of all workers, components in seconds, and its 80 % interval."""

    workers: int
    samples: int
    parts: Parts
    range_s: tuple[float, float]

    @property
    def step_s(self) -> float:
        return float(self.parts.total)

    @property
    def seconds_per_1000_samples(self) -> float:
        return 1000 * self.step_s / self.samples


@dataclass(frozen=True)
class Speed:
    """Step times by number of workers; ``fit`` is None if nothing was observed.

    ``seen`` are the workers and seconds per 1,000 samples of the observations.
    """

    batch: Batch
    model: StepModel
    fit: Fit | None
    observations: tuple[Observation, ...]
    seen: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]

    def at(self, workers: int, samples: int | None = None) -> Point:
        """Return the step of ``workers`` workers; ``samples`` replaces the global batch."""
        local, total = self.batch.local(workers, samples), self.batch.total(workers, samples)
        if self.fit is None:
            parts = Parts(*map(float, self.model.parts(workers, local)))
            return Point(workers, total, parts, (float(parts.total), float(parts.total)))
        parts, range_s = self.fit.predict(workers, local)
        return Point(workers, total, parts, self._widened(workers, range_s, parts))

    def _widened(
        self, workers: int, range_s: tuple[float, float], parts: Parts
    ) -> tuple[float, float]:
        """Add the model error beyond the observed workers; computation is a lower bound."""
        doublings = max(0.0, math.log2(workers / max(seen.workers for seen in self.observations)))
        unseen, middle_s = _QUANTILE_90 * _UNSEEN * doublings, float(parts.total)
        below, above = (math.hypot(math.log(end / middle_s), unseen) for end in range_s)
        fastest = min(range_s[0], float(parts.computation))
        return max(middle_s * math.exp(-below), fastest), middle_s * math.exp(above)


def speed(scenario: Scenario, findings: Findings) -> Speed:
    """Build the model of a step, and fit it if there are observed points.

    Raises:
        ConfigError: Figures are missing, or a predicted batch has fewer samples than workers.
    """
    model = _model(scenario, findings)
    observed = scenario.observed
    if observed is None and not findings.points:
        made = _from_figures(scenario, model)
    elif observed is not None:
        seen = list(zip(observed.workers, observed.seconds_per_1000_samples, strict=True))
        batches = spread(observed.global_batch, len(observed.workers))
        made = _fitted(scenario, model, seen, batches)
    else:
        points, times = findings.points, findings.step_times(scenario.workers_per_host)
        seen = [(p.workers, 1000 * s / p.global_batch) for p, s in zip(points, times, strict=True)]
        made = _fitted(scenario, model, seen, [point.global_batch for point in points])
    predict = scenario.predict
    requested = spread(predict.global_batch, len(predict.workers))
    for workers, samples in zip(predict.workers, requested, strict=True):
        total = made.batch.total(workers, samples)
        if (made.batch.known or samples) and total < workers:
            raise ConfigError(
                "predict.workers",
                f"exceeds the batch of {total}: some would have no sample",
                value=workers,
                hint="Predict fewer workers, or a larger global_batch",
            )
    return made


def _from_figures(scenario: Scenario, model: StepModel) -> Speed:
    workload, notes = scenario.workload, []
    if workload.overhead_s is None:
        notes.append("workload.overhead_s is not given: assumed 0")
    if scenario.stragglers is None:
        notes.append(f"stragglers.deviation is not given: assumed {_DEVIATION}")
    assert workload.samples is not None
    batch = Batch(workload.samples, workload.global_batch is not None, True)
    return Speed(batch, model, None, (), (), tuple(notes))


def _fitted(
    scenario: Scenario,
    model: StepModel,
    seen: Sequence[tuple[int, float]],
    batches: Sequence[int | None],
) -> Speed:
    stragglers = scenario.stragglers
    known = Known(scenario.workload.overhead_s, stragglers.deviation if stragglers else None)
    noise = scenario.observed.deviation if scenario.observed else 0.02
    workers = [count for count, _ in seen]
    found: list[tuple[float, Speed]] = []
    for batch, odds, notes in _possible_batches(scenario, workers, batches):
        observations = tuple(
            Observation(
                count, batch.local(count, samples), seconds * batch.total(count, samples) / 1000
            )
            for (count, seconds), samples in zip(seen, batches, strict=True)
        )
        fitted = fit(model, observations, batch.samples, noise, known)
        made = Speed(batch, fitted.model, fitted, observations, tuple(seen), notes)
        found.append((fitted.log_evidence + odds, made))
    return max(found, key=lambda one: one[0])[1]


def _possible_batches(
    scenario: Scenario, workers: Sequence[int], batches: Sequence[int | None]
) -> list[tuple[Batch, float, tuple[str, ...]]]:
    """Kinds of batch, the prior log odds of each, and notes."""
    workload = scenario.workload
    if workload.samples:
        return [(Batch(workload.samples, workload.global_batch is not None, True), 0.0, ())]
    observed = [samples for samples in batches if samples]
    if observed:
        each = {samples / count for samples, count in zip(observed, workers, strict=True)}
        grows = len(observed) > 1 and len(each) == 1
        shared = workload.batch != "per_worker" and not grows
        samples = max(observed) if shared else max(1, round(observed[0] / workers[0]))
        return [(Batch(samples, shared, True), 0.0, ())]
    if workload.batch is not None:
        return [(Batch(_UNIT_SAMPLES, workload.batch == "shared", False), 0.0, ())]
    note = "the batch is not given: assumed {}; otherwise set [workload] batch = {}"
    most = max(*scenario.predict.workers, *workers)
    return [
        (
            Batch(_UNIT_SAMPLES, True, False),
            _LOG_ODDS if most <= _MOST_WHO_SHARE else -_LOG_ODDS,
            (note.format("shared by all workers", '"per_worker"'),),
        ),
        (Batch(_UNIT_SAMPLES, False, False), 0.0, (note.format("one per worker", '"shared"'),)),
    ]


def _model(scenario: Scenario, findings: Findings) -> StepModel:
    network, stragglers, data = scenario.network, scenario.stragglers, scenario.data
    phases = _phases(scenario, findings)
    topology, flow = None, None
    if any(phase.gradient_bytes for phase in phases):
        topology = _topology(scenario, findings.link)
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

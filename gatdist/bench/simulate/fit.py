"""Fit of a step's unknown parameters to observed points, by Bayes' rule on a grid.

A prediction is the weighted median, with its 80 % interval. Priors:

* Work W: flat on log W.
* Overhead and communication, as shares of one worker's step: half-Cauchy, median 1 %. If network
  figures are given, its slowdown is log-normal with deviation 0.3.
* Deviation of workers: half-normal, 3 %.
* Noise of observations: Student's t with 4 degrees of freedom, scale ``observed.deviation``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from gatdist.bench.simulate.model import Array, Parts, StepModel

_SHARE_MEDIAN, _DEVIATION, _LOG_SLOWDOWN = 0.01, 0.03, 0.3
_LOWEST, _HIGHEST, _MAX_DEVIATION = 1e-5, 30.0, 0.3
_POINTS, _ZOOMS = 28, 4
_DEGREES = 4.0
_NEGLIGIBLE = 12.0  # values less likely than e^-12 of the best are dropped
QUANTILES = (0.1, 0.5, 0.9)


class Observation(NamedTuple):
    """One timed point; ``local_batch`` is samples per worker and step."""

    workers: int
    local_batch: float
    step_s: float


@dataclass(frozen=True)
class Known:
    """Parameters that are given; None: to be fitted."""

    overhead_s: float | None = None
    deviation: float | None = None


@dataclass(frozen=True)
class Fit:
    """Variants of a step, arrays of shape (n,); ``unit_s`` is one worker's step."""

    model: StepModel
    weights: Array
    log_evidence: float
    unit_s: Array

    def predict(self, workers: int, local_batch: float) -> tuple[Parts, tuple[float, float]]:
        """Return the parts of a step, which sum to its median, and its 80 % interval."""
        parts = self.model.parts(workers, local_batch)
        low, middle, high = self.quantiles(parts.total)
        # Medians of parts do not add up. Means do, and are scaled to the median of the total.
        means = [float(np.sum(self.weights * part)) for part in parts]
        factor = middle / sum(means)
        return Parts(*(mean * factor for mean in means)), (low, high)

    def quantiles(self, values: object) -> tuple[float, float, float]:
        """Return :data:`QUANTILES` of a quantity with one value per variant (or one for all)."""
        array = np.broadcast_to(np.asarray(values, dtype=np.float64), self.weights.shape)
        order = np.argsort(array)
        below = np.cumsum(self.weights[order]) - 0.5 * self.weights[order]
        low, middle, high = np.interp(QUANTILES, below, array[order])
        return float(low), float(middle), float(high)

    def parameters(self) -> dict[str, dict[str, float]]:
        found = {
            "overhead_share": self.model.overhead_s / self.unit_s,
            "deviation": self.model.deviation,
        }
        if self.model.topology is None:
            found["exchange_share"] = self.model.exchange_s / self.unit_s
        else:
            found["network_slowdown"] = self.model.slowdown
        return {
            name: dict(zip(("low", "median", "high"), self.quantiles(values), strict=True))
            for name, values in found.items()
        }


def fit(
    model: StepModel,
    observations: Sequence[Observation],
    reference_batch: float,
    noise: float,
    known: Known,
) -> Fit:
    """Weight the variants of ``model`` by how well they explain at least one observation.

    Args:
        model: Its phases' work is known up to a common factor.
        observations: Timed points.
        reference_batch: Samples of the one-worker step of which overhead and exchange are shares.
        noise: Relative deviation of an observation.
        known: Parameters that are not fitted.
    """
    axes = _axes(model, known)
    for _ in range(_ZOOMS):
        grid = dict(zip(axes, np.meshgrid(*axes.values(), indexing="ij"), strict=True))
        flat = {name: values.ravel() for name, values in grid.items()}
        variants, unit_s = _with_work(model, flat, observations, reference_batch, known)
        log_weights = sum(
            (_log_prior(name, values) for name, values in flat.items()),
            start=np.zeros(next(iter(flat.values())).shape),
        ) + _log_likelihood(variants, observations, noise)
        cell = sum(np.log(axis[1] - axis[0]) for axis in axes.values())
        axes = {
            name: _zoomed(axis, log_weights.reshape([len(a) for a in axes.values()]), number)
            for number, (name, axis) in enumerate(axes.items())
        }
    highest = float(log_weights.max())
    weights = np.exp(log_weights - highest)
    total = float(weights.sum())
    return Fit(variants, weights / total, highest + float(np.log(total)) + float(cell), unit_s)


def _axes(model: StepModel, known: Known) -> dict[str, Array]:
    """Logarithms of the unknowns. The network is always one of them, so no grid is empty."""
    shares = np.linspace(np.log(_LOWEST), np.log(_HIGHEST), _POINTS)
    axes = {}
    if known.overhead_s is None:
        axes["overhead"] = shares
    if model.topology is None:
        axes["exchange"] = shares
    else:
        axes["slowdown"] = np.linspace(-5 * _LOG_SLOWDOWN, 5 * _LOG_SLOWDOWN, _POINTS)
    if known.deviation is None:
        axes["deviation"] = np.linspace(np.log(1e-4), np.log(_MAX_DEVIATION), _POINTS)
    return axes


def _log_prior(name: str, logs: Array) -> Array:
    if name == "slowdown":
        return -0.5 * (logs / _LOG_SLOWDOWN) ** 2
    values = np.exp(logs)
    if name == "deviation":
        return logs - 0.5 * (values / _DEVIATION) ** 2  # d x = x d log x
    return logs - np.log1p((values / _SHARE_MEDIAN) ** 2)  # half-Cauchy: its scale is its median


def _with_work(
    model: StepModel,
    logs: Mapping[str, Array],
    observations: Sequence[Observation],
    reference_batch: float,
    known: Known,
) -> tuple[StepModel, Array]:
    """Variants with the work that fits the points best, and one worker's step of each."""
    values = {name: np.exp(array) for name, array in logs.items()}
    zeros = np.zeros(next(iter(values.values())).shape)
    per_sample = sum(float(phase.seconds_per_sample) for phase in model.phases)

    def scaled(factor: Array) -> tuple[StepModel, Array]:
        unit_s = factor * per_sample * reference_batch
        overhead_s, deviation = known.overhead_s, known.deviation
        variants = replace(
            model,
            phases=tuple(
                replace(phase, seconds_per_sample=phase.seconds_per_sample * factor)
                for phase in model.phases
            ),
            overhead_s=values["overhead"] * unit_s if overhead_s is None else zeros + overhead_s,
            deviation=values["deviation"] if deviation is None else zeros + deviation,
            slowdown=values.get("slowdown", zeros + 1),
            exchange_s=values["exchange"] * unit_s if "exchange" in values else zeros,
        )
        return variants, unit_s

    return scaled(_work(scaled, zeros, observations, per_sample))


def _work(
    scaled: Callable[[Array], tuple[StepModel, Array]],
    zeros: Array,
    observations: Sequence[Observation],
    per_sample: float,
) -> Array:
    """The factor on the work at which half of the points lie above their prediction."""
    first = observations[0]
    highest = first.step_s / (per_sample * first.local_batch)
    factor = zeros + highest
    for _ in range(24):
        middle = np.median(_residuals(scaled(factor)[0], observations), axis=0)
        # If most of a step is not work, a change of 1 % needs more than 1 % of work.
        factor = np.clip(factor * np.exp(1.3 * middle), 1e-4 * highest, 4 * highest)
        if np.abs(middle).max() < 1e-4:
            break
    return factor


def _residuals(variants: StepModel, observations: Sequence[Observation]) -> Array:
    """log(observed / predicted), shape (observations, variants)."""
    return np.stack(
        [
            np.log(seen.step_s) - np.log(variants.parts(seen.workers, seen.local_batch).total)
            for seen in observations
        ]
    )


def _log_likelihood(
    variants: StepModel, observations: Sequence[Observation], noise: float
) -> Array:
    residuals = _residuals(variants, observations) / noise
    found: Array = -(_DEGREES + 1) / 2 * np.log1p(residuals**2 / _DEGREES).sum(axis=0)
    return found


def _zoomed(axis: Array, log_weights: Array, number: int) -> Array:
    others = tuple(n for n in range(log_weights.ndim) if n != number)
    likely = np.flatnonzero(log_weights.max(axis=others) > log_weights.max() - _NEGLIGIBLE)
    low, high = max(0, likely[0] - 1), min(len(axis) - 1, likely[-1] + 1)
    return np.linspace(axis[low], axis[high], len(axis))

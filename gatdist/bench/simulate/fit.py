"""What observed points tell of a step, and what they leave open.

Two points, of one worker and of two, tell how much work there is and how much of it two workers do
not halve. Whether that is overhead, communication or unequal workers, nobody can see in them, nor
tell a loss of half a percent from noise. So nothing is solved for: all parameters that could be
true are weighed by how well they explain the points (Bayes' rule), and a prediction is the median
of what they predict, with the range that holds eight tenths of them.

* W, the work, is known by nothing else than the points: log W has a flat prior.
* Overhead and communication, as shares of one worker's step: small is likely, large is possible.
  Half-Cauchy with a median of one percent. A network of which figures are told is as fast as they
  say, within a factor e^0.3.
* The deviation of workers: half of a normal distribution of three percent. Workers that are more
  unequal than ten percent are rarer than slow networks and small batches.
* A time is off by ``observed.deviation``, now and then by much more: Student's t with 4 degrees.

Parameters lie on a grid that is drawn anew, and finer, where they are likely; no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gatdist.bench.simulate.step import Parts, StepModel

Array = NDArray[np.float64]

_SHARE_MEDIAN, _DEVIATION, _LOG_SLOWDOWN = 0.01, 0.03, 0.3
_LOWEST, _HIGHEST, _MOST_UNEQUAL = 1e-5, 30.0, 0.3
_POINTS, _ZOOMS = 28, 4
_DEGREES = 4.0
_FAR_DOWN = 12.0  # in log weight: what is less likely than e^-12 of the best is left out
QUANTILES = (0.1, 0.5, 0.9)


class Observation(NamedTuple):
    """One timed point.

    Attributes:
        workers: p.
        local_batch: samples of each worker in a step.
        step_s: seconds.
    """

    workers: int
    local_batch: float
    step_s: float


@dataclass(frozen=True)
class Known:
    """What is told and need not be found; None: to be found."""

    overhead_s: float | None = None
    deviation: float | None = None


@dataclass(frozen=True)
class Fit:
    """Variants of a step, and how likely each is.

    Attributes:
        model: with arrays of n variants.
        weights: of shape (n,), their sum 1.
        log_evidence: of the points under this shape of model.
        unit_s: one worker's step, of which shares were taken.
    """

    model: StepModel
    weights: Array
    log_evidence: float
    unit_s: Array

    def predict(self, workers: int, local_batch: float) -> tuple[Parts, tuple[float, float]]:
        """Parts of a step, which add up to its median, and the range of eight tenths."""
        parts = self.model.parts(workers, local_batch)
        low, middle, high = self.quantiles(parts.total)
        # Medians of parts do not add up; means do, and are scaled to the median of the whole.
        means = [float(np.sum(self.weights * part)) for part in parts]
        factor = middle / sum(means)
        return Parts(*(mean * factor for mean in means)), (low, high)

    def quantiles(self, values: object) -> tuple[float, float, float]:
        """Of a quantity with one value for each variant (or one for all)."""
        array = np.broadcast_to(np.asarray(values, dtype=np.float64), self.weights.shape)
        order = np.argsort(array)
        below = np.cumsum(self.weights[order]) - 0.5 * self.weights[order]
        low, middle, high = np.interp(QUANTILES, below, array[order])
        return float(low), float(middle), float(high)

    def parameters(self) -> dict[str, dict[str, float]]:
        """The parameters, each with its median and range."""
        found = {
            "overhead_share": self.model.overhead_s / self.unit_s,
            "deviation": self.model.deviation,
        }
        if self.model.topology is None:
            found["exchange_share"] = self.model.exchange_s / self.unit_s
        else:
            found["network_slowdown"] = self.model.slowdown
        ranges = {name: self.quantiles(values) for name, values in found.items()}
        return {
            name: {"low": low, "median": middle, "high": high}
            for name, (low, middle, high) in ranges.items()
        }


def fit(
    model: StepModel,
    observations: Sequence[Observation],
    reference_batch: float,
    noise: float,
    known: Known,
) -> Fit:
    """Weigh the variants of ``model`` that could have made ``observations``.

    Args:
        model: its phases' work is right up to one common factor; its overhead, deviation, slowdown
            and exchange are replaced.
        observations: at least one.
        reference_batch: samples of one worker's step, of which overhead and exchange are shares.
        noise: deviation of an observation, as a share of it.
        known: what need not be found.
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
    """Logarithms of what is to be found; the network always is, so that no grid is empty."""
    shares = np.linspace(np.log(_LOWEST), np.log(_HIGHEST), _POINTS)
    axes = {}
    if known.overhead_s is None:
        axes["overhead"] = shares
    if model.topology is None:
        axes["exchange"] = shares
    else:
        axes["slowdown"] = np.linspace(-5 * _LOG_SLOWDOWN, 5 * _LOG_SLOWDOWN, _POINTS)
    if known.deviation is None:
        axes["deviation"] = np.linspace(np.log(1e-4), np.log(_MOST_UNEQUAL), _POINTS)
    return axes


def _log_prior(name: str, logs: Array) -> Array:
    """Log density over the logarithm of a parameter, up to a constant."""
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

    def made(factor: Array) -> tuple[StepModel, Array]:
        unit_s = factor * per_sample * reference_batch
        phases = tuple(
            replace(phase, seconds_per_sample=phase.seconds_per_sample * factor)
            for phase in model.phases
        )
        variants = replace(
            model,
            phases=phases,
            overhead_s=zeros + known.overhead_s
            if known.overhead_s is not None
            else values["overhead"] * unit_s,
            deviation=zeros + known.deviation
            if known.deviation is not None
            else values["deviation"],
            slowdown=values.get("slowdown", zeros + 1),
            exchange_s=values["exchange"] * unit_s if "exchange" in values else zeros,
        )
        return variants, unit_s

    return made(_work(made, zeros, observations, per_sample))


def _work(
    made: Callable[[Array], tuple[StepModel, Array]],
    zeros: Array,
    observations: Sequence[Observation],
    per_sample: float,
) -> Array:
    """The factor on the work at which half of the points lie above their prediction."""
    first = observations[0]
    highest = first.step_s / (per_sample * first.local_batch)
    factor = zeros + highest
    for _ in range(24):
        residuals = _residuals(made(factor)[0], observations)
        # Where most of a step is not work, a step of 1 % takes more than 1 % of work.
        factor = np.clip(
            factor * np.exp(1.3 * np.median(residuals, axis=0)), 1e-4 * highest, 4 * highest
        )
        if np.abs(np.median(residuals, axis=0)).max() < 1e-4:
            break
    return factor


def _residuals(variants: StepModel, observations: Sequence[Observation]) -> Array:
    """log(observed / predicted), of shape (observations, variants)."""
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
    """The axis between the outermost values that are likely, and as many points on it."""
    others = tuple(n for n in range(log_weights.ndim) if n != number)
    likely = np.flatnonzero(log_weights.max(axis=others) > log_weights.max() - _FAR_DOWN)
    low, high = max(0, likely[0] - 1), min(len(axis) - 1, likely[-1] + 1)
    return np.linspace(axis[low], axis[high], len(axis))

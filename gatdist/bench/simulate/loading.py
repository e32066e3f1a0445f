"""From a scenario's file to a checked :class:`~gatdist.bench.simulate.scenario.Scenario`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gatdist.bench.simulate.scenario import Scenario, dotted, spread
from gatdist.bench.simulate.sections import Observed
from gatdist.common.errors import ConfigError, nearest
from gatdist.config import first_error, read_toml, set_value

KINDS = ("measured", "observed", "published", "assumed")
# Caches that grow with the workers bring a little more than the workers themselves; no more.
_MOST_EFFICIENT = 1.1


def load(source: str, overrides: Iterable[str] = ()) -> tuple[Scenario, Path]:
    """Read a scenario, apply ``section.key=value`` overrides, and check it.

    Args:
        source: the path of a ``.toml`` file, or the name of one that comes with the package.
        overrides: ``--set`` arguments.

    Returns:
        The scenario, and the folder from which its paths count.

    Raises:
        ConfigError: the file can't be read, or a figure is unknown, missing or impossible.
    """
    path = Path(source) if source.endswith(".toml") else _own(source)
    values = read_toml(str(path))
    for override in overrides:
        set_value(values, override)
    return parse(values), path.parent


def parse(values: dict[str, Any]) -> Scenario:
    """Check a scenario's tables.

    Raises:
        ConfigError: a figure is unknown, missing or impossible.
    """
    if not isinstance(values.get("predict", {}), dict) or "predict" not in values:
        values = {**values, "predict": values.get("predict", {})}
    try:
        scenario = Scenario.model_validate(values)
    except ValidationError as error:
        raise first_error(error, values, Scenario) from None
    if scenario.observed:
        _require_shared(scenario.observed)
        require_possible(scenario.observed, is_network_told=scenario.network is not None)
    _require_something_to_go_by(scenario)
    _require_batches(scenario)
    _require_known_sources(scenario)
    return scenario


def scenario_names() -> list[str]:
    """Names of the scenarios that come with the package, sorted."""
    return sorted(
        path.name.removesuffix(".toml")
        for path in _folder().iterdir()
        if path.name.endswith(".toml")
    )


def require_possible(observed: Observed, *, is_network_told: bool) -> None:
    """Refuse points that no cluster can have shown.

    Args:
        observed: the points.
        is_network_told: so that it may be known to be slow.

    Raises:
        ConfigError: more workers are worth more than they are, or figures are speeds, not times.
    """
    key = "observed.seconds_per_1000_samples"
    points = sorted(zip(observed.workers, observed.seconds_per_1000_samples, strict=True))
    first, first_s = points[0]
    for workers, seconds in points[1:]:
        efficiency = first_s * first / (seconds * workers)
        if efficiency > _MOST_EFFICIENT:
            raise ConfigError(
                key,
                f"{workers} workers would be {first_s / seconds:.3g} times as fast as {first}, an "
                f"efficiency of {efficiency:.0%}: none is above 100 %",
                value=observed.seconds_per_1000_samples,
                hint="Give seconds for 1,000 samples at every count, of all workers together",
            )
    if (
        len(points) > 1
        and not is_network_told
        and all(_rises_as_workers(points[0], point) for point in points[1:])
    ):
        raise ConfigError(
            key,
            "rise as the workers do, as samples a second would",
            value=observed.seconds_per_1000_samples,
            hint="Give 1000 / (samples a second); if the network is so slow, add [network]",
        )


def _rises_as_workers(first: tuple[int, float], other: tuple[int, float]) -> bool:
    """As speeds at an efficiency of 96 % and more do; times seldom do."""
    return math.isclose(other[1] / first[1], other[0] / first[0], rel_tol=0.04)


def _require_something_to_go_by(scenario: Scenario) -> None:
    measured = scenario.measured
    if scenario.observed or (measured and (measured.scaling or measured.step)):
        return
    timed = scenario.players
    if not timed:
        raise ConfigError(
            "observed",
            "is missing, and nothing says how long a step takes",
            hint="Add [observed] with workers and seconds_per_1000_samples, [measured] with a file "
            "of gatdist bench, or [workload.discriminator], [workload.generator] and [hardware]",
        )
    for name, player in timed.items():
        key = f"workload.{name}"
        if player.seconds_per_sample is None and player.flop_per_sample is None:
            raise ConfigError(
                key, "needs flop_per_sample or seconds_per_sample, where nothing was observed"
            )
        if player.seconds_per_sample is None and scenario.hardware is None:
            raise ConfigError(
                f"{key}.flop_per_sample",
                "needs [hardware] with flop_per_s",
                value=player.flop_per_sample,
            )
    workload = scenario.workload
    if not (workload.global_batch or workload.batch_per_worker):
        raise ConfigError(
            "workload.global_batch", "is required (or batch_per_worker), where nothing was observed"
        )
    _require_network(scenario)


def _require_shared(observed: Observed) -> None:
    samples_of = spread(observed.global_batch, len(observed.workers))
    for workers, samples in zip(observed.workers, samples_of, strict=True):
        if samples is not None and samples < workers:
            raise ConfigError(
                "observed.global_batch",
                f"can't be shared by {workers} workers: some would have had no sample",
                value=samples,
            )


def _require_batches(scenario: Scenario) -> None:
    """A batch that is predicted for says nothing beside one that nobody told."""
    workload, observed = scenario.workload, scenario.observed
    message = workload.global_batch or workload.batch_per_worker or scenario.measured
    others = scenario.predict.global_batch or (scenario.held_out and scenario.held_out.global_batch)
    if others and not (message or (observed and observed.global_batch)):
        raise ConfigError(
            "predict.global_batch",
            "needs observed.global_batch, to be compared with",
            value=others,
        )
    if observed and scenario.measured and (scenario.measured.scaling or scenario.measured.step):
        raise ConfigError(
            "measured", "can't stand beside [observed]", hint="Keep the one to be fitted to"
        )


def _require_network(scenario: Scenario) -> None:
    """Where gradients are sent, something must say how fast."""
    sent = any(player.parameters for player in scenario.players.values())
    network = scenario.network
    if not sent or max(scenario.predict.workers) == 1:
        return
    if network is None:
        raise ConfigError("network", "is required, where nothing was observed")
    if max(scenario.predict.workers) > network.workers_per_host and network.bytes_per_s is None:
        raise ConfigError(
            "network.bandwidth_bytes_per_s", "is required (or bandwidth_bits_per_s) between hosts"
        )


def _require_known_sources(scenario: Scenario) -> None:
    """Sources belong to keys that are there, and begin with what they are."""
    known = set(dotted(scenario.model_dump(exclude={"sources", "predict", "simulation"})))
    for key in list(known):
        while key := key.rpartition(".")[0]:
            known.add(key)
    for key, text in scenario.sources.items():
        if key not in known:
            raise ConfigError(f"sources.{key}", f"no such key. {nearest(key, _close(key, known))}")
        if text.partition(":")[0].strip() not in KINDS:
            raise ConfigError(
                f"sources.{key}",
                f"must begin with what it is: {', '.join(KINDS)}",
                value=text,
                hint=f"Write for example 'published: {text}'",
            )


def _close(key: str, known: Sequence[str] | set[str]) -> list[str]:
    """Keys of the same section; of all, where there is none."""
    section = key.partition(".")[0] + "."
    return [name for name in known if name.startswith(section)] or list(known)


def _folder() -> Any:
    return resources.files("gatdist.bench.simulate") / "scenarios"


def _own(name: str) -> Path:
    if name not in scenario_names():
        raise ConfigError(
            "scenario",
            f"not known. {nearest(name, scenario_names())}; or give a .toml file",
            value=name,
        )
    return Path(str(_folder() / f"{name}.toml"))

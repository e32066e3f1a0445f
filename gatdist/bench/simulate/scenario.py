"""Reading and checking of scenarios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from gatdist.bench.simulate.sections import (
    Checkpoints,
    Data,
    Fault,
    Goal,
    Hardware,
    HeldOut,
    Measured,
    Network,
    Observed,
    Player,
    Predict,
    Price,
    Recovery,
    Run,
    Simulation,
    Spot,
    Stragglers,
    Workload,
)
from gatdist.common.errors import ConfigError, nearest
from gatdist.config import Section, first_error, flatten, read_toml, set_value

KINDS = ("measured", "observed", "published", "assumed")
# Caches that grow with the workers allow slightly more than linear speedup.
_MAX_EFFICIENCY = 1.1
_FOLDER = Path(str(resources.files("gatdist.bench.simulate") / "scenarios"))


class Scenario(Section):
    """A whole scenario."""

    name: str = ""
    predict: Predict
    observed: Observed | None = None
    measured: Measured | None = None
    held_out: HeldOut | None = None
    workload: Workload = Workload()
    hardware: Hardware | None = None
    network: Network | None = None
    stragglers: Stragglers | None = None
    data: Data | None = None
    checkpoints: Checkpoints = Checkpoints()
    faults: list[Fault] = Field(default_factory=list)
    run: Run | None = None
    recovery: Recovery = Recovery()
    price: Price | None = None
    spot: Spot | None = None
    goal: Goal = Goal()
    simulation: Simulation = Simulation()
    sources: dict[str, str] = Field(default_factory=dict)

    @property
    def players(self) -> dict[str, Player]:
        both = {"discriminator": self.workload.discriminator, "generator": self.workload.generator}
        return {name: player for name, player in both.items() if player is not None}

    @property
    def workers_per_host(self) -> int:
        return self.network.workers_per_host if self.network else 1


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a scenario's values to dotted keys; lists of tables get an index in the key."""
    flat: dict[str, Any] = {}
    for key, value in flatten(values).items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, table in enumerate(value):
                flat |= {f"{key}.{number}.{name}": v for name, v in dotted(table).items()}
        else:
            flat[key] = value
    return flat


def spread(batches: Sequence[int] | None, count: int) -> Sequence[int | None]:
    """Return one global batch per point; None means the usual one."""
    if batches is None:
        return [None] * count
    return list(batches) * (count if len(batches) == 1 else 1)


def scenario_names() -> list[str]:
    """Return the names of the scenarios that come with the package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(source: str, overrides: Iterable[str] = ()) -> tuple[Scenario, Path]:
    """Read a scenario, apply ``section.key=value`` overrides, and check it.

    ``source`` is a ``.toml`` file or one of :func:`scenario_names`; its folder is returned, too.

    Raises:
        ConfigError: The file can't be read, or a figure is unknown, missing or impossible.
    """
    path = Path(source)
    if not source.endswith(".toml"):
        if source not in scenario_names():
            hint = nearest(source, scenario_names())
            raise ConfigError("scenario", f"not known. {hint}; or give a .toml file", value=source)
        path = _FOLDER / f"{source}.toml"
    values = read_toml(str(path))
    for override in overrides:
        set_value(values, override)
    return parse(values), path.parent


def parse(values: dict[str, Any]) -> Scenario:
    """Check a scenario's tables; ConfigError if a figure is unknown, missing or impossible."""
    values = {"predict": {}, **values}
    try:
        scenario = Scenario.model_validate(values)
    except ValidationError as error:
        raise first_error(error, values, Scenario) from None
    if scenario.observed:
        _require_possible(scenario.observed, has_network=scenario.network is not None)
    _require_timing(scenario)
    _require_batches(scenario)
    _require_known_sources(scenario)
    return scenario


def _require_possible(observed: Observed, *, has_network: bool) -> None:
    """Refuse points that no cluster can show; with a network, it may be that slow."""
    batches = spread(observed.global_batch, len(observed.workers))
    for workers, samples in zip(observed.workers, batches, strict=True):
        if samples is not None and samples < workers:
            rule = f"is too small for {workers} workers: some would have no sample"
            raise ConfigError("observed.global_batch", rule, value=samples)
    key, times = "observed.seconds_per_1000_samples", observed.seconds_per_1000_samples
    points = sorted(zip(observed.workers, times, strict=True))
    first, first_s = points[0]
    for workers, seconds in points[1:]:
        efficiency = first_s * first / (seconds * workers)
        if efficiency > _MAX_EFFICIENCY:
            raise ConfigError(
                key,
                f"{workers} workers would be {first_s / seconds:.3g} times as fast as {first}, an "
                f"efficiency of {efficiency:.0%}; it can't exceed 100 %",
                value=times,
                hint="Give seconds for 1,000 samples of all workers together",
            )
    # At an efficiency of 96 % or more, speeds are proportional to the workers; times rarely are.
    if (
        len(points) > 1
        and not has_network
        and all(math.isclose(s / first_s, n / first, rel_tol=0.04) for n, s in points[1:])
    ):
        raise ConfigError(
            key,
            "rise in proportion to the workers, as samples per second would",
            value=times,
            hint="Give 1000 / (samples per second); if the network is so slow, add [network]",
        )


def _require_timing(scenario: Scenario) -> None:
    measured, workload, network = scenario.measured, scenario.workload, scenario.network
    if scenario.observed or (measured and (measured.scaling or measured.step)):
        return
    if not scenario.players:
        raise ConfigError(
            "observed",
            "is missing, and nothing else gives the time of a step",
            hint="Add [observed] with workers and seconds_per_1000_samples, [measured] with a file "
            "of gatdist bench, or [workload.discriminator], [workload.generator] and [hardware]",
        )
    for name, player in scenario.players.items():
        key = f"workload.{name}"
        if player.seconds_per_sample is None and player.flop_per_sample is None:
            rule = "needs flop_per_sample or seconds_per_sample, since nothing was observed"
            raise ConfigError(key, rule)
        if player.seconds_per_sample is None and scenario.hardware is None:
            raise ConfigError(
                f"{key}.flop_per_sample",
                "needs [hardware] with flop_per_s",
                value=player.flop_per_sample,
            )
    if not workload.samples:
        rule = "is required (or batch_per_worker), since nothing was observed"
        raise ConfigError("workload.global_batch", rule)
    most = max(scenario.predict.workers)
    if most == 1 or not any(player.parameters for player in scenario.players.values()):
        return
    if network is None:
        raise ConfigError("network", "is required, since nothing was observed")
    if most > network.workers_per_host and network.bytes_per_s is None:
        rule = "is required (or bandwidth_bits_per_s) between hosts"
        raise ConfigError("network.bandwidth_bytes_per_s", rule)


def _require_batches(scenario: Scenario) -> None:
    observed, measured, held_out = scenario.observed, scenario.measured, scenario.held_out
    known = scenario.workload.samples or measured or (observed and observed.global_batch)
    others = scenario.predict.global_batch or (held_out and held_out.global_batch)
    if others and not known:
        rule = "needs observed.global_batch, to be compared with"
        raise ConfigError("predict.global_batch", rule, value=others)
    if observed and measured and (measured.scaling or measured.step):
        raise ConfigError("measured", "excludes [observed]", hint="Keep the one to fit")


def _require_known_sources(scenario: Scenario) -> None:
    known = set(dotted(scenario.model_dump(exclude={"sources", "predict", "simulation"})))
    for key in list(known):
        while key := key.rpartition(".")[0]:
            known.add(key)
    for key, text in scenario.sources.items():
        if key not in known:
            section = key.partition(".")[0] + "."
            close = [name for name in known if name.startswith(section)] or list(known)
            raise ConfigError(f"sources.{key}", f"no such key. {nearest(key, close)}")
        if text.partition(":")[0].strip() not in KINDS:
            raise ConfigError(
                f"sources.{key}",
                f"must start with its kind: {', '.join(KINDS)}",
                value=text,
                hint=f"For example 'published: {text}'",
            )

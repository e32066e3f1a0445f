"""A whole scenario: what was seen, what is to be predicted, and all that is between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from gatdist.bench.simulate.operation import Checkpoints, Fault, Goal, Price, Run, Simulation, Spot
from gatdist.bench.simulate.sections import (
    Data,
    Hardware,
    HeldOut,
    Measured,
    Network,
    Observed,
    Player,
    Predict,
    Stragglers,
    Workload,
)
from gatdist.config import Section, flatten


class Scenario(Section):
    """A whole scenario; :func:`~gatdist.bench.simulate.loading.load` reads one."""

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
    price: Price | None = None
    spot: Spot | None = None
    goal: Goal = Goal()
    simulation: Simulation = Simulation()
    sources: dict[str, str] = Field(default_factory=dict)

    @property
    def players(self) -> dict[str, Player]:
        """Those that are told of, by name, in the order of their phases."""
        message = {
            "discriminator": self.workload.discriminator,
            "generator": self.workload.generator,
        }
        return {name: player for name, player in message.items() if player is not None}

    @property
    def workers_per_host(self) -> int:
        """1 where nothing is said."""
        return self.network.workers_per_host if self.network else 1


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """A scenario's values by dotted keys; those of a list of tables with its number among them."""
    flat: dict[str, Any] = {}
    for key, value in flatten(values).items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, table in enumerate(value):
                flat |= {f"{key}.{number}.{name}": v for name, v in dotted(table).items()}
        else:
            flat[key] = value
    return flat


def spread(message: Sequence[int] | None, count: int) -> Sequence[int | None]:
    """The global batch of each of so many points, of one for all; None where it is the usual."""
    if message is None:
        return [None] * count
    return list(message) * (count if len(message) == 1 else 1)

"""What an update rule is: a sequence of phases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from gatdist.config import GameConfig
from gatdist.game.game import Batch, Game, Observations
from gatdist.registry import Registry

PlayerName = Literal["generator", "discriminator"]


@dataclass(frozen=True)
class Phase:
    """Zero, run ``backward``, reduce, judge finiteness, clip, move: for these players together.

    Attributes:
        name: for timing.
        players: whose gradients ``backward`` leaves in ``.grad``, reduced over the workers, and who
            then move.
        backward: computes those gradients; returns what to report, by tag, one value a sample.
    """

    name: str
    players: tuple[PlayerName, ...]
    backward: Callable[[], Observations]


class UpdateRule(ABC):
    """Decides which gradients are taken, at which point, in which order.

    The step runs the phases one by one: a phase's gradients are computed after the one before it
    has moved its players, so a rule reads like the algorithm in its paper.

    Args:
        game: what is played.
        config: the rule's options.

    Raises:
        ConfigError: the rule is not right for this game, by name, with what to use instead.
    """

    def __init__(self, game: Game, config: GameConfig) -> None:
        self.game = game
        self.config = config

    @abstractmethod
    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The phases of one step."""


update_rules: Registry[type[UpdateRule]] = Registry("game.update_rule")


def register_update_rule(name: str) -> Callable[[type[UpdateRule]], type[UpdateRule]]:
    """Decorator: makes an :class:`UpdateRule` available as ``game.update_rule = name``."""
    return update_rules.register(name)

"""What GAT is: losses, penalties, and the update rules that play them."""

from gatdist.game.game import Batch, Game
from gatdist.game.losses import Loss, register_loss
from gatdist.game.penalties import Penalty
from gatdist.game.updates import Phase, UpdateRule, register_update_rule, update_rules

__all__ = [
    "Batch",
    "Game",
    "Loss",
    "Penalty",
    "Phase",
    "UpdateRule",
    "register_loss",
    "register_update_rule",
    "update_rules",
]

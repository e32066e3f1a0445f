"""What GAT is: losses, penalties, augmentation, and the update rules that play them."""

from gatdist.game.exactness import require_whole_batches, require_whole_groups
from gatdist.game.game import Game
from gatdist.game.losses import Loss, register_loss
from gatdist.game.penalties import Observations, Penalty
from gatdist.game.tasks import Draws, Fields, Task, register_task
from gatdist.game.terms import Context, Term, register_term
from gatdist.game.updates import (
    Hyperparameters,
    Phase,
    Step,
    UpdateRule,
    build_update_rule,
    register_update_rule,
    update_rules,
)

__all__ = [
    "Context",
    "Draws",
    "Fields",
    "Game",
    "Hyperparameters",
    "Loss",
    "Observations",
    "Penalty",
    "Phase",
    "Step",
    "Task",
    "Term",
    "UpdateRule",
    "build_update_rule",
    "register_loss",
    "register_task",
    "register_term",
    "register_update_rule",
    "require_whole_batches",
    "require_whole_groups",
    "update_rules",
]

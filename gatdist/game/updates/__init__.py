"""Update rules: which gradients, at which point, in which order."""

from gatdist.game.updates import (  # noqa: F401  (importing registers)
    alternating,
    competitive,
    consensus,
    one_stage,
    simultaneous,
)
from gatdist.game.updates.rule import (
    Hyperparameters,
    Phase,
    Step,
    UpdateRule,
    build_update_rule,
    register_update_rule,
    second_derivatives,
    update_rules,
)

__all__ = [
    "Hyperparameters",
    "Phase",
    "Step",
    "UpdateRule",
    "build_update_rule",
    "register_update_rule",
    "second_derivatives",
    "update_rules",
]

"""Update rules: which gradients, at which point, in which order. One file a rule."""

from gatdist.game.updates import (  # noqa: F401  (importing registers)
    alternating,
    competitive,
    conjugate,
    consensus,
    extragradient,
    one_stage,
    optimistic,
    simultaneous,
)
from gatdist.game.updates.rule import (
    Phase,
    Step,
    UpdateRule,
    build_update_rule,
    register_update_rule,
    update_rules,
)

__all__ = [
    "Phase",
    "Step",
    "UpdateRule",
    "build_update_rule",
    "register_update_rule",
    "update_rules",
]

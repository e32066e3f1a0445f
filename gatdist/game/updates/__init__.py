"""Update rules: which gradients, in which order. One file a rule."""

from gatdist.game.updates import alternating, one_stage, simultaneous  # noqa: F401  (importing registers)
from gatdist.game.updates.rule import Phase, UpdateRule, register_update_rule, update_rules

__all__ = ["Phase", "UpdateRule", "register_update_rule", "update_rules"]

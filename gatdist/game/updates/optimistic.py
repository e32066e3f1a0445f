"""Optimistic gradient descent (Daskalakis et al. 2018)."""

from __future__ import annotations

from gatdist.game.updates.rule import register_update_rule
from gatdist.game.updates.simultaneous import Simultaneous


@register_update_rule("optimistic")
class Optimistic(Simultaneous):
    """w ← w − 2η F(w) + η F(w₋₁): the field of ``simultaneous`` and the direction ``optimistic``.

    The direction can be had with other fields too: ``optim.*.direction = "optimistic"``.
    """

    direction = "optimistic"

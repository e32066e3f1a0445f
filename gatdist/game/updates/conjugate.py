"""Nonlinear conjugate gradients for both players (Naganuma & Iiduka 2023)."""

from __future__ import annotations

from gatdist.game.updates.rule import register_update_rule
from gatdist.game.updates.simultaneous import Simultaneous


@register_update_rule("conjugate")
class Conjugate(Simultaneous):
    """d ← −g + β d₋₁ for each player: the field of ``simultaneous``, the direction ``conjugate``.

    The direction can be had with other fields too: ``optim.*.direction = "conjugate"``.
    """

    direction = "conjugate"

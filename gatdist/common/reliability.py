"""Formulas of failures and checkpoints."""

from __future__ import annotations

import math


def young_s(cost_s: float, mtbf_s: float) -> float:
    """Return the best interval between checkpoints by Young (1974): √(2 C M).

    Args:
        cost_s: Seconds C for which a checkpoint stops training.
        mtbf_s: Mean time M between failures.
    """
    return math.sqrt(2 * cost_s * mtbf_s)

"""Which number of workers to take: where more stop paying, the fastest, the cheapest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from gatdist.bench.simulate.operation import Goal

Points = Sequence[Mapping[str, Any]]


def advice(goal: Goal, points: Points, alone_s: float) -> dict[str, Any]:
    """JSON values, as :func:`~gatdist.bench.simulate.study.simulate` tells of them.

    Args:
        goal: what is wanted.
        points: as the study has them.
        alone_s: seconds for 1,000 samples of one worker, the first point where no run is played.
    """
    market = cheapest_market(points)
    hours, usd = _of_market(points, market, "hours"), _of_market(points, market, "usd")
    times = _of_market(points, market, "hours_per_million_samples")
    costs = _of_market(points, market, "usd_per_million_samples")
    if market is None:
        times = {1: alone_s} | {p["workers"]: p["seconds_per_1000_samples"] for p in points}
    deadline, budget = goal.deadline_hours, goal.budget_usd
    in_time = [w for w, taken in hours.items() if deadline is not None and taken <= deadline]
    paid = [w for w, cost in usd.items() if budget is not None and cost <= budget]
    return {
        "market": market,
        "stops_paying": stops_paying(sorted(times.items()), goal.worth),
        "worth": goal.worth,
        "fastest": min(times, key=times.__getitem__, default=None),
        "cheapest": min(costs, key=costs.__getitem__, default=None),
        "fewest_in_time": min(in_time, default=None),
        "fastest_within_budget": min(paid, key=times.__getitem__, default=None),
    }


def stops_paying(curve: Sequence[tuple[int, float]], worth: float) -> int | None:
    """The number of workers from which on another brings less than ``worth`` of one.

    Between two neighbours a < b of the curve, each added worker brings (S(b) − S(a)) / (b − a) of
    what one of the smallest number does, S being the speedup over it times that number.

    Args:
        curve: workers and times, ascending in workers.
        worth: above 0, at most 1.

    Returns:
        The last number before that falls below ``worth``; None where it does not.
    """
    for (a, a_s), (b, b_s) in pairwise(curve):
        smallest, unit_s = curve[0]
        if smallest * (unit_s / b_s - unit_s / a_s) / (b - a) < worth:
            return a
    return None


def cheapest_market(points: Points) -> str | None:
    """Whose runs cost less in sum; the first, where nothing has a price; None without runs."""
    markets = dict.fromkeys(run["market"] for point in points for run in point["runs"])
    totals = {market: sum(_of_market(points, market, "usd").values()) for market in markets}
    # One whose runs never end has fewer prices.
    counts = {market: len(_of_market(points, market, "usd")) for market in markets}
    return min(markets, key=lambda market: (-counts[market], totals[market]), default=None)


def _of_market(points: Points, market: str | None, key: str) -> dict[int, float]:
    """By workers, where there is one."""
    return {
        point["workers"]: run[key]
        for point in points
        for run in point["runs"]
        if run["market"] == market and run[key] is not None
    }

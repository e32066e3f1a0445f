"""What a run asks of Ray's autoscaler, where there is one. Elsewhere, nobody heeds it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import ray.autoscaler.sdk
from ray._private import state

_SET_BY_KUBERAY = "RAY_enable_autoscaler_v2"


class Demand:
    """Room for workers. The autoscaler keeps it until it is told otherwise, so after it, it is.

    Args:
        needs: of each worker, by resource.
        count: how many workers there could be; with 0, nothing is ever asked.
        at_once: whether to ask for all of the room at the start, and not only when it is missed.
    """

    def __init__(self, needs: Mapping[str, float], count: int, *, at_once: bool) -> None:
        self.needs, self.count, self.at_once = dict(needs), count, at_once
        self._reported = False

    def __enter__(self) -> Self:
        if self.at_once:
            self.report()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._reported:
            ray.autoscaler.sdk.request_resources(bundles=[])

    def report(self) -> None:
        """Ask for it."""
        self._reported = bool(self.count)
        if self._reported:
            ray.autoscaler.sdk.request_resources(bundles=[self.needs] * self.count)


def may_grow() -> bool:
    """Whether an autoscaler may bring hosts.

    Ray's own tell nobody what they may bring. They are known by what is found on the head, where
    the driver of a job runs: a variable that KubeRay sets, the file that ``ray up`` sends there.
    """
    return (
        os.environ.get(_SET_BY_KUBERAY) in ("1", "true")
        or Path("~/ray_bootstrap_config.yaml").expanduser().exists()
        or bool(state.state.get_max_resources_from_cluster_config())
    )

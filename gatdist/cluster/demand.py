"""Requests hosts from Ray's autoscaler, for all runs of a cluster together.

Ray keeps one request per cluster, the last one. So the runs share an actor that requests what all
of them need. A run renews its part, which expires if its driver is killed.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self, cast

from gatdist.cluster import connection  # noqa: F401  sets up Ray's import

# isort: split
import ray
import ray.autoscaler.sdk
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_NAME, _NAMESPACE = "gatdist-demand", "gatdist"
_RENEW_S, _EXPIRES_S = 15.0, 60.0
_ANSWER_S = 30.0

Bundle = tuple[dict[str, float], dict[str, str]]  # resources, and labels of the host


class Requests:
    """What each run needs at present."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[list[Bundle], float]] = {}

    def put(self, run: str, bundles: list[Bundle], until_s: float) -> None:
        self._of[run] = bundles, until_s

    def drop(self, run: str) -> None:
        self._of.pop(run, None)

    def total(self, now_s: float) -> list[Bundle]:
        """Return what all runs need; forget those whose time is over."""
        self._of = {run: kept for run, kept in self._of.items() if kept[1] > now_s}
        return [bundle for bundles, _ in self._of.values() for bundle in bundles]


class _Requester:
    """The actor; it ends when no run has needed it for a while."""

    def __init__(self) -> None:
        self._requests, self._lock = Requests(), threading.Lock()
        self._sent: list[Bundle] | None = None
        here = ray.get_runtime_context()
        self._me = here.current_actor
        # One that Ray has restarted learns first what the runs need.
        self._silent_s = 2 * _RENEW_S if here.was_current_actor_reconstructed else 0.0
        self._began = time.monotonic()
        threading.Thread(target=self._expire, daemon=True).start()

    def put(self, run: str, bundles: list[Bundle]) -> None:
        with self._lock:
            self._requests.put(run, bundles, time.monotonic() + _EXPIRES_S)
            self._send(again=True)  # Ray's head may have forgotten it

    def drop(self, run: str) -> None:
        with self._lock:
            self._requests.drop(run)
            self._send()

    def _send(self, *, again: bool = False) -> None:
        now = time.monotonic()
        total = self._requests.total(now)
        if now - self._began >= self._silent_s and (again or total != self._sent):
            ray.autoscaler.sdk.request_resources(
                bundles=[resources for resources, _ in total],
                bundle_label_selectors=[labels for _, labels in total],
            )
            self._sent = total

    def _expire(self) -> None:
        unused_since = time.monotonic()
        while time.monotonic() - unused_since < _EXPIRES_S:
            time.sleep(1.0)
            with self._lock:
                with suppress(Exception):  # while Ray's head restarts; the next one may succeed
                    self._send()
                if self._requests.total(time.monotonic()):
                    unused_since = time.monotonic()
        ray.kill(self._me)


class Demand:
    """A context that requests hosts for ``count`` workers from Ray's autoscaler.

    It sends the request at the start (``at_once``) or by :meth:`report`, and cancels it at its end.

    Args:
        needs: resources of each worker.
        labels: that its host must have.
        count: number of workers; 0: nothing is requested.
    """

    def __init__(
        self, needs: Mapping[str, float], labels: Mapping[str, str], count: int, *, at_once: bool
    ) -> None:
        self._bundles: list[Bundle] = [(dict(needs), dict(labels))] * count
        self._at_once, self._run = at_once, uuid.uuid4().hex
        self._over = threading.Event()
        self._renewing: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._at_once:
            self.report()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._renewing:
            self._over.set()
            self._renewing.join(_ANSWER_S)
            self._call("drop", self._run)

    def report(self) -> None:
        """Send the request, and renew it from now on."""
        if self._bundles and self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, name="demand", daemon=True)
            self._renewing.start()

    def _renew(self) -> None:
        while True:
            self._call("put", self._run, self._bundles)
            if self._over.wait(_RENEW_S):
                return

    def _call(self, what: str, *given: Any) -> None:
        with suppress(ray.exceptions.RayError, ValueError):  # the next one is sent to a new actor
            requester = (
                ray.remote(num_cpus=0)(cast(Any, _Requester))
                .options(
                    name=_NAME,
                    namespace=_NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    max_restarts=-1,
                    # Other hosts may be taken away.
                    scheduling_strategy=NodeAffinitySchedulingStrategy(
                        ray.get_runtime_context().get_node_id(), soft=True
                    ),
                )
                .remote()
            )
            ray.get(getattr(requester, what).remote(*given), timeout=_ANSWER_S)

"""One launch of the workers through Ray Train, from its start to its end."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gatdist.cluster import connection  # noqa: F401  sets up Ray's import

# isort: split
import ray
from ray._raylet import PlacementGroupID
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import PlacementGroup

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.network import choose_interface
from gatdist.cluster.preflight import HostInfo, host_info, require_compatible
from gatdist.cluster.worker import work
from gatdist.common.errors import ClusterError, WorkerLostError, summary
from gatdist.config import Config

# How often Ray Train polls its workers; gatdist's heartbeats are faster.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# The driver handles preemption notices itself.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")

# The driver ends hung workers, and names them; the process group's timeout is the fallback.
_GRACE_S = 30.0


class Attempt(threading.Thread):
    """Ray Train in a thread of the driver; ``error`` is what it raised.

    Args:
        config: Of the run.
        num_workers: Number of workers.
        needs: Resources of each worker.
        bridge: Of this launch. Its mailbox holds what workers need, since Ray may log the rest.
        records: An empty local folder for Ray Train's own records, which are not used.
        reason: Why there is this launch, for ``attempts.jsonl``.
        first: Whether this is the first launch of the run.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_workers: int,
        needs: dict[str, float],
        bridge: Bridge,
        records: str,
        reason: str,
        first: bool,
    ) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.error: BaseException | None = None
        cluster = config.cluster
        automatic = "nccl" if "GPU" in needs else "gloo"
        self._trainer = _Trainer(
            work,
            train_loop_config={"bridge": bridge, "reason": reason},
            torch_config=_TorchConfig(
                backend=automatic if cluster.backend == "auto" else cluster.backend,
                timeout_s=int(cluster.heartbeat_timeout_s + _GRACE_S),
                bridge=bridge,
                first=first,
            ),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu="GPU" in needs,
                resources_per_worker=needs,
                placement_strategy=cluster.placement.upper(),
                label_selector=dict(cluster.labels) or None,
            ),
            run_config=RunConfig(
                name="gatdist",
                storage_path=records,
                failure_config=FailureConfig(max_failures=0),
                callbacks=[_ReportController(bridge)],  # type: ignore[list-item]
            ),
        )

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error

    def abort(self, controller: Any, *, waits: bool = True) -> None:
        """End all workers at once, also those that do not answer.

        Args:
            controller: Of the launch, from :class:`~gatdist.cluster.bridge.DriverUpdate`. All that
                it has started ends with it. None if it has not started: it ends with the driver.
            waits: Whether to wait for Ray Train's end. What is left ends with the driver.
        """
        if controller is None:
            return
        with suppress(ray.exceptions.RayError):
            ray.kill(controller)
        if waits:
            self.join()
            self.release()

    def release(self) -> None:
        """Release the resources that a killed controller had reserved."""
        job = ray.get_runtime_context().get_job_id()
        for name, group in ray.util.placement_group_table().items():
            if name.endswith(job) and group["state"] != "REMOVED":
                ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))


class _Trainer(TorchTrainer):
    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # Each starts a process. Without a dashboard, the cleaner outlives the controller for ever;
        # `abort` does its work. The other one serves Ray Data, which training does not use.
        unused = PlacementGroupCleanerCallback, DatasetsCallback
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unused)]


class _ReportController(ControllerCallback):
    """Sends the driver a handle of the controller, by which it can be ended."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def after_controller_start(self, train_run_context: Any) -> None:
        self._bridge.report("control", [ray.get_runtime_context().current_actor])


@dataclass
class _TorchConfig(TorchConfig):
    """Ray Train's, with what the preflight checks need."""

    bridge: Bridge | None = None
    first: bool = True

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Preflight


class _Preflight(_TorchBackend):
    """Ray Train's torch backend, which forms the process group after the preflight checks."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        config: _TorchConfig = backend_config
        bridge = config.bridge
        assert bridge is not None
        try:
            found = worker_group.execute(_look_around, bridge, config.backend == "nccl")
            require_compatible(found, time.time())
        except ClusterError as error:
            bridge.report("fail", ClusterError.__name__, str(error))
            raise
        try:
            super().on_start(worker_group, backend_config)
        except Exception as error:
            hosts = ", ".join(sorted({f"{one.host} ({one.address})" for one in found}))
            message = ClusterError(
                "cluster",
                f"the hosts {hosts} can't reach one another ({summary(error)})",
                hint="gatdist doctor --address … says which; open all ports between them",
            )
            # If they could before, the network may be repaired soon.
            kind = ClusterError if config.first else WorkerLostError
            bridge.report("fail", kind.__name__, str(message))
            raise


def _look_around(bridge: Bridge, use_gpu: bool) -> HostInfo:
    """In a worker: choose the network interface and examine the host."""
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    choose_interface(address)
    return host_info(address, bridge.given()["marker"], use_gpu)

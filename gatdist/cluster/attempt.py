"""One launch of the workers through Ray Train, from its start to its end."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Any

from gatdist.cluster import connection  # noqa: F401  sets up what Ray's import needs

# isort: split
import ray
from ray._raylet import PlacementGroupID
from ray.train.torch.config import TorchConfig, _TorchBackend
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
from gatdist.cluster.worker import work
from gatdist.config import ClusterConfig, Config

# Ray Train looks at its workers so often; what ours tell by themselves is faster still.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# Notices of preemption are heeded by the driver, which needs no barrier for it.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")


class Attempt(threading.Thread):
    """Ray Train at work, in a thread of the driver.

    Args:
        config: of the run.
        run_dir: its folder.
        num_workers: how many.
        needs: what each worker needs, by resource.
        bridge: of this launch.
        records: an empty local folder for Ray Train's own records, on which nothing depends.
        reason: for ``attempts.jsonl``.

    Attributes:
        error: what Ray Train raised, once the thread has ended.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str,
        *,
        num_workers: int,
        needs: dict[str, float],
        bridge: Bridge,
        records: str,
        reason: str,
    ) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.error: BaseException | None = None
        cluster = config.cluster
        self._trainer = _Trainer(
            work,
            train_loop_config={
                "config": config.model_dump_json(),
                "run_dir": run_dir,
                "bridge": bridge,
                "reason": reason,
            },
            torch_config=_TorchConfig(
                backend=_backend(cluster, needs), timeout_s=int(cluster.timeout_s)
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
                callbacks=[_Introduction(bridge)],  # type: ignore[list-item]
            ),
        )

    def run(self) -> None:
        """Fit, and keep what it raises."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error

    def abort(self, controller: Any) -> None:
        """End all workers at once, also those that do not answer, and wait for Ray Train's end.

        Args:
            controller: of the launch, from :class:`~gatdist.cluster.bridge.News`. All that it has
                started goes with it.
        """
        with suppress(ray.exceptions.RayError):
            ray.kill(controller)
        self.join()
        _release_places()


def _release_places() -> None:
    """Give back what a controller had reserved that was killed."""
    job = ray.get_runtime_context().get_job_id()
    for name, group in ray.util.placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))


class _Trainer(TorchTrainer):
    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # The cleaner outlives the controller, and where there is no dashboard for ever. What a
        # controller leaves that was killed is given back by `abort`.
        found = super()._create_default_callbacks()
        return [c for c in found if not isinstance(c, PlacementGroupCleanerCallback)]


class _Introduction(ControllerCallback):
    """Tells the driver which actor the controller is, so that it can be ended."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller, before it starts workers."""
        controller = ray.get_runtime_context().current_actor
        self._bridge.tell("control", [controller])


class _InterfaceFirst(_TorchBackend):
    """Ray Train's torch backend, after each worker has chosen its network interface."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called by Ray Train before the process group is made."""
        worker_group.execute(_choose_own_interface)
        super().on_start(worker_group, backend_config)


class _TorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _InterfaceFirst


def _choose_own_interface() -> None:
    choose_interface(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _backend(cluster: ClusterConfig, needs: dict[str, float]) -> str:
    return {"auto": "nccl" if "GPU" in needs else "gloo"}.get(cluster.backend, cluster.backend)

"""Starts workers through Ray Train, which replaces lost ones if the others continue."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gatdist.cluster import connection  # noqa: F401  sets up Ray's import

# isort: split
import ray.train.torch
from ray._raylet import PlacementGroupID
from ray.train.backend import Backend
from ray.train.torch.config import TorchConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    ReplicaGroupCallback,
    WorkerGroupCallback,
)
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import PlacementGroup

from gatdist.cluster import epochs
from gatdist.cluster.bridge import Bridge
from gatdist.cluster.nodes import dead_actors
from gatdist.cluster.policies import poll_interval_s
from gatdist.cluster.preflight import HostInfo, require_compatible
from gatdist.cluster.rendezvous import join
from gatdist.cluster.worker import examine, prepare_to_join, work
from gatdist.common.errors import ClusterError, WorkerLostError, rebuilt, summary
from gatdist.config import Config

# How often Ray Train polls its workers: so it learns which to replace. The user may set it.
_POLLS = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
_chooses_polls = _POLLS not in os.environ
# The driver handles preemption notices itself.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")

# The driver ends hung workers, and names them; the process group's timeout is the fallback.
_GRACE_S = 30.0


class RayTrain(threading.Thread):
    """A run of Ray Train in a thread of the driver; ``error`` is what it raised.

    Args:
        config: Of the run.
        number: Of this one within its launch, from 0. The workers of later ones join the first.
        num_workers: Number of workers; also an attribute.
        sizes: Numbers of workers that may continue after a loss; none if it ends the launch.
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
        number: int,
        num_workers: int,
        sizes: Sequence[int],
        needs: dict[str, float],
        bridge: Bridge,
        records: str,
        reason: str,
        first: bool,
    ) -> None:
        super().__init__(name=f"ray-train-{number}", daemon=True)
        self.num_workers = num_workers
        self.error: BaseException | None = None
        if _chooses_polls:
            os.environ[_POLLS] = str(poll_interval_s(num_workers))
        cluster = config.cluster
        self._trainer = _Trainer(
            work,
            train_loop_config={"bridge": bridge, "reason": reason},
            torch_config=_TorchConfig(
                backend=cluster.backend,
                timeout_s=int(cluster.heartbeat_timeout_s + _GRACE_S),
                bridge=bridge,
                first=first,
                exact=config.run.reduction == "canonical",
                sizes=sizes,
                joins=number > 0,
            ),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu="GPU" in needs,
                resources_per_worker=needs,
                placement_strategy=cluster.placement.upper(),
                label_selector=dict(cluster.labels) or None,
            ),
            run_config=RunConfig(
                name=f"gatdist-{number}",
                storage_path=records,
                # -1: lost workers are replaced, without limit; the driver sets one.
                failure_config=FailureConfig(max_failures=-1 if sizes else 0),
                callbacks=[_Control(bridge, number)],  # type: ignore[list-item]
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
            controller: From :class:`~gatdist.cluster.bridge.DriverUpdate`. All that it has started
                ends with it.
            waits: Whether to wait for Ray Train's end. What is left ends with the driver.
        """
        with suppress(ray.exceptions.RayError):
            ray.kill(controller)
        if waits:
            self.join()

    @staticmethod
    def release() -> None:
        """Release the resources that killed controllers of this driver had reserved."""
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


class _Control(ControllerCallback, WorkerGroupCallback, ReplicaGroupCallback):
    """Sends the driver a handle of the controller, by which it can be ended.

    If several workers are dead, it ends what Ray Train keeps of each before it replaces one, and
    before it replaces the next one: it would send a message to the others, whose failure ends all
    workers.
    """

    def __init__(self, bridge: Bridge, number: int) -> None:
        self._bridge, self._number = bridge, number
        self._group: Any = None

    def after_controller_start(self, train_run_context: Any) -> None:
        me = ray.get_runtime_context().current_actor
        if not self._bridge.report("control", self._number, [me]):
            raise WorkerLostError("the launch has ended before its controller started")

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._end_dead()

    def after_replica_group_start(self, replica_group: Any) -> None:
        self._end_dead()

    def _end_dead(self) -> None:
        if self._group is None or not self._group.has_started():
            return
        replicas = self._group.get_replica_groups() or []
        of_actor = {w.actor._actor_id.hex(): each for each in replicas for w in each.get_workers()}
        for actor in dead_actors(of_actor):
            of_actor[actor].shutdown()


@dataclass
class _TorchConfig(TorchConfig):
    """Ray Train's, with what the preflight checks need."""

    bridge: Bridge | None = None
    first: bool = True
    exact: bool = False  # whether results must be bit-identical
    # Numbers of workers that may continue; none: a loss ends the launch.
    sizes: Sequence[int] = ()
    joins: bool = False  # whether these workers join others

    @property
    def backend_cls(self) -> type[Backend]:
        return _Replacing if self.sizes else _Preflight


class _Preflight(Backend):
    """Forms the process group after the preflight checks."""

    share_cuda_visible_devices = True  # as Ray Train's torch backend does

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        config: _TorchConfig = backend_config
        bridge = config.bridge
        assert bridge is not None
        try:
            new = _look_at(worker_group, config)
            for message in require_compatible(new, time.time(), exact=config.exact):
                bridge.emit("warning", {"message": message})
        except ClusterError as error:
            bridge.report("fail", ClusterError.__name__, str(error))
            raise
        bridge.report("examined", new)
        try:
            failure = _form_group(worker_group, config, new)
        except Exception as died:
            failure = f"the workers did not connect ({summary(died)})"
        if failure:
            # If they could before, the network may be repaired soon.
            kind = ClusterError if config.first else WorkerLostError
            bridge.report("fail", kind.__name__, failure)
            raise rebuilt(kind.__name__, failure)


class _Replacing(_Preflight):
    """Of a run that continues without lost workers: Ray Train replaces each by itself."""

    has_replica_groups = True

    def __init__(self) -> None:
        super().__init__()
        self._has_started = False

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        config: _TorchConfig = backend_config
        bridge = config.bridge
        assert bridge is not None
        if not (config.joins or self._has_started):
            super().on_start(worker_group, backend_config)
            self._has_started = True
            bridge.report("enroll", config.sizes, worker_group.execute(epochs.this_worker))
        elif config.joins or bridge.report("has_members"):
            try:
                worker_group.execute(prepare_to_join, config.exact)
            except ray.exceptions.RayActorError as died:  # which Ray Train would not try again
                raise WorkerGroupStartupFailedError("a worker died as it started") from died
        else:
            bridge.report("fail", WorkerLostError.__name__, "all workers died")
            raise WorkerLostError("all workers died")


def _look_at(worker_group: Any, config: _TorchConfig) -> list[HostInfo]:
    found: list[HostInfo] = worker_group.execute(
        examine, config.bridge, config.backend == "nccl", config.exact
    )
    return found


def _form_group(worker_group: Any, config: _TorchConfig, found: Sequence[HostInfo]) -> str:
    """Form the process group, as Ray Train would; return the first worker's error or ""."""
    master = worker_group.execute_single(0, epochs.free_address)
    worker_group.execute(_set_launch_variables, *master)
    hosts = {rank: f"{one.host} ({one.address})" for rank, one in enumerate(found)}
    errors = worker_group.execute(_join, config.backend, float(config.timeout_s), hosts)
    return next((error for error in errors if error), "")


def _set_launch_variables(address: str, port: int) -> None:
    """In a worker: set what torch's own launcher sets, for libraries that read it."""
    context = ray.train.get_context()
    variables = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
    }
    os.environ.update({name: str(value) for name, value in variables.items()})


def _join(backend: str, limit_s: float, hosts: Mapping[int, str]) -> str:
    """In a worker: join the process group; return the error or ""."""
    rank = ray.train.get_context().get_world_rank()
    try:
        epochs.abort_first = join(
            backend,
            ray.train.torch.get_device(),
            rank=rank,
            world_size=len(hosts),
            master=(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
            host=hosts[rank],
            arrive_s=limit_s,
            connect_s=limit_s,
            known_hosts=hosts,
        )
    except ClusterError as error:
        return str(error)
    return ""

"""Launches the workers of a run through Ray Train."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatdist.cluster.connection import connected, log_file  # sets up what Ray's import needs

# isort: split
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.network import choose_interface
from gatdist.cluster.processes import end_descendants
from gatdist.cluster.quiet import output_to_file, shown_on
from gatdist.config import Config, env_references, parse_config
from gatdist.errors import ClusterError, GatdistError, TrainingError, WorkerLostError, rebuilt
from gatdist.storage import Store
from gatdist.training.interrupts import Interrupts

if TYPE_CHECKING:
    from gatdist.monitor.console import Console

_DRAIN_S = 0.2
_RESUMES = "the same command goes on from the last checkpoint. Ray's log:"
# Ours sends and stores little through Ray; its default takes a third of the machine's memory.
_OBJECT_STORE_BYTES = 100 * 2**20


def fit(config: Config, run_dir: str, console: Console | None) -> dict[str, Any]:
    """Train with ``cluster.workers`` workers, here or on the cluster at ``cluster.address``.

    Args:
        config: of the run.
        run_dir: its folder: a URL, or an absolute path that all workers reach.
        console: shows progress; None shows nothing.

    Returns:
        See :func:`gatdist.training.loop.run`.

    Raises:
        ClusterError: nobody answers at the address, or the cluster is too small.
        WorkerLostError: a worker or its host died.
        GatdistError: what the training loop raised, of the same class.
    """
    log = log_file(run_dir)
    with (
        output_to_file(log) as terminal,
        shown_on(console, terminal),
        # Ray's own records; nothing of ours depends on them.
        tempfile.TemporaryDirectory(prefix="gatdist-ray-", ignore_cleanup_errors=True) as records,
        _cluster(config, log),
    ):
        bridge = Bridge()
        fitting = _Fitting(_trainer(config, run_dir, bridge, records))
        emit = console.event if console else lambda kind, fields: None

        def show() -> None:
            for kind, fields in bridge.call("take"):
                emit(kind, fields)

        # Ray Train takes over SIGINT if it runs in the main thread; there, it is ours.
        # At the second signal, a Ray of our own goes with us; one that we joined stays.
        leave = (lambda: None) if config.cluster.address else end_descendants
        with Interrupts(emit, lambda: bridge.call("request_stop"), before_leaving=leave):
            fitting.start()
            while fitting.is_alive():
                fitting.join(_DRAIN_S)
                show()
        outcome: dict[str, Any] | None = bridge.call("outcome")
        if outcome is not None and fitting.error is None:
            return outcome
        raise _explained(bridge.call("failure"), fitting.error, log)


class _Fitting(threading.Thread):
    """Ray Train at work."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        """Fit, and keep what it raises."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


def _trainer(config: Config, run_dir: str, bridge: Bridge, records: str) -> TorchTrainer:
    cluster = config.cluster
    gpus = _gpus_per_worker(config)
    resources = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": float(gpus)} if gpus else {})
    backend = {"auto": "nccl" if gpus else "gloo"}.get(cluster.backend, cluster.backend)
    return TorchTrainer(
        _work,
        train_loop_config={
            "config": config.model_dump_json(),
            "run_dir": run_dir,
            "mailbox": bridge.actor,
        },
        torch_config=_TorchConfig(backend=backend, timeout_s=int(cluster.timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu=bool(gpus), resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name="gatdist",
            storage_path=records,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    )


def _work(given: dict[str, Any]) -> None:
    """One worker: the training loop with the process group that Ray Train has made."""
    import torch

    from gatdist.parallel.communicator import TorchCommunicator
    from gatdist.training.loop import run

    bridge = Bridge(given["mailbox"])
    config = parse_config(json.loads(given["config"]))
    comm = TorchCommunicator(ray.train.torch.get_device())
    torch.set_num_threads(config.cluster.cpus_per_worker)
    try:
        with bridge.stop_flag() as stop:
            outcome = run(
                config,
                comm,
                Store(given["run_dir"], config.run.storage_options),
                should_stop=stop.is_set,
                emit=bridge.emit if comm.is_main else lambda kind, fields: None,
            )
    except GatdistError as error:
        bridge.call("fail", type(error).__name__, str(error))
        raise
    except RuntimeError as error:
        if _is_lost_connection(error):
            lost = f"worker {comm.rank} on {socket.gethostname()} lost the others: one of them died"
            bridge.call("fail", WorkerLostError.__name__, f"{lost}, or the network failed")
        raise
    if comm.is_main:
        bridge.call("finish", outcome)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another worker is gone. Gloo has no class for that."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


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


@contextmanager
def _cluster(config: Config, log: Path) -> Iterator[None]:
    """Connected to a Ray that is large enough: one of our own, or that at ``cluster.address``."""
    address = config.cluster.address
    if not address:
        _require_room(config, {"CPU": os.cpu_count() or 1, "GPU": _num_gpus()}, "this machine")
    with connected(address, log, env_references(config), _OBJECT_STORE_BYTES):
        if address:
            _require_room(config, ray.cluster_resources(), "the cluster")  # type: ignore[no-untyped-call]
        yield


def _require_room(config: Config, has: Mapping[str, float], where: str) -> None:
    """Raise ClusterError if the workers can never be placed: Ray would wait for ever."""
    workers = config.cluster.workers
    needs = {"CPU": config.cluster.cpus_per_worker, "GPU": _gpus_per_worker(config)}
    for name, each in needs.items():
        if has.get(name, 0) < workers * each:
            room = int(has.get(name, 0) // each)
            raise ClusterError(
                "--workers",
                f"need {workers * each} {name}s, and {where} has {has.get(name, 0):g}",
                value=workers,
                mend=f"Use --workers {room}" if room else f"Add a host with a {name}",
            )


def _gpus_per_worker(config: Config) -> int:
    asked = config.cluster.gpus_per_worker
    return min(1, _num_gpus()) if asked is None else asked


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _explained(
    failure: tuple[str, str] | None, error: BaseException | None, log: Path
) -> GatdistError:
    """What went wrong, for people: a worker's own error if it told one, else what Ray saw."""
    if failure is not None:
        told = rebuilt(*failure)
        return (
            WorkerLostError(f"{told}; {_RESUMES} {log}")
            if isinstance(told, WorkerLostError)
            else told
        )
    failures = getattr(error, "worker_failures", None) or {}
    for rank, cause in sorted(failures.items()):
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        if isinstance(cause, ray.exceptions.RayActorError):
            return WorkerLostError(f"worker {rank} died ({lines[0]}); {_RESUMES} {log}")
        return TrainingError(f"worker {rank} failed: {lines[-1]}. The whole story: {log}")
    return TrainingError(f"Ray Train failed: {error}. The whole story: {log}")

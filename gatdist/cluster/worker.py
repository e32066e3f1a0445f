"""Runs the training loop in a worker of Ray Train, and sends its heartbeats."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from gatdist.cluster import connection  # noqa: F401  sets up Ray's import

# isort: split
import ray.train.torch

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.epochs import RosterChannel, RunIsOver, membership_of, this_worker
from gatdist.cluster.membership import LeftBehindError, RosterMembership
from gatdist.cluster.network import choose_interface
from gatdist.cluster.preflight import HostInfo, host_info, require_compatible
from gatdist.cluster.relay import Relay, shared_folder
from gatdist.cluster.rendezvous import DAY_S, set_collective_timeout
from gatdist.cluster.runtime_env import prefer_folders
from gatdist.common.errors import (
    ClusterError,
    GatdistError,
    RetryableError,
    TrainingError,
    WorkerLostError,
    lost_worker,
    rebuilt,
    summary,
)
from gatdist.config import parse_config, set_cuda_variables
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.members import Members
from gatdist.storage import Store
from gatdist.storage.backends import redact_secrets, secrets_of
from gatdist.training.progress import Progress

# A later answer is ignored: the next heartbeat brings the orders again.
_ANSWER_S = 5.0
# Environment variable of a worker that joins a run.
_JOINS = "GATDIST_JOINS"
_LOOK_S, _LOOK_AT_HOST_S = 1.0, 10.0


def prepare_to_join(exact: bool) -> None:
    """Let this worker join the others; before CUDA's start. ``exact``: as the run's results."""
    _prepare(exact)
    os.environ[_JOINS] = "yes"


def examine(bridge: Bridge, use_gpu: bool, exact: bool) -> HostInfo:
    """Prepare CUDA's start, choose the network interface and examine this worker's host."""
    _prepare(exact)
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    device = ray.train.torch.get_device() if use_gpu else None
    return host_info(address, bridge.given()["marker"], device)


def _prepare(exact: bool) -> None:
    set_cuda_variables(deterministic=exact)
    choose_interface(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def work(given: dict[str, Any]) -> None:
    """Train as one worker, in the process group that Ray Train has made."""
    shared = given["bridge"].given()
    prefer_folders(shared["folders"])
    try:
        _work(given | shared)
    except Exception as error:
        message = _without_secrets(error, shared)
        if message is error:
            raise
        raise message from None


def _without_secrets(error: Exception, shared: dict[str, Any]) -> Exception:
    """Return an error that Ray may log: without its traceback if that holds secrets."""
    secrets = secrets_of(shared["run_dir"], json.loads(shared["config"]))
    secrets += [value for value in shared["environment"].values() if value not in secrets]
    whole = "".join(traceback.format_exception(error))
    if redact_secrets(secrets, whole) == whole:
        return error
    if isinstance(error, GatdistError):
        return rebuilt(type(error).__name__, str(error))
    return TrainingError(redact_secrets(secrets, whole))


def _work(given: dict[str, Any]) -> None:
    import torch

    from gatdist.parallel.communicator import TorchCommunicator
    from gatdist.training.loop import run

    bridge: Bridge = given["bridge"]
    config = parse_config(json.loads(given["config"]))
    device = ray.train.torch.get_device()
    torch.set_num_threads(config.cluster.cpus_per_worker)
    joins = _JOINS in os.environ
    exact, use_gpu = config.run.reduction == "canonical", config.cluster.backend == "nccl"
    if joins and not await_fit(bridge, partial(examine, bridge, use_gpu, exact), exact=exact):
        return
    comm: Communicator | None = None
    if not joins:
        comm = TorchCommunicator(device)
        set_collective_timeout(DAY_S)
    membership: RosterMembership | None = None
    channel = RosterChannel(bridge, this_worker())
    if config.cluster.after_loss == "continue":
        bridge.report("actor", this_worker(), [ray.get_runtime_context().current_actor])
        membership = membership_of(config, device, channel, is_joining=joins)
        comm = Members(comm, membership, device)
    assert comm is not None
    progress = Progress()
    try:
        with _heartbeat(bridge, comm, progress, channel, membership) as stop:
            outcome = run(
                config,
                comm,
                Store(given["run_dir"], config.run.storage_options),
                should_stop=stop.is_set,
                emit=bridge.emit,
                progress=progress,
                reason=given["reason"],
            )
    except RunIsOver:
        return
    except Exception as error:
        if membership:
            membership.abort()
        if isinstance(comm, Members) and comm.is_joining and not _may_pass(error):
            about = error if isinstance(error, GatdistError) else summary(error)
            rule = "can't join the run, which continues without it"
            message = f"a worker on {socket.gethostname()} {rule}: {about}"
            bridge.emit("warning", {"message": message})
            bridge.report("withdraw", this_worker())
            _await_end(bridge)
            return
        if not isinstance(error, LeftBehindError):  # which is of no concern to the others
            _report(error, bridge, comm)
        raise
    if membership:
        membership.abort()
    if comm.is_main:
        bridge.report("finish", outcome)


def await_fit(bridge: Bridge, look: Callable[[], HostInfo], *, exact: bool) -> bool:
    """Wait until this worker's host fits together with those of the others.

    Storage may be out of reach for a while. Returns false if the run is over before.
    """
    warned = False
    while bridge.report("is_over") is False:  # None once another launch has begun
        host = look()
        others, now_s = bridge.report("examined", [])
        others = [one._replace(clock_s=now_s) for one in others]
        try:
            messages = require_compatible([*others, host], now_s, exact=exact)
        except ClusterError as error:
            if not warned:
                message = f"{error}. The run continues without it until that has changed"
                bridge.emit("warning", {"message": message})
            warned = True
            time.sleep(_LOOK_AT_HOST_S)
        else:
            for message in messages:
                bridge.emit("warning", {"message": message})
            bridge.report("examined", [host])
            return True
    return False


def _may_pass(error: Exception) -> bool:
    """Whether another attempt of a worker to join may succeed."""
    is_lost = isinstance(error, RuntimeError) and lost_worker(error, "") is not None
    return is_lost or isinstance(error, RetryableError)


def _await_end(bridge: Bridge) -> None:
    """Wait until the run is over: a worker that returned an error would be started again."""
    while bridge.report("is_over") is False:
        time.sleep(_LOOK_S)


def _report(error: Exception, bridge: Bridge, comm: Communicator) -> None:
    """Report an error that ends the launch."""
    continues, worker = isinstance(comm, Members), this_worker()
    name = f"worker {comm.rank} on {socket.gethostname()}"
    lost = lost_worker(error, name) if isinstance(error, RuntimeError) else None
    if isinstance(error, GatdistError):
        message = f"{error} ({name})" if comm.world_size > 1 else str(error)
        bridge.report("fail", type(error).__name__, message, worker)
    elif lost and not continues:
        bridge.report("fail", WorkerLostError.__name__, str(lost))
    elif continues and not lost:  # its replacement would fail again
        message = f"{name} failed: {summary(error)}"
        bridge.report("fail", TrainingError.__name__, message, worker)


@contextmanager
def _heartbeat(
    bridge: Bridge,
    comm: Communicator,
    progress: Progress,
    channel: RosterChannel,
    membership: RosterMembership | None,
) -> Iterator[threading.Event]:
    """Send heartbeats from a thread. Yields an event that is set when the driver orders a stop."""
    stop, over = channel.stops, threading.Event()
    me, node = this_worker(), ray.get_runtime_context().get_node_id()
    about = {"host": socket.gethostname(), "node": node, "actor": me, "pid": os.getpid()}
    relay = Relay(
        shared_folder(f"{bridge.name}-{node[:16]}"),
        me,
        lambda beats: bridge.report("heartbeats_of_host", beats, timeout_s=_ANSWER_S),
    )

    def beat() -> None:
        stacks_sent = 0
        while True:
            try:
                orders = relay.exchange(progress.report() | about | {"rank": comm.rank})
                if orders and orders["stop"]:
                    stop.set()
                if membership and orders and me in orders["lost"]:
                    membership.abort()  # the others continue without this worker
                if membership and orders and "epoch" in orders:
                    channel.due = orders["is_due"] and orders["epoch"] == membership.epoch
                    if orders["is_between"] and orders["epoch"] == membership.epoch:
                        membership.abort()  # the training thread may wait for a lost worker
                if orders and orders["stacks"] > stacks_sent:
                    stacks_sent = orders["stacks"]
                    stacks = progress.stacks()
                    bridge.report("stack", me, comm.rank, stacks, timeout_s=_ANSWER_S)
            except ray.exceptions.RayError:
                pass  # a late answer; or the driver is gone, and Ray ends this worker
            if over.wait(relay.interval_s):
                relay.close()
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        over.set()
        thread.join(_ANSWER_S)

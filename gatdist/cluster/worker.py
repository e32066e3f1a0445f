"""Runs the training loop in a worker of Ray Train, and sends its heartbeats."""

from __future__ import annotations

import json
import os
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gatdist.cluster import connection  # noqa: F401  sets up Ray's import

# isort: split
import ray.train.torch

from gatdist.cluster.bridge import Bridge
from gatdist.cluster.epochs import RosterChannel, RunIsOver, membership_of, this_worker
from gatdist.cluster.membership import LeftBehindError, RosterMembership
from gatdist.cluster.rendezvous import DAY_S, set_collective_timeout
from gatdist.cluster.runtime_env import prefer_folders
from gatdist.common.errors import (
    GatdistError,
    TrainingError,
    WorkerLostError,
    lost_worker,
    rebuilt,
    summary,
)
from gatdist.config import parse_config
from gatdist.parallel.communicator import Communicator
from gatdist.parallel.members import Members
from gatdist.storage import Store
from gatdist.storage.backends import redact_secrets, secrets_of
from gatdist.training.progress import Progress

_HEARTBEAT_S = 0.5
# A later answer is ignored: the next heartbeat brings the orders again.
_ANSWER_S = 5.0
JOINS = "GATDIST_JOINS"  # environment variable of a worker that joins a run


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
    is_joining = os.environ.get(JOINS) == "1"
    comm: Communicator | None = None
    if not is_joining:
        comm = TorchCommunicator(device)
        set_collective_timeout(DAY_S)
    membership: RosterMembership | None = None
    channel = RosterChannel(bridge, this_worker())
    if config.cluster.after_loss == "continue":
        bridge.report("actor", this_worker(), [ray.get_runtime_context().current_actor])
        membership = membership_of(config, device, channel, is_joining=is_joining)
        comm = Members(comm, membership, device)
    assert comm is not None
    name, progress = f"worker {comm.rank} on {socket.gethostname()}", Progress()
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
    except LeftBehindError:
        raise  # of no concern to the others
    except GatdistError as error:
        message = f"{error} ({name})" if comm.world_size > 1 else str(error)
        bridge.report("fail", type(error).__name__, message)
        raise
    except Exception as error:
        lost = lost_worker(error, name) if isinstance(error, RuntimeError) else None
        if lost and not membership:
            bridge.report("fail", WorkerLostError.__name__, str(lost))
        if membership and not lost:  # its replacement would fail again
            bridge.report("fail", TrainingError.__name__, f"{name} failed: {summary(error)}")
        raise
    finally:
        if membership:
            membership.abort()
    if comm.is_main:
        bridge.report("finish", outcome)


@contextmanager
def _heartbeat(
    bridge: Bridge,
    comm: Communicator,
    progress: Progress,
    channel: RosterChannel,
    membership: RosterMembership | None,
) -> Iterator[threading.Event]:
    """Send heartbeats from a thread. Yields an event that is set when the driver orders a stop."""
    stop, over = threading.Event(), threading.Event()
    about = {
        "host": socket.gethostname(),
        "node": ray.get_runtime_context().get_node_id(),
        "actor": this_worker(),
        "pid": os.getpid(),
    }

    def beat() -> None:
        stacks_sent = 0
        while True:
            try:
                report = progress.report() | about
                orders = bridge.report("heartbeat", comm.rank, report, timeout_s=_ANSWER_S)
                if orders and orders["stop"]:
                    stop.set()
                if membership and orders and "epoch" in orders:
                    channel.due = orders["is_due"]
                    if orders["is_between"] and orders["epoch"] == membership.epoch:
                        membership.abort()  # the training thread may wait for a lost worker
                if orders and orders["stacks"] > stacks_sent:
                    stacks_sent = orders["stacks"]
                    bridge.report("stack", comm.rank, progress.stacks(), timeout_s=_ANSWER_S)
            except ray.exceptions.RayError:
                pass  # a late answer; or the driver is gone, and Ray ends this worker
            if over.wait(_HEARTBEAT_S):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        over.set()
        thread.join(_ANSWER_S)

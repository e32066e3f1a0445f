"""The doctor's hand on a host of a cluster: an actor that looks, and takes part in exchanges."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gatdist.cluster import connection  # noqa: F401  sets up what Ray's import needs

# isort: split
import ray
from ray._private.worker import global_worker

from gatdist.cluster.doctor import assess, environment, local, network, storage
from gatdist.cluster.doctor.report import Exchange, Finding
from gatdist.cluster.network import choose_interface
from gatdist.cluster.preflight import HostInfo, Token, device_error, versions
from gatdist.config import set_env


class Look(NamedTuple):
    """What is seen on a host.

    Attributes:
        findings: that need no other host to be judged.
        facts: to be compared with other hosts'.
        has_gpu: whether there is one that works.
    """

    findings: list[Finding]
    facts: HostInfo
    has_gpu: bool


class Probe:
    """Does what the driver asks, on the host where it runs."""

    def __init__(self) -> None:
        self._address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        choose_interface(self._address)

    def look(self, addresses: Mapping[str, float], run_folder: str) -> Look:
        """See :class:`Look`.

        Args:
            addresses: of all hosts, and how many GPUs Ray has on each.
            run_folder: a local path that all hosts share; "" where there is none.
        """
        import torch

        assert global_worker.node is not None
        folder = Path(global_worker.node.get_temp_dir_path())
        folders = {"Ray": folder} | ({"run": Path(run_folder)} if run_folder else {})
        gpus = addresses.get(self._address)
        findings = local.look(self._address, folders, num_ray_gpus=gpus)
        findings.append(environment.proxies(list(addresses)))
        head, _, _ = ray.get_runtime_context().gcs_address.rpartition(":")
        if self._address == head:  # where `ray job` runs what it is given
            findings.append(assess.job_stop(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")))
        facts = HostInfo(socket.gethostname(), self._address, versions(), time.time(), "", "")
        return Look(findings, facts, torch.cuda.is_available() and not device_error())

    def clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def storage(self, expected: Token, secrets: Mapping[str, str]) -> Finding:
        """Of storage as it is reached from here, with variables that its URL refers to."""
        set_env(secrets)
        return storage.judge(storage.look(expected), storage.shown(expected))

    def listen(self) -> int:
        """Take connections of other hosts from now on. Returns the port."""
        self._listener = network.Listener(self._address)
        return self._listener.port

    def failures(self, targets: Mapping[str, int]) -> dict[str, str]:
        """See :func:`gatdist.cluster.doctor.network.failures`."""
        return network.failures(targets)

    def sending_rate(self, address: str, port: int) -> float:
        """See :func:`gatdist.cluster.doctor.network.sending_rate`."""
        return network.sending_rate(address, port)

    def serve_store(self) -> int:
        """Serve the store of a process group. Returns the port."""
        self._store = network.rendezvous(self._address)
        return self._store.port

    def all_reduces(
        self, master: tuple[str, int], rank: int, world_size: int, backend: str
    ) -> list[Exchange]:
        """See :func:`gatdist.cluster.doctor.network.all_reduces`."""
        store = self._store if rank == 0 else network.rendezvous(*master)
        return network.all_reduces(store, rank, world_size, backend)

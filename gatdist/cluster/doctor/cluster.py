"""Checks every host of a Ray cluster, and the network between them."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatdist.cluster.connection import (
    connected,
    require_temporary_folder,
    temporary_log,
)  # sets up Ray's import

# isort: split
import ray
from ray._private.worker import global_worker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gatdist.cluster.doctor import assess, environment, local, network, storage
from gatdist.cluster.doctor.report import Exchange, Finding, HostReport, Report
from gatdist.cluster.network import choose_interface
from gatdist.cluster.preflight import HostInfo, Marker, device_error, versions
from gatdist.cluster.processes import output_to_file
from gatdist.config import env_values, set_env
from gatdist.storage.urls import absolute

_CLOCK_ROUNDS = 5


def examine(
    address: str, storage_url: str, options: Mapping[str, Any], *, answer_s: float
) -> Report:
    """Check every host of a cluster, storage from each, and the network between them.

    All hosts must reach ``storage_url`` ("" for none), and answer within ``answer_s`` seconds.

    Raises:
        ClusterError: the address does not answer.
        StorageError: this process can't write to the storage.
        StorageUnavailableError: the storage does not answer this process.
    """
    require_temporary_folder(for_ray=False)
    url = absolute(storage_url) if storage_url else ""
    secrets = env_values(url + json.dumps(dict(options)))
    with temporary_log() as log, output_to_file(log) as terminal, connected(address, log):

        def show(text: str) -> None:
            print(text, file=terminal, flush=True)

        with storage.marker(url, options) if url else nullcontext() as marker:
            run_folder = "" if "://" in url else url
            return _Examination(answer_s, show, run_folder).report(marker, secrets)


class _Probe:
    """An actor on each host, which checks it and takes part in exchanges."""

    def __init__(self) -> None:
        self._address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        choose_interface(self._address)

    def look(
        self, gpus: Mapping[str, float], run_folder: str
    ) -> tuple[list[Finding], HostInfo, bool]:
        """Return findings, what is compared with other hosts, and whether a GPU is usable.

        ``gpus`` has the number of GPUs that Ray has on each host, by address.
        """
        import torch

        assert global_worker.node is not None
        folder = Path(global_worker.node.get_temp_dir_path())
        folders = {"Ray": folder} | ({"run": Path(run_folder)} if run_folder else {})
        findings = local.look(self._address, folders, num_ray_gpus=gpus.get(self._address))
        findings.append(environment.assess_proxies(os.environ, list(gpus)))
        head, _, _ = ray.get_runtime_context().gcs_address.rpartition(":")
        if self._address == head:  # where `ray job` runs the driver
            findings.append(assess.job_stop(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")))
        info = HostInfo(socket.gethostname(), self._address, versions(), time.time(), "", "")
        return findings, info, torch.cuda.is_available() and not device_error()

    def clock(self) -> float:
        return time.time()

    def storage(self, expected: Marker, secrets: Mapping[str, str]) -> Finding:
        """Check storage from here; ``secrets`` are variables that its URL refers to."""
        set_env(secrets)
        return storage.assess(storage.look(expected), expected.store().url)

    def listen(self) -> int:
        """Accept connections of other hosts from now on. Returns the port."""
        self._listener = network.Listener(self._address)
        return self._listener.port

    def failures(self, targets: Mapping[str, int]) -> dict[str, str]:
        return network.failures(targets)

    def sending_rate(self, address: str, port: int) -> float:
        return network.sending_rate(address, port)

    def serve_store(self) -> int:
        """Serve the store of a process group. Returns the port."""
        self._store = network.rendezvous(self._address)
        return self._store.port

    def all_reduces(
        self, master: tuple[str, int], rank: int, world_size: int, backend: str
    ) -> list[Exchange]:
        store = self._store if rank == 0 else network.rendezvous(*master)
        return network.all_reduces(store, rank, world_size, backend)


@dataclass
class _Host:
    name: str
    address: str
    trains: bool  # whether workers may run there
    probe: Any
    gpus: float = 0.0  # that Ray has there
    info: HostInfo | None = None  # once it has answered
    has_gpu: bool = False
    error: str = ""  # why it is asked no more
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> _Host:
        """Start a probe on a node of Ray."""
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probe = ray.remote(_Probe).options(num_cpus=0, scheduling_strategy=strategy).remote()
        trains = any(node["Resources"].get(name, 0) > 0 for name in ("CPU", "GPU"))
        gpus = float(node["Resources"].get("GPU", 0))
        return cls(node["NodeManagerHostname"], node["NodeManagerAddress"], trains, probe, gpus)

    def report(self) -> HostReport:
        findings = list(self.findings)
        if self.error:
            hint = "Check its Ray (ray status, and its logs), or take it out of the cluster"
            findings.append(Finding("answers", self.error, False, hint))
        return HostReport(self.name, self.address, findings)


class _Examination:
    """One examination of a cluster; ``run_folder`` is a local path that all hosts share, or ""."""

    def __init__(self, answer_s: float, show: Callable[[str], None], run_folder: str = "") -> None:
        self._answer_s, self._show, self._run_folder = answer_s, show, run_folder
        self._findings: list[Finding] = []
        self._network: list[Exchange] = []
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        alive = [node for node in nodes if node["Alive"]]
        self._hosts = [_Host.of(node) for node in sorted(alive, key=_number)]
        present = {host.address for host in self._hosts}
        gone = {n["NodeManagerAddress"]: n["NodeManagerHostname"] for n in nodes}
        self._lost = [f"{gone[each]} ({each})" for each in gone if each not in present]

    def report(self, marker: Marker | None, secrets: Mapping[str, str]) -> Report:
        """Run all checks."""
        self._show(f"asking all hosts: {len(self._hosts)}")
        self._look()
        self._clocks()
        if marker:
            self._show("trying storage from each")
            for host, finding in self._ask("storage", self._present, marker, secrets):
                host.findings.append(finding)
        self._connections()
        return Report(self._findings, [host.report() for host in self._hosts], self._network)

    @property
    def _present(self) -> list[_Host]:
        return [host for host in self._hosts if not host.error]

    def _ask(self, what: str, hosts: list[_Host], *args: Any) -> list[tuple[_Host, Any]]:
        """Ask hosts the same at the same time; see :meth:`_gather`."""
        return self._gather({getattr(host.probe, what).remote(*args): host for host in hosts}, what)

    def _gather(self, asked: Mapping[Any, _Host], what: str) -> list[tuple[_Host, Any]]:
        """Return the answers that arrive in time; the others' hosts get an error."""
        if not asked:
            return []
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=self._answer_s)
        found = []
        for reference, host in asked.items():
            if reference not in answered:
                host.error = f"no answer in {self._answer_s:g} s, when asked for: {what}"
                continue
            try:
                found.append((host, ray.get(reference)))
            except ray.exceptions.RayActorError as error:
                host.error = f"Ray lost it, or what ran on it for: {what} ({_last_line(error)})"
            except ray.exceptions.RayError as error:
                host.error = f"failed, when asked for: {what} ({_last_line(error)})"
        return found

    def _look(self) -> None:
        gpus = {host.address: host.gpus for host in self._hosts}
        answers = self._ask("look", self._hosts, gpus, self._run_folder)
        for host, (findings, info, has_gpu) in answers:
            host.findings, host.info, host.has_gpu = list(findings), info, has_gpu
            host.name = info.host
        answered = f"{len(answers)} of {len(self._hosts)} answered"
        self._findings.append(Finding("hosts", answered, len(answers) == len(self._hosts)))
        if self._lost:
            hint = "Start Ray there again, if they should be here"
            self._findings.append(Finding("lost hosts", ", ".join(self._lost), None, hint))
        if answers:
            odd, all_ = assess.versions([info for _, (_, info, _) in answers])
            for host in self._present:
                host.findings += [odd[host.address]] if host.address in odd else []
            self._findings.append(all_)

    def _clocks(self) -> None:
        """Ask one host after the other, so that questions do not wait for one another."""
        for host in self._present:
            trips = []
            for _ in range(_CLOCK_ROUNDS):
                sent_s = time.time()
                for _, there_s in self._ask("clock", [host]):
                    trips.append(assess.round_trip(sent_s, there_s, time.time()))
                if host.error:
                    break
            if trips:
                round_trip_s, ahead_s = min(trips)
                host.findings.append(assess.clock(ahead_s, round_trip_s))

    def _connections(self) -> None:
        """Check the connections between the hosts on which workers may run."""
        hosts = [host for host in self._present if host.trains and host.info]
        gpu = {host.name: host.has_gpu for host in hosts}
        mixed = assess.devices([n for n in gpu if gpu[n]], [n for n in gpu if not gpu[n]])
        self._findings += [mixed] if mixed else []
        if len(hosts) < 2:
            message = f"nothing to measure: {len(hosts)} of the hosts can have workers"
            self._findings.append(Finding("connections", message, None))
            return
        self._show("measuring the network between them")
        ports = {host.address: port for host, port in self._ask("listen", hosts)}
        tried = self._ask("failures", [host for host in hosts if not host.error], ports)
        if len(tried) < 2:
            return  # the others' findings say why
        names = {host.address: host.name for host, _ in tried}
        failed = {
            (host.address, to): why
            for host, found in tried
            for to, why in found.items()
            if to in names
        }
        found = assess.reach(names, failed)
        self._findings += found
        if all(finding.ok for finding in found) and not any(host.error for host in hosts):
            self._sending(hosts, names, ports)
            self._all_reduce(hosts, "nccl" if all(gpu.values()) else "gloo")

    def _sending(
        self, hosts: list[_Host], names: Mapping[str, str], ports: Mapping[str, int]
    ) -> None:
        to = network.neighbours([host.address for host in hosts])
        rates = {}
        for turn in network.turns(hosts):
            asked = {
                host.probe.sending_rate.remote(to[host.address], ports[to[host.address]]): host
                for host in turn
            }
            for host, found in self._gather(asked, "sends"):
                rates[host.address] = to[host.address], found
        for host in hosts:
            if finding := assess.sending(names, rates).get(host.address):
                host.findings.append(finding)

    def _all_reduce(self, hosts: list[_Host], backend: str) -> None:
        message = f"{backend}, {len(hosts)} hosts"
        first = hosts[0]
        master = [(first.address, port) for _, port in self._ask("serve_store", [first])]
        asked = {
            host.probe.all_reduces.remote(served, rank, len(hosts), backend): host
            for served in master
            for rank, host in enumerate(hosts)
        }
        answers = self._gather(asked, "all-reduce")
        if len(answers) == len(hosts):
            self._network = answers[0][1]
            self._findings.append(Finding("all-reduce", message, True))
            return
        why = "; ".join(f"{host.name} {host.error}" for host in hosts if host.error)
        for host in hosts:
            host.error = ""  # of the group, not of each
        hint = (
            "Each pair of hosts has a connection: unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
            "where they are set, or look at the error"
        )
        self._findings.append(Finding("all-reduce", f"{message}: failed ({why})", False, hint))


def _number(node: Mapping[str, Any]) -> list[int]:
    return [int(part) for part in node["NodeManagerAddress"].split(".")]


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]

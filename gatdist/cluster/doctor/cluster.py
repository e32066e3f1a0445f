"""Examines every host of a Ray cluster, and what is between them."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatdist.cluster.connection import connected, require_temporary_folder  # sets up Ray's import

# isort: split
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gatdist.cluster.doctor import assess, network, storage
from gatdist.cluster.doctor.probe import Look, Probe
from gatdist.cluster.doctor.report import Exchange, Finding, HostReport, Report
from gatdist.cluster.preflight import Token
from gatdist.cluster.processes import output_to_file
from gatdist.config import env_values
from gatdist.storage import absolute

_CLOCK_ROUNDS = 5


def examine(
    address: str, storage_url: str, options: Mapping[str, Any], *, answer_s: float
) -> Report:
    """Look at every host of a cluster, at storage from each, and at the network between them.

    Args:
        address: of the cluster.
        storage_url: of a folder that all must reach; "" for none.
        options: of its storage.
        answer_s: how long a host may take for each answer, in seconds.

    Raises:
        ClusterError: nobody answers at the address.
        StorageError: this process can't write to the storage.
        StorageUnavailableError: storage does not answer this process.
    """
    require_temporary_folder(for_ray=False)
    log = Path(tempfile.mkdtemp(prefix="gatdist-logs-")) / "ray.log"
    url = absolute(storage_url) if storage_url else ""
    secrets = env_values(url + json.dumps(dict(options)))
    with output_to_file(log) as terminal, connected(address, log):

        def show(text: str) -> None:
            print(text, file=terminal, flush=True)

        with storage.token(url, options) if url else nullcontext() as token:
            run_folder = "" if "://" in url else url
            report = _Examination(answer_s, show, run_folder).report(token, secrets)
    shutil.rmtree(log.parent)
    return report


@dataclass
class _Host:
    """A host, and what is known of it.

    Attributes:
        gpus: that Ray has there.
        look: once it has answered.
        error: why it can't be asked any more; "".
    """

    name: str
    address: str
    trains: bool
    probe: Any
    gpus: float = 0.0
    look: Look | None = None
    error: str = ""
    findings: list[Finding] = field(default_factory=list)


class _Examination:
    """One examination of a cluster.

    Args:
        answer_s: see :func:`examine`.
        report: gets what is being done.
        run_folder: a local path that all hosts share; "" where there is none.
    """

    def __init__(
        self, answer_s: float, report: Callable[[str], None], run_folder: str = ""
    ) -> None:
        self._answer_s, self._report, self._run_folder = answer_s, report, run_folder
        self._findings: list[Finding] = []
        self._network: list[Exchange] = []
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        alive = [node for node in nodes if node["Alive"]]
        self._hosts = [_host(node) for node in sorted(alive, key=_number)]
        present = {host.address for host in self._hosts}
        gone = {n["NodeManagerAddress"]: n["NodeManagerHostname"] for n in nodes}
        self._lost = [f"{gone[each]} ({each})" for each in gone if each not in present]

    def report(self, token: Token | None, secrets: Mapping[str, str]) -> Report:
        """Do all, and tell what was found."""
        self._report(f"asking all hosts: {len(self._hosts)}")
        self._look()
        self._clocks()
        if token:
            self._report("trying storage from each")
            for host, finding in self._ask("storage", self._present, token, secrets):
                host.findings.append(finding)
        self._between()
        return Report(
            self._findings,
            [HostReport(host.name, host.address, _shown(host)) for host in self._hosts],
            self._network,
        )

    @property
    def _present(self) -> list[_Host]:
        return [host for host in self._hosts if not host.error]

    def _ask(self, what: str, hosts: list[_Host], *args: Any) -> list[tuple[_Host, Any]]:
        """Ask hosts the same at the same time; see :meth:`_gather`."""
        return self._gather({getattr(host.probe, what).remote(*args): host for host in hosts}, what)

    def _gather(self, asked: Mapping[Any, _Host], what: str) -> list[tuple[_Host, Any]]:
        """Answers of those hosts that give one in time; of the others, why not is kept."""
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
        for host, look in self._ask("look", self._hosts, gpus, self._run_folder):
            host.look, host.name, host.findings = look, look.facts.host, list(look.findings)
        looks = [host.look for host in self._present if host.look]
        answered = f"{len(looks)} of {len(self._hosts)} answered"
        self._findings.append(Finding("hosts", answered, len(looks) == len(self._hosts)))
        if self._lost:
            hint = "Start Ray there again, if they should be here"
            self._findings.append(Finding("lost hosts", ", ".join(self._lost), None, hint))
        if looks:
            odd, all_ = assess.versions([look.facts for look in looks])
            for host in self._present:
                host.findings += [odd[host.address]] if host.address in odd else []
            self._findings.append(all_)

    def _clocks(self) -> None:
        """Host after host, so that questions do not wait for one another."""
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

    def _between(self) -> None:
        """What is between the hosts on which workers may run."""
        hosts = [host for host in self._present if host.trains and host.look]
        gpu = {host.name: bool(host.look and host.look.has_gpu) for host in hosts}
        mixed = assess.devices([n for n in gpu if gpu[n]], [n for n in gpu if not gpu[n]])
        self._findings += [mixed] if mixed else []
        if len(hosts) < 2:
            message = f"nothing to measure: {len(hosts)} of the hosts can have workers"
            self._findings.append(Finding("connections", message, None))
            return
        self._report("measuring the network between them")
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


def _host(node: Mapping[str, Any]) -> _Host:
    """Start a probe on a node."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    probe = ray.remote(Probe).options(num_cpus=0, scheduling_strategy=strategy).remote()
    trains = any(node["Resources"].get(name, 0) > 0 for name in ("CPU", "GPU"))
    gpus = float(node["Resources"].get("GPU", 0))
    return _Host(node["NodeManagerHostname"], node["NodeManagerAddress"], trains, probe, gpus)


def _number(node: Mapping[str, Any]) -> list[int]:
    return [int(part) for part in node["NodeManagerAddress"].split(".")]


def _shown(host: _Host) -> list[Finding]:
    if not host.error:
        return host.findings
    hint = "Look at its Ray (ray status, and its logs), or take it out of the cluster"
    return [*host.findings, Finding("answers", host.error, False, hint)]


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]

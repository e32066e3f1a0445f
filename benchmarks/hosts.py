"""Several hosts on one machine: network namespaces with their own address, name and Ray.

``/etc/hosts`` is as on Debian: a host's own name resolves to 127.0.1.1. Needs root and iproute2.
As a program (``hosts.py ADDRESS``), it runs on the head and answers queries about Ray's nodes.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

_PORT = 6399
# Detects a dead host after about 3 s, and tolerates a network outage of 5 s: a host that refuses
# connections fails each check at once, one that does not answer fails it after the timeout.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "5",
}
_RAY = str(Path(sys.executable).parent / "ray")
_NUMBERS = itertools.count()


def why_not() -> str:
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"gd{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces can't be created: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


def require_hosts() -> None:
    """Exit unless hosts can be made; let SIGTERM delete them."""
    if reason := why_not():
        raise SystemExit(f"needs hosts: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Host:
    """One host; ``disguises`` are bind mounts (path, replacement) for programs started later."""

    def __init__(
        self, name: str, number: int, prefix: str, folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.name, self.address = name, f"10.99.0.{number}"
        self.disguises: dict[Path, Path] = {}
        self.namespace, self._port = f"{prefix}{name}", f"{prefix}p{number}"
        self.folder, self._environment = folder / name, dict(environment)
        self._bridge = f"{prefix}net"
        self._etc = Path("/etc/netns") / self.namespace

    def make(self, others: Iterable[Host]) -> None:
        """Create the namespace, connected to the bridge; it resolves the names of ``others``."""
        self._etc.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {self.name}"]
        lines += [f"{host.address} {host.name}" for host in others]
        (self._etc / "hosts").write_text("\n".join([*lines, ""]))
        self.folder.mkdir(parents=True)
        inside, outside = f"{self._port}i", self._port
        _ip("netns", "add", self.namespace)
        _ip("link", "add", inside, "type", "veth", "peer", "name", outside)
        _ip("link", "set", inside, "netns", self.namespace, "name", "eth0")
        _ip("link", "set", outside, "netns", self._bridge)
        _ip("link", "set", outside, "master", "switch", "up", namespace=self._bridge)
        _ip("addr", "add", f"{self.address}/24", "dev", "eth0", namespace=self.namespace)
        _ip("link", "set", "lo", "up", namespace=self.namespace)
        _ip("link", "set", "eth0", "up", namespace=self.namespace)

    def start(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        environment = os.environ | self._environment | options.pop("env", {})
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c"]
        mounts = [["mount", "--bind", f"{it}", f"{at}"] for at, it in self.disguises.items()]
        first = "".join(f"{shlex.join(words)} && " for words in mounts)
        return subprocess.Popen(
            [*enter, f'{first}hostname "$0" && exec "$@"', self.name, *map(str, command)],
            text=True,
            env=environment,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL} | options,
        )

    def start_ray(self, head: Host | None, cpus: int) -> Callable[[], None]:
        """Start Ray: a head, or a worker that joins one. Call the result to wait for it."""
        place = (
            ["--head", f"--port={_PORT}", "--include-dashboard=false"]
            if head is None
            else [f"--address={head.ray_address}"]
        )
        file = self.folder / "ray-start.log"
        with file.open("ab") as log:
            process = self.start(
                _RAY, "start", *place, f"--node-ip-address={self.address}", f"--num-cpus={cpus}",
                f"--temp-dir={self.folder}/ray", "--object-store-memory=80000000",
                f"--node-name={self.name}", "--disable-usage-stats",
                stdout=log, stderr=log,
            )  # fmt: skip

        def wait() -> None:
            if process.wait(90):
                raise RuntimeError(f"Ray did not start on {self.name}:\n{file.read_text()}")

        return wait

    @property
    def ray_address(self) -> str:
        return f"{self.address}:{_PORT}"

    def processes(self) -> list[int]:
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [int(word) for word in found.stdout.split()]

    def kill(self) -> None:
        while alive := self.processes():
            for process in alive:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)

    def cut(self) -> None:
        _ip("link", "set", self._port, "down", namespace=self._bridge)

    def plug(self) -> None:
        _ip("link", "set", self._port, "up", namespace=self._bridge)

    def slow(self, megabits: float | None) -> None:
        """Limit its sending rate in Mbit/s; None removes the limit."""
        command = ["ip", "netns", "exec", self.namespace, "tc", "qdisc"]
        subprocess.run([*command, "del", "dev", "eth0", "root"], capture_output=True)
        if megabits:
            shape = ["tbf", "rate", f"{megabits}mbit", "burst", "32kbit", "latency", "400ms"]
            subprocess.run([*command, "add", "dev", "eth0", "root", *shape], check=True)

    def delete(self) -> None:
        self.kill()
        subprocess.run(["ip", "netns", "delete", self.namespace], capture_output=True)
        shutil.rmtree(self._etc, ignore_errors=True)


class Hosts:
    """A head, which does not train, and workers, each of class ``host``; a context manager."""

    def __init__(
        self,
        workers: int = 2,
        cpus: int = 1,
        environment: Mapping[str, str] | None = None,
        ray: bool = True,
        host: Callable[..., Host] = Host,
    ) -> None:
        # Ray's sockets are here, and paths of sockets must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="gdh"))
        # Unique, as a process may have several at once; names of interfaces have 15 letters.
        prefix = f"gd{os.getpid() % 100_000}x{next(_NUMBERS)}"
        shared = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **_HEALTH}
        shared |= environment or {}
        self._network, self._cpus, self._ray = f"{prefix}net", cpus, ray
        self.head = host("head", 1, prefix, self.folder, shared)
        self.workers = [
            host(f"w{n}", n + 1, prefix, self.folder, shared) for n in range(1, workers + 1)
        ]
        self._stack = ExitStack()
        self._queries: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with self._stack as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            _ip("netns", "add", self._network)
            stack.callback(_ip, "netns", "delete", self._network)
            _ip("link", "add", "switch", "type", "bridge", namespace=self._network)
            _ip("link", "set", "switch", "up", namespace=self._network)
            hosts = [self.head, *self.workers]
            for host in hosts:
                stack.callback(host.delete)
                host.make(other for other in hosts if other is not host)
            stack.callback(self._dismiss)
            if self._ray:
                self._start_ray()
            self._stack = stack.pop_all()
        return self

    def _start_ray(self) -> None:
        self.head.start_ray(None, cpus=0)()
        for wait in [host.start_ray(self.head, self._cpus) for host in self.workers]:
            wait()
        self.wait_for(len(self.workers) + 1)

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _dismiss(self) -> None:
        if self._queries is not None:
            self._queries.communicate(timeout=10)

    def join(self, host: Host) -> None:
        host.start_ray(self.head, self._cpus)()

    def alive(self) -> list[str]:
        return [node["name"] for node in self._ask("nodes") if node["alive"]]

    def wait_for(self, count: int, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.alive()) != count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Ray has {self.alive()}, not {count} hosts")
            time.sleep(0.2)

    def drain(self, host: Host, deadline_s: float) -> None:
        """Announce to Ray that a host will be preempted."""
        (node,) = [n for n in self._ask("nodes") if n["name"] == host.name and n["alive"]]
        if not self._ask("drain", node["id"], deadline_s):
            raise RuntimeError(f"Ray refused to drain {host.name}")

    def _ask(self, *words: object) -> Any:
        if self._queries is None:
            self._queries = self.head.start(
                sys.executable, __file__, self.head.ray_address,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        assert self._queries.stdin is not None
        assert self._queries.stdout is not None
        print(json.dumps(words), file=self._queries.stdin, flush=True)
        return json.loads(self._queries.stdout.readline())


def _ip(*words: str, namespace: str = "") -> None:
    command = ["ip", *(["-n", namespace] if namespace else []), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _answer_queries(address: str) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    client = GcsClient(address=address)
    for line in sys.stdin:
        match json.loads(line):
            case ["drain", node, seconds]:
                deadline_ms = int((time.time() + seconds) * 1000)
                answer, _ = client.drain_node(node, 2, "spot", deadline_ms)
            case _:
                answer = [
                    {"name": info.node_name, "id": identity.hex(), "alive": info.state == 0}
                    for identity, info in client.get_all_node_info().items()
                ]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _answer_queries(sys.argv[1])

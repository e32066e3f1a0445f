"""Hosts that act as pods, as a manifest describes them and KubeRay creates them.

A pod's root file system is this machine's, mounted read-only through an overlay; its volumes, user,
capabilities, environment and Ray resources are the manifest's. This machine's Python and this
repository replace the image.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.hosts import Host
from support import end_group, wait_until

REPOSITORY = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
IMAGE = (str(REPOSITORY), sys.prefix, sys.base_prefix)
PORT, DASHBOARD = 6379, 8265

# Folder, user and group; volume, place and mode of each mount; "--" and the program.
_ENTER = r"""
set -e
root=$1/root user=$2 group=$3
mount -t tmpfs -o size=16m none "$1"
mkdir "$1/up" "$1/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" "$root"
shift 3
for it in proc sys dev; do mount --rbind "/$it" "$root/$it"; done
mount --bind /etc/hosts "$root/etc/hosts"
while [ "$1" != -- ]; do
    mkdir -p "$root$2"
    case $1 in
        /*) mount --bind "$1" "$root$2" ;;
        *) mount -t tmpfs -o "size=$1,mode=1777" none "$root$2" ;;
    esac
    [ "$3" = rw ] || mount -o remount,bind,ro "$root$2"
    shift 3
done
shift
for it in $OPEN; do
    until [ "$it" = / ]; do chmod o+x "$root$it" 2>/dev/null || true; it=$(dirname "$it"); done
done
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid="$user" --regid="$group" --clear-groups \
    --no-new-privs --bounding-set=-all --inh-caps=-all env -i "$@"
"""


class Pod(Host):
    """The pod of a head or a worker.

    Args:
        args: Arguments of :class:`Host`.
        cluster: Spec of its RayCluster.
        secrets: Values of Secrets, by name and key.
        claims: Folders of PersistentVolumeClaims, by name.
    """

    def __init__(
        self,
        *args: Any,
        cluster: Mapping[str, Any],
        secrets: Mapping[tuple[str, str], str],
        claims: Mapping[str, Path],
    ) -> None:
        super().__init__(*args)
        self._secrets, self._claims = secrets, claims
        head = self.name == "head"
        self.group = cluster["headGroupSpec"] if head else cluster["workerGroupSpecs"][0]
        self.spec = self.group["template"]["spec"]
        self.main: subprocess.Popen[str] | None = None

    @property
    def ray_address(self) -> str:
        """HOST:PORT of the Ray whose head this is."""
        return f"{self.address}:{PORT}"

    def make(self, others: Iterable[Host]) -> None:
        """Like the kubelet, resolve the pod's name to its address, and add a default route."""
        super().make(others)
        hosts = f"127.0.0.1 localhost\n{self.address} {self.name}\n"
        (Path("/etc/netns") / self.namespace / "hosts").write_text(hosts)
        subprocess.run(
            ["ip", "-n", self.namespace, "route", "add", "default", "dev", "eth0"], check=True
        )

    def start_ray(self, head: Host | None, cpus: int) -> Callable[[], None]:
        """Start its container with the command that KubeRay derives from the manifest."""
        limits = self.spec["containers"][0]["resources"]["limits"]
        given = {
            "metrics-export-port": "8080",
            "dashboard-agent-listen-port": "52365",
            "num-cpus": limits["cpu"],
            "memory": str(int(limits["memory"].removesuffix("Gi")) << 30),
        } | self.group["rayStartParams"]
        given |= {"dashboard-host": "0.0.0.0"} if head is None else {"address": head.ray_address}
        options = " ".join(f"--{name}={value}" for name, value in given.items())
        role = "--head " * (head is None)
        command = f"ulimit -n 65536; ray start {role}{options} --block"
        at = {"RAY_ADDRESS": (head or self).ray_address}
        with (self.folder / "ray-start.log").open("ab") as log:
            self.main = self.container(
                self.spec, "/bin/bash", "-c", "--", command, env=at, stdout=log, stderr=log
            )
        return self._await_head if head is None else lambda: None

    def _await_head(self) -> None:
        knock = f"exec 3<>/dev/tcp/{self.address}/{PORT}"
        enter = ["ip", "netns", "exec", self.namespace, "bash", "-c", knock]

        def answers() -> bool:
            log = self.folder / "ray-start.log"
            assert self.main is not None
            assert self.main.poll() is None, log.read_text()
            return subprocess.run(enter, capture_output=True).returncode == 0

        wait_until(answers, "Ray's head", timeout_s=300)

    def container(
        self,
        spec: Mapping[str, Any],
        *command: str,
        env: Mapping[str, str | None] | None = None,
        **streams: Any,
    ) -> subprocess.Popen[str]:
        """Start the first container of a pod's spec on this host.

        Args:
            spec: Spec of the pod.
            command: Command of its container.
            env: Added to the manifest's; None removes a variable.
            streams: Streams of the process.
        """
        (container,) = spec["containers"]
        folder = self.folder / container["name"]
        folder.mkdir(exist_ok=True)
        own = spec["securityContext"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        variables = self._image() | {
            it["name"]: it["value"] if "value" in it else self._secret(it["valueFrom"])
            for it in container["env"]
        }
        # The image has gatdist installed; here it is imported from the repository.
        variables["PYTHONPATH"] = f"{variables.get('PYTHONPATH', '')}:{REPOSITORY}"
        requested = variables | dict(env or {})
        words = [f"{name}={value}" for name, value in requested.items() if value is not None]
        mounts = [
            word
            for mount in container["volumeMounts"]
            for word in (
                self._volume(spec, mount["name"], own.get("fsGroup", own["runAsGroup"])),
                mount["mountPath"],
                "ro" if mount.get("readOnly") else "rw",
            )
        ]
        # Replacements of the image may be in a folder where a volume is mounted, such as /tmp.
        places = [f"{mount['mountPath']}/" for mount in container["volumeMounts"]]
        for path in IMAGE:
            if path.startswith(tuple(places)):
                mounts += [path, path, "ro"]
        user = str(own["runAsUser"]), str(own["runAsGroup"])
        return Host.start(
            self, "sh", "-c", _ENTER, "pod", folder, *user, *mounts, "--", *words, *command,
            env={"OPEN": " ".join(IMAGE)}, **streams,
        )  # fmt: skip

    def start(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        """Start a program in the pod's container, like ``kubectl exec``."""
        assert self.main is not None
        own = self.spec["securityContext"]
        enter = [
            "nsenter",
            f"--target={self.main.pid}",
            "--mount",
            "--net",
            "--uts",
            "--root",
            "--wd=/",
        ]
        become = ["setpriv", f"--reuid={own['runAsUser']}", f"--regid={own['runAsGroup']}"]
        environment = Path(f"/proc/{self.main.pid}/environ").read_bytes().decode()
        variables = dict(it.split("=", 1) for it in environment.split("\0") if it)
        return subprocess.Popen(
            [*enter, *become, "--clear-groups", "--no-new-privs", *map(str, command)],
            text=True,
            env=variables | options.pop("env", {}),
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL} | options,
        )

    def end(self) -> None:
        """Send SIGTERM to its program, and wait until it exits."""
        assert self.main is not None
        self.main.terminate()
        self.main.wait(30)

    def kill(self) -> None:
        """Kill all of its processes at once."""
        super().kill()
        if self.main is not None:
            end_group(self.main)

    def _image(self) -> dict[str, str]:
        """Return what the Dockerfile sets, and what a test adds."""
        text = (REPOSITORY / "deploy/container/Dockerfile").read_text()
        (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)", text, re.MULTILINE)
        given = dict(word.split("=", 1) for word in block.replace("\\\n", "").split())
        return given | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def _secret(self, source: Mapping[str, Any]) -> str:
        reference = source["secretKeyRef"]
        return self._secrets[reference["name"], reference["key"]]

    def _volume(self, spec: Mapping[str, Any], name: str, group: int) -> str:
        """Return the folder of a volume, or the size of one in memory."""
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == name]
        if "persistentVolumeClaim" in volume:
            folder = self._claims[volume["persistentVolumeClaim"]["claimName"]]
        elif volume.get("emptyDir", {}).get("medium") == "Memory":
            return volume["emptyDir"]["sizeLimit"].removesuffix("i")
        else:  # empty, as for an optional ConfigMap
            folder = self.folder / "volumes" / name
            folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, -1, group)
        folder.chmod(0o2775)
        return str(folder)

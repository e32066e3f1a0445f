"""A real Slurm on the tests' hosts: a controller on the head, a node on each worker.

Uses Debian's programs, as installed or as unpacked by ``make setup-system``, with their own folders
and key. Each node has its own PID namespace next to its own network namespace, so that a job can't
stop processes of other nodes (``ray stop`` stops all on its machine).
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from benchmarks.hosts import Host, Hosts
from support import PROGRAMS, TOOLS, end_group, need, wait_until

_UNPACKED = TOOLS / "slurm/usr"
_CONF = """
ClusterName=tests
SlurmctldHost={head.name}({head.address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A Slurm cluster; a context manager.

    Args:
        hosts: A head and workers; each worker becomes a node with one CPU and one GPU by name.

    Attributes:
        programs: Paths of programs by name.
        environment: Environment of commands.
    """

    def __init__(self, hosts: Hosts) -> None:
        names = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch")
        self.programs = dict(zip(names, need(*names), strict=True))
        self.hosts = hosts
        self.folder = Path(tempfile.mkdtemp(prefix="gds"))
        self.environment = {
            "SLURM_CONF": f"{self.folder}/slurm.conf",
            "PATH": PROGRAMS,
        }
        self._conf = _CONF.format(head=hosts.head, folder=self.folder)
        if self.programs["sbatch"].startswith(str(_UNPACKED)):
            (plugins,) = _UNPACKED.glob("lib/*/slurm-wlm")
            self.environment["LD_LIBRARY_PATH"] = f"{plugins.parent}:{plugins}"
            self._conf += f"PluginDir={plugins}\n"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            nodes = self.hosts.workers
            for node in nodes:
                self._conf += f"NodeName={node.name} NodeAddr={node.address} CPUs=1 Gres=gpu:1\n"
            (self.folder / "slurm.conf").write_text(self._conf)
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
            (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
            (self.folder / "state").mkdir()
            key = self.folder / "munge.key"
            key.write_bytes(secrets.token_bytes(128))
            key.chmod(0o600)
            own = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
            files = [f"--{option}={self.folder}/munge.{end}" for option, end in own.items()]
            files += [f"--log-file={self.folder}/munge.log"]
            self._start(self.hosts.head, "munged", "--foreground", "--force", *files)
            wait_until((self.folder / "munge.socket").exists, "munged")
            self._start(self.hosts.head, "slurmctld", "-D")
            for node in nodes:
                stepd = self.programs["slurmstepd"]
                self._start(node, "slurmd", "-D", "-N", node.name, "-d", stepd)
            wait_until(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], "nodes")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start(self, host: Host, name: str, *options: str) -> None:
        # The shell is PID 1 there, which must reap orphaned processes.
        isolated = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        isolated += ["bash", "-c", '"$@" & wait $!', "init"]
        with (self.folder / f"{name}-{host.name}.log").open("wb") as log:
            process = host.start(
                *isolated, self.programs[name], *options,
                stdout=log, stderr=log, env=self.environment,
            )  # fmt: skip
        self._stack.callback(end_group, process)

    def run(self, *command: object, **options: Any) -> str:
        """Run one of Slurm's commands on the head, and return its output."""
        process = self.hosts.head.start(
            *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=self.environment | options.pop("env", {}), **options,
        )  # fmt: skip
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{command}: {output}\n{self.logs()}"
        return output

    def state(self, job: str) -> dict[str, str]:
        """Return the output of ``scontrol show job``."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """Return the end of each daemon's log."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in files)

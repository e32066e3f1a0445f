"""The RayJob of deploy/kubernetes, as rendered, on pods with their own hosts."""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import manifests
import pytest
from host_runs import need_hosts
from pods import DASHBOARD, PORT, Pod

from benchmarks.hosts import Hosts
from support import end_group, wait_until

pytestmark = pytest.mark.hosts

JOB = "gatdist-x7k2p"  # KubeRay numbers its submissions at random
PIPED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
# Many small steps, so that the run does not end before a host is removed. A restart, which is the
# default with NCCL: else the hook would wait, since the pod that is to follow comes after it.
TOTAL = 11200
SHORT = [
    *(f"run.total_samples={TOTAL}", "run.global_batch=16", "run.log_every_samples=1600"),
    *("run.checkpoint_every_samples=800", "run.keep_checkpoints=99"),
    *("evaluate.every_samples=0", "evaluate.metrics=[]", "cluster.backend=gloo"),
    "cluster.after_loss=restart",
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The spec of the RayJob that ``cpu-local`` renders, with a short run in its settings."""
    folder = manifests.copy_of(tmp_path_factory.mktemp("deploy"))
    file = folder / "overlays/cpu-local/settings.yaml"
    options = " ".join(f"--set {word}" for word in SHORT)
    file.write_text(file.read_text().replace("--set run.seed=0", options))
    (found,) = [r for r in manifests.render(folder, "cpu-local") if r.kind == "RayJob"]
    return dict(found.body["spec"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the PersistentVolumeClaim."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pods(job: dict[str, Any], runs: Path) -> Iterator[Hosts]:
    """A head pod, and as many worker pods as in the manifest; they require a token."""
    need_hosts()
    cluster = job["rayClusterSpec"]
    token = {("gatdist-ray-token", "auth_token"): secrets.token_hex(32)}
    make = partial(Pod, cluster=cluster, secrets=token, claims={"gatdist-runs": runs})
    with Hosts(cluster["workerGroupSpecs"][0]["replicas"], host=make) as hosts:
        yield hosts


def submit(job: dict[str, Any], head: str) -> str:
    """Return the shell command that KubeRay gives to the submitter."""
    url = f"http://{head}:{DASHBOARD}"
    address, follow = f"--address {url}", f"ray job logs --address {url} --follow {JOB}"
    healthy = f"import urllib.request as r; r.urlopen('{url}/api/gcs_healthz', timeout=5)"
    return (
        f'until python -c "{healthy}" >/dev/null 2>&1 ; do sleep 2 ; done ; '
        f"if ! ray job status {address} {JOB} >/dev/null 2>&1 ; then "
        f"ray job submit {address} --no-wait --submission-id {JOB} -- {job['entrypoint']} ; fi ; "
        f"{follow}"
    )


def ended(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str]:
    """Return status and output of a process."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        end_group(process)
    return process.returncode, output


def unauthorized_pods(host: Pod, head: str, job: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """Yield hosts that join with a wrong token and with none, and a submitter without one."""
    joins = f"ray start --address={head}:{PORT} --block"
    wrong, none = {"RAY_AUTH_TOKEN": "b" * 64}, {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": None}
    template = job["submitterPodTemplate"]["spec"]
    return [
        host.container(host.spec, "/bin/bash", "-c", joins, env=wrong, **PIPED),
        host.container(host.spec, "/bin/bash", "-c", joins, env=none, **PIPED),
        host.container(template, "/bin/bash", "-ce", submit(job, head), env=none, **PIPED),
    ]


def test_entry_point_trains_pod_may_drain_and_unauthorized_pods_are_rejected(
    pods: Hosts, job: dict[str, Any], runs: Path
) -> None:
    """By the dashboard, with the token; ``preStop`` makes the run checkpoint before a host ends."""
    (stays, goes), run, head = pods.workers, runs / "digits", pods.head.address
    assert isinstance(stays, Pod)
    assert isinstance(goes, Pod)

    def committed() -> list[int]:
        return sorted(int(path.parent.name[:9]) for path in run.glob("checkpoints/*/MANIFEST.json"))

    template = job["submitterPodTemplate"]["spec"]
    refused = unauthorized_pods(stays, head, job)
    with stays.container(template, "/bin/bash", "-ce", submit(job, head), **PIPED) as submitter:
        try:
            for process in refused:
                status, output = ended(process)
                assert status, output
                assert "uthenticat" in output, output
            assert len(pods.alive()) == 1 + len(pods.workers)
            wait_until(committed, "a checkpoint", timeout_s=300)
            hook = goes.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            status, output = ended(goes.start(*hook, **PIPED))
            assert status == 0, output
            goes.end()  # as the kubelet does after the hook; then KubeRay creates a new pod
            pods.join(goes)
            status, output = ended(submitter)
        finally:
            end_group(submitter)
    assert status == 0, output
    first, second = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    for attempt in first, second:
        assert sorted(attempt["hosts"]) == [host.name for host in pods.workers], output
    assert f"{goes.name} will be taken away" in second["reason"]
    assert second["resumed_from"] in committed()
    assert committed()[-1] == TOTAL
    assert "Traceback" not in output
    asked = ["ray", "job", "status", "--address", f"http://{head}:{DASHBOARD}", JOB]
    status, output = ended(pods.head.start(*asked, **PIPED))
    assert "succeeded" in output, output
    words = shlex.split(job["entrypoint"])
    assert json.loads((run / "config.json").read_text())["cluster"]["workers"] == int(words[6])

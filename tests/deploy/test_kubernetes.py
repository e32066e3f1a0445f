"""Manifests of deploy/kubernetes: every overlay is valid, and mistakes are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manifests
import pytest
import yaml
from kubernetes_pods import pods
from kubernetes_rules import RULES, SECRETS
from manifests import CRDS, KUBERNETES, RenderError, closed, copy_of, overlays, render

needs_crds = pytest.mark.skipif(not CRDS.exists(), reason=f"KubeRay's schemas: no {CRDS}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A filled-in copy that a test may change."""
    return copy_of(tmp_path)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filled-in copy that tests must not change."""
    return copy_of(tmp_path_factory.mktemp("shared_folder"))


def findings(folder: Path, overlay: str) -> list[str]:
    """Return all findings. Rules only check what is valid by its schema."""
    if found := list(manifests.settings_findings(folder, overlay)):
        return [*map(str, found)]
    resources = render(folder, overlay)
    found = [f for resource in resources for f in manifests.schema_findings(resource)]
    return [str(f) for f in found or (f for rule in RULES for f in rule(resources))]


@needs_crds
@pytest.mark.parametrize("overlay", overlays())
def test_every_overlay_is_valid(shared_folder: Path, overlay: str) -> None:
    assert findings(shared_folder, overlay) == []


@needs_crds
def test_job_may_wait_in_a_kueue_queue(folder: Path) -> None:
    overlay = folder / "overlays/gpu"
    text = (overlay / "kustomization.yaml").read_text()
    (overlay / "kustomization.yaml").write_text(text.replace("# - ../..", "- ../.."))
    with pytest.raises(RenderError, match=r"data\.queue` is missing"):
        render(folder, "gpu")
    replace(overlay / "settings.yaml", "  preset: digits\n", "  preset: digits\n  queue: gpus\n")
    assert findings(folder, "gpu") == []
    (job,) = [r.body for r in render(folder, "gpu") if r.kind == "RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["spec"]["suspend"] is True


def with_components(folder: Path, overlay: str, *names: str) -> None:
    """Add components to an overlay, as its kustomization.yaml says."""
    added = "".join(f"  - ../../components/{name}\n" for name in names)
    line = '  # - ../../components/rdma # or efa; see "Fast networks" in deploy/README.md\n'
    replace(folder / f"overlays/{overlay}/kustomization.yaml", line, added)


def worker_of(folder: Path, overlay: str) -> dict[str, Any]:
    """Return the spec of the hosts' pods."""
    (pod,) = [pod for pod in pods(render(folder, overlay)) if pod.role == "worker"]
    return pod.spec


GPU_OVERLAYS = sorted({*overlays()} - {"cpu-local"})


@needs_crds
@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_hosts_may_request_rdma_devices(folder: Path, overlay: str) -> None:
    with_components(folder, overlay, "rdma")
    assert findings(folder, overlay) == []
    (container,) = worker_of(folder, overlay)["containers"]
    for amounts in container["resources"].values():
        assert amounts["rdma/hca_shared_devices_a"] == "1"


@needs_crds
@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_hosts_may_request_elastic_fabric_adapters(folder: Path, overlay: str) -> None:
    with_components(folder, overlay, "efa")
    with pytest.raises(RenderError, match=r"data\.efa-per-host` is missing"):
        render(folder, overlay)
    settings = folder / f"overlays/{overlay}/settings.yaml"
    replace(settings, "  gpus-per-host:", "  efa-per-host: '4'\n  gpus-per-host:")
    assert findings(folder, overlay) == []
    (container,) = worker_of(folder, overlay)["containers"]
    for amounts in container["resources"].values():
        assert (amounts["vpc.amazonaws.com/efa"], amounts["hugepages-2Mi"]) == ("4", "5120Mi")
    assert {"name": "FI_PROVIDER", "value": "efa"} in container["env"]


@needs_crds
def test_huge_pages_beyond_the_request_are_reported(folder: Path) -> None:
    with_components(folder, "gpu", "rdma", "efa")
    replace(folder / "overlays/gpu/settings.yaml", "  hosts:", "  efa-per-host: '1'\n  hosts:")
    devices = folder / "components/efa/devices.yaml"
    replace(devices, "limits/hugepages-2Mi\n  value: 5120Mi", "limits/hugepages-2Mi\n  value: 6Gi")
    (found,) = findings(folder, "gpu")
    assert "resources.limits.hugepages-2Mi" in found


@needs_crds
def test_memory_lock_gives_workers_one_capability_as_root_and_nothing_else(folder: Path) -> None:
    with_components(folder, "gpu", "rdma", "memory-lock")
    fields = [finding.split(": ")[2] for finding in findings(folder, "gpu")]
    cluster = f"spec.rayClusterSpec.{WORKER}"
    assert sorted(fields) == [
        f"{cluster}.containers[0].securityContext.capabilities.add",
        f"{cluster}.securityContext.runAsUser",
    ]
    spec = worker_of(folder, "gpu")
    assert spec["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]},
    }


def settings_of(overlay: str) -> list[str]:
    """Return the keys of an overlay's settings.yaml."""
    settings, *_ = yaml.safe_load_all(
        (KUBERNETES / f"overlays/{overlay}/settings.yaml").read_text()
    )
    return [*settings["data"], *manifests.VALUES]


@pytest.mark.parametrize("key", sorted(set(settings_of("gpu-spot-elastic"))))
def test_missing_setting_is_reported_by_name(folder: Path, key: str) -> None:
    file = folder / "overlays/gpu-spot-elastic/settings.yaml"
    settings, *others = yaml.safe_load_all(file.read_text())
    del settings["data"][key]
    file.write_text(yaml.safe_dump_all([settings, *others]))
    with pytest.raises(RenderError, match=rf"`data\.{key}` is missing .* ConfigMap.*/settings"):
        render(folder, "gpu-spot-elastic")


@pytest.mark.parametrize("overlay", sorted({*overlays()} - {"cpu-local"}))
def test_unchanged_overlay_reports_what_to_fill_in(overlay: str) -> None:
    with pytest.raises(RenderError, match=r"`data\.image` is missing"):
        render(KUBERNETES, overlay)


CLUSTER, JOB = "base/raycluster.yaml", "components/job/rayjob.yaml"
ELASTIC, GPU, LOCAL = "gpu-spot-elastic", "gpu", "cpu-local"
HEAD, WORKER = "headGroupSpec.template.spec", "workerGroupSpecs[0].template.spec"
# Overlay, file, text to replace, replacement, and what the finding must name.
MISTAKES = {
    "a misspelled field": (LOCAL, CLUSTER, "rayVersion:", "rayVerison:", ["spec", "rayVerison"]),
    "a misspelled nested field": (
        *(LOCAL, CLUSTER, "allowPrivilegeEscalation", "allowPriviledgeEscalation"),
        ["containers[0].securityContext", "allowPriviledgeEscalation"],
    ),
    "a misspelled field of a core kind": (
        *(LOCAL, "base/networkpolicy.yaml", "policyTypes", "policyType"),
        ["networkpolicy.yaml", "policyType"],
    ),
    "a misspelled field of the job": (LOCAL, JOB, "backoffLimit: 4", "backOffLimit: 4", [JOB]),
    "a wrong type": (
        *(LOCAL, JOB, "ttlSecondsAfterFinished: 300", "ttlSecondsAfterFinished: soon"),
        [JOB, "spec.ttlSecondsAfterFinished", "'soon'"],
    ),
    "a number instead of text": (
        *(LOCAL, CLUSTER, 'num-cpus: "0"', "num-cpus: 0"),
        [CLUSTER, "headGroupSpec.rayStartParams.num-cpus", "0"],
    ),
    "a wrong type in the settings": (
        *("gpu", "overlays/gpu/settings.yaml", "hosts: '2'", "hosts: two"),
        ["overlays/gpu/settings.yaml", "data.hosts", "'two'"],
    ),
    "an unknown setting": (
        *("gpu", "overlays/gpu/settings.yaml", "options:", "option:"),
        ["overlays/gpu/settings.yaml", "data.option", "is none of"],
    ),
    "a value that does not exist": (
        *(ELASTIC, "components/elastic/autoscaler.yaml", "version: v2", "version: v3"),
        ["autoscalerOptions.version", "v3"],
    ),
    "an empty setting": (
        *(GPU, "overlays/gpu/settings.yaml", "run-dir: s3://example/runs/digits", "run-dir: ''"),
        ["overlays/gpu/settings.yaml", "data.run-dir"],
    ),
    "a placeholder": (
        *(GPU, "overlays/gpu/settings.yaml", "s3://example/runs", "s3://BUCKET/runs"),
        [JOB, "spec.entrypoint", "filled in, in settings.yaml"],
    ),
    "a missing request": (
        *(LOCAL, CLUSTER, 'requests: { cpu: "1", memory: 4Gi,', "requests: { memory: 4Gi,"),
        [CLUSTER, f"{HEAD}.containers[0].resources.requests.cpu", "missing"],
    ),
    "a submitter without limits": (
        *(LOCAL, JOB, 'limits: { cpu: "1", memory: 1Gi, ephemeral-storage: 1Gi }', "limits: {}"),
        [JOB, "submitterPodTemplate.spec.containers[0].resources.limits.memory"],
    ),
    "memory above the request": (
        *(LOCAL, CLUSTER, 'limits: { cpu: "2", memory: 4Gi,', "limits: { cpu: 2, memory: 8Gi,"),
        [CLUSTER, f"{HEAD}.containers[0].resources.limits.memory"],
    ),
    "root user": (
        *(LOCAL, CLUSTER, "runAsUser: 1000", "runAsUser: 0"),
        [CLUSTER, f"{HEAD}.securityContext.runAsUser", "not root"],
    ),
    "a writable root file system": (
        *(LOCAL, CLUSTER, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
        [CLUSTER, f"{WORKER}.containers[0].securityContext.readOnlyRootFilesystem"],
    ),
    "an added capability": (
        LOCAL,
        JOB,
        "drop: [ALL]",
        "add: [SYS_PTRACE]",
        [JOB, "capabilities.drop"],
    ),
    "a capability besides the dropped ones": (
        *(LOCAL, CLUSTER, "drop: [ALL]", "drop: [ALL]\n                add: [IPC_LOCK]"),
        [CLUSTER, "capabilities.add"],
    ),
    "a host path": (
        *(LOCAL, CLUSTER, "emptyDir: { sizeLimit: 75Gi }", "hostPath: { path: /var }"),
        [CLUSTER, f"{HEAD}.volumes.cache"],
    ),
    "no room for Ray's files": (
        *(LOCAL, CLUSTER, "- { name: tmp, mountPath: /tmp }", ""),
        [CLUSTER, f"{WORKER}.containers[0].volumeMounts", "/tmp"],
    ),
    "a secret in a file": (
        *(
            LOCAL,
            CLUSTER,
            "{ name: HOME, value: /tmp }",
            "{ name: HOME, value: AKIA0123456789ABCDEF }",
        ),
        [CLUSTER, "env[2].value", "looks like a secret"],
    ),
    "a token in a file": (
        *(LOCAL, JOB, "{ name: HOME, value: /tmp }", "{ name: STORE_TOKEN, value: abc }"),
        [JOB, "env.STORE_TOKEN", "must come from a Secret"],
    ),
    "a Secret in a file": (
        *(LOCAL, "overlays/cpu-local/runs.yaml", "apiVersion: v1\n", "SECRET"),
        ["overlays/cpu-local/runs.yaml", "Secret: kind", "belongs into no file"],
    ),
    "no token": (
        *(LOCAL, CLUSTER, "    mode: token\n", "    mode: disabled\n"),
        [CLUSTER, "spec.rayClusterSpec.authOptions"],
    ),
    "a Ray process without token authentication": (
        *(LOCAL, CLUSTER, "{ name: RAY_AUTH_MODE, value: token }", "{ name: MODE, value: token }"),
        [CLUSTER, f"{WORKER}.containers[0].env.RAY_AUTH_MODE"],
    ),
    "a submitter without the token": (
        *(LOCAL, JOB, "name: RAY_AUTH_TOKEN", "name: RAY_TOKEN"),
        [JOB, "submitterPodTemplate.spec.containers[0].env.RAY_AUTH_TOKEN"],
    ),
    "workers on the head": (
        *(LOCAL, CLUSTER, '      num-cpus: "0"', '      num-cpus: "2"'),
        [CLUSTER, "headGroupSpec.rayStartParams.num-cpus"],
    ),
    "a head on a spot host": (
        *(ELASTIC, "components/spot/placement.yaml"),
        "- { key: karpenter.sh/capacity-type, operator: NotIn, values: [spot] }",
        *("", [CLUSTER, f"{HEAD}.affinity", "karpenter.sh/capacity-type"]),
    ),
    "a head that may be evicted": (
        *(LOCAL, CLUSTER, 'safe-to-evict: "false"', 'safe-to-evict: "true"'),
        [CLUSTER, "headGroupSpec.template.metadata.annotations", "safe-to-evict"],
    ),
    "a budget for no pod": (
        *(LOCAL, "base/poddisruptionbudget.yaml", "node-type: head", "node-type: haed"),
        [CLUSTER, "headGroupSpec", "PodDisruptionBudget"],
    ),
    "a pod that the network policy does not know": (
        *(LOCAL, "base/networkpolicy.yaml", "podSelector:\n    matchLabels:\n", "POLICY"),
        [CLUSTER, "template.metadata.labels", "NetworkPolicy"],
    ),
    "a host that does not drain": (
        *(LOCAL, CLUSTER, "gatdist.cluster.drain", "gatdist.cluster.drained"),
        [CLUSTER, f"{WORKER}.containers[0].lifecycle.preStop"],
    ),
    "a host with too short a grace period": (
        *(LOCAL, CLUSTER, "PeriodSeconds: 120", "PeriodSeconds: 30"),
        [CLUSTER, f"{WORKER}.terminationGracePeriodSeconds"],
    ),
    "elastic without autoscaler": (
        *(ELASTIC, "components/elastic/autoscaler.yaml", "Autoscaling: true", "Autoscaling: false"),
        [CLUSTER, "spec.rayClusterSpec.enableInTreeAutoscaling"],
    ),
    "no shutdown after the job": (
        *(LOCAL, JOB, "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
        [JOB, "spec.shutdownAfterJobFinishes"],
    ),
    "two end conditions": (
        *(LOCAL, JOB, "  backoffLimit: 4", "DELETION"),
        [JOB, "spec.deletionStrategy", "excludes shutdownAfterJobFinishes"],
    ),
    "a head that is not restarted": (
        *(LOCAL, JOB, "  backoffLimit: 4", "  backoffLimit: 0"),
        [JOB, "spec.backoffLimit"],
    ),
    "an option that gatdist does not know": (
        *(LOCAL, JOB, "--run-dir", "--rundir"),
        [JOB, "spec.entrypoint", "does not understand"],
    ),
    "a key that gatdist does not know": (
        *(LOCAL, "overlays/cpu-local/settings.yaml", "run.seed", "run.sead"),
        [JOB, "spec.entrypoint", "run.sead"],
    ),
    "more workers than hosts have room for": (
        *(ELASTIC, "overlays/gpu-spot-elastic/settings.yaml", "workers: '1:4'", "workers: '1:8'"),
        [JOB, "spec.entrypoint", "8 workers do not fit on 4 hosts"],
    ),
    "a run directory on one host only": (
        *(LOCAL, "overlays/cpu-local/settings.yaml", "/runs/digits", "/tmp/digits"),
        [JOB, "spec.entrypoint", "/tmp/digits is seen by one host"],
    ),
    "another Ray version than in the lock": (
        *(LOCAL, CLUSTER, 'rayVersion: "2.60.0"', 'rayVersion: "2.9.0"'),
        [CLUSTER, "spec.rayClusterSpec.rayVersion", "requirements.lock"],
    ),
    "a mutable image tag": (
        *(GPU, "overlays/gpu/settings.yaml", "gatdist:0.1.0-gpu", "gatdist:latest"),
        [CLUSTER, f"{HEAD}.containers[0].image", "tag"],
    ),
    "an ingress rule for everyone": (
        *(LOCAL, "base/networkpolicy.yaml", "    # Prometheus", "    - {}\n    # Prometheus"),
        ["base/networkpolicy.yaml", "spec.ingress[2].from"],
    ),
}
# Cases that are too long for the table.
LONG = {
    "SECRET": "apiVersion: v1\nkind: Secret\nmetadata: { name: other }\nstringData: { a: b }\n---\n"
    "apiVersion: v1\n",
    "POLICY": "podSelector:\n    matchLabels:\n      app.kubernetes.io/part-of: gatdist\n",
    "DELETION": "  backoffLimit: 4\n  deletionStrategy:\n    deletionRules:\n"
    "      - { policy: DeleteCluster, condition: { jobStatus: SUCCEEDED } }",
}


def replace(file: Path, old: str, new: str) -> None:
    """Replace all occurrences of a text in a file; there must be one."""
    text = file.read_text()
    assert old in text, f"{file} has no {old!r}"
    file.write_text(text.replace(old, LONG.get(new, new)))


@needs_crds
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_reported_by_file_and_field(folder: Path, mistake: str) -> None:
    overlay, file, old, new, named = MISTAKES[mistake]
    replace(folder / file, old, new)
    found = findings(folder, overlay)
    assert [line for line in found if all(word in line for word in named)], found


@pytest.mark.parametrize("kind", ["overlays", "components"])
def test_runbook_names_all_files(kind: str) -> None:
    text = (KUBERNETES.parent / "README.md").read_text()
    assert [p.name for p in (KUBERNETES / kind).iterdir() if f"{p.name}`" not in text] == []


def files() -> Iterator[Path]:
    """Return all files of deploy/."""
    return (path for path in KUBERNETES.parent.rglob("*") if path.is_file())


def test_no_file_of_deploy_holds_a_secret() -> None:
    assert [path for path in files() if SECRETS.search(path.read_text(errors="ignore"))] == []


@pytest.mark.parametrize(
    "text",
    [
        "AKIA0123456789ABCDEF",
        "-----BEGIN RSA PRIVATE KEY",
        "a" * 64,
        "password: 'hunter2hunter2hu'",
    ],
)
def test_secrets_are_recognized(text: str) -> None:
    assert SECRETS.search(f"value: {text}")


@needs_crds
def test_closed_schema_is_closed_at_every_depth() -> None:
    """Only fields that KubeRay itself leaves open stay open: maps of strings, and status."""
    schema = closed({"type": "object", "properties": {"a": {"items": {
        "type": "object", "properties": {"b": {"type": "string"}}}}}})  # fmt: skip
    assert schema["additionalProperties"] is False
    assert schema["properties"]["a"]["items"]["additionalProperties"] is False

"""Rules for the manifests of deploy/kubernetes beyond their schemas.

A rule is a generator of findings about a rendered overlay; ``RULES`` holds them all.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kubernetes_pods import Pod, clusters, jobs, pods, strings
from manifests import REPOSITORY, Finding, Resource

from gatdist.cli import parser
from gatdist.cli.common import workers_range
from gatdist.common.errors import GatdistError
from gatdist.config import load_config

TOKEN = {"name": "gatdist-ray-token", "key": "auth_token"}
SPOT_LABELS = {
    "cloud.google.com/gke-spot",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
    "kubernetes.azure.com/scalesetpriority",
}
# Patterns of keys, tokens and passwords.
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\bgh[pousr]_\w{20,}|\bhf_\w{20,}"
    r"|\b[0-9a-fA-F]{32,}\b|(?i:secret|password|token)\w*['\"]?\s*[:=]\s*['\"]?[\w/+=]{16,}"
)


def placeholders_are_filled_in(resources: Sequence[Resource]) -> Iterator[Finding]:
    """No placeholder (a word in capitals) and no empty value is left."""
    for resource in resources:
        for path, value in strings(resource.body):
            left = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", value)) - {"SPOT", "IPC_LOCK"}
            if not value or (left and not path.endswith(".name")):
                yield resource.finding(path, f"{value!r} is to be filled in, in settings.yaml")


def containers_request_resources(resources: Sequence[Resource]) -> Iterator[Finding]:
    """The scheduler and Ray rely on requests; memory above the request may kill a worker later."""
    for pod in pods(resources):
        for path, container in pod.containers():
            given = container.get("resources", {})
            requests, limits = given.get("requests", {}), given.get("limits", {})
            for kind, amounts in ("requests", requests), ("limits", limits):
                for name in ("cpu", "memory", "ephemeral-storage"):
                    if name not in amounts:
                        yield pod.resource.finding(f"{path}.resources.{kind}.{name}", "is missing")
            if pod.role != "submitter" and requests.get("memory") != limits.get("memory"):
                yield pod.resource.finding(
                    f"{path}.resources.limits.memory", "must be what is requested"
                )
    for resource, path, cluster in clusters(resources):
        if cluster.get("enableInTreeAutoscaling") and not (
            {"requests", "limits"} <= cluster["autoscalerOptions"].get("resources", {}).keys()
        ):
            yield resource.finding(f"{path}.autoscalerOptions.resources", "is missing")


def devices_are_limited_as_requested(resources: Sequence[Resource]) -> Iterator[Finding]:
    """Kubernetes overcommits neither devices nor huge pages."""
    for pod in pods(resources):
        for path, container in pod.containers():
            given = container.get("resources", {})
            requests, limits = given.get("requests", {}), given.get("limits", {})
            for name in sorted(requests.keys() | limits.keys()):
                is_device = "/" in name or name.startswith("hugepages-")
                if is_device and requests.get(name) != limits.get(name):
                    field = f"{path}.resources.limits.{name}"
                    yield pod.resource.finding(field, "must be what is requested")


def pods_are_restricted(resources: Sequence[Resource]) -> Iterator[Finding]:
    """As Kubernetes' ``restricted`` standard requires, plus a read-only root file system."""
    for pod in pods(resources):
        own = pod.spec.get("securityContext", {})
        if own.get("runAsNonRoot") is not True or not own.get("runAsUser"):
            yield pod.resource.finding(
                f"{pod.path}.securityContext.runAsUser", "must be a user that is not root"
            )
        if own.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield pod.resource.finding(
                f"{pod.path}.securityContext.seccompProfile.type", "must be RuntimeDefault"
            )
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(name):
                yield pod.resource.finding(f"{pod.path}.{name}", "is the host's")
        for path, container in pod.containers():
            yield from _restrictions(pod.resource, f"{path}.securityContext", container)
    for resource, path, cluster in clusters(resources):
        if cluster.get("enableInTreeAutoscaling"):
            options = cluster["autoscalerOptions"]
            yield from _restrictions(resource, f"{path}.autoscalerOptions.securityContext", options)


def _restrictions(resource: Resource, path: str, container: dict[str, Any]) -> Iterator[Finding]:
    own = container.get("securityContext", {})
    requested = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
    for name, value in requested.items():
        if own.get(name) is not value:
            yield resource.finding(f"{path}.{name}", f"must be {str(value).lower()}")
    if own.get("privileged"):
        yield resource.finding(f"{path}.privileged", "must not be")
    if own.get("runAsUser") == 0 or own.get("runAsNonRoot") is False:
        yield resource.finding(f"{path}.runAsUser", "must be a user that is not root")
    if own.get("capabilities", {}).get("drop") != ["ALL"]:
        yield resource.finding(f"{path}.capabilities.drop", "must be [ALL]")
    if own.get("capabilities", {}).get("add"):
        yield resource.finding(f"{path}.capabilities.add", "must be absent")


def written_folders_have_volumes(resources: Sequence[Resource]) -> Iterator[Finding]:
    """Volumes are bounded. Ray writes to /tmp and /dev/shm, gatdist to its cache."""
    for pod in pods(resources):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        for name, volume in volumes.items():
            if "hostPath" in volume:
                yield pod.resource.finding(f"{pod.path}.volumes.{name}", "is the host's")
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                path = f"{pod.path}.volumes.{name}.emptyDir.sizeLimit"
                yield pod.resource.finding(path, "is missing")
        needed = {"/tmp"} if pod.role == "submitter" else {"/tmp", "/dev/shm", "/cache"}
        for path, container in pod.containers():
            mounts = {it["mountPath"]: it["name"] for it in container.get("volumeMounts", ())}
            for place in sorted(needed - mounts.keys()):
                yield pod.resource.finding(f"{path}.volumeMounts", f"{place} must be writable")
            for place, name in mounts.items():
                if name not in volumes:
                    yield pod.resource.finding(f"{path}.volumeMounts", f"{place}: no {name!r}")


def a_token_is_required(resources: Sequence[Resource]) -> Iterator[Finding]:
    """By KubeRay and by each Ray process; it comes from the Secret."""
    for resource, path, cluster in clusters(resources):
        requested = {"mode": "token", "secretName": TOKEN["name"]}
        if cluster.get("authOptions") != requested:
            yield resource.finding(f"{path}.authOptions", f"must be {requested}")
    for pod in pods(resources):
        for path, container in pod.containers():
            given = {variable["name"]: variable for variable in container.get("env", ())}
            if given.get("RAY_AUTH_MODE", {}).get("value") != "token":
                yield pod.resource.finding(f"{path}.env.RAY_AUTH_MODE", "must be token")
            token = given.get("RAY_AUTH_TOKEN", {})
            if token.get("valueFrom") != {"secretKeyRef": TOKEN}:
                yield pod.resource.finding(
                    f"{path}.env.RAY_AUTH_TOKEN", f"must come from the Secret {TOKEN['name']}"
                )


def no_secret_is_written_down(resources: Sequence[Resource]) -> Iterator[Finding]:
    """Secrets are created by hand; files only reference them."""
    for resource in resources:
        if resource.kind == "Secret":
            yield resource.finding("kind", "a Secret belongs into no file")
        for path, value in strings(resource.body):
            if SECRETS.search(f"{path.rpartition('.')[2]}: {value}") or SECRETS.search(value):
                yield resource.finding(path, "looks like a secret")
    for pod in pods(resources):
        for path, container in pod.containers():
            for variable in container.get("env", ()):
                name = variable["name"]
                if "value" in variable and re.search(r"TOKEN|SECRET|PASSWORD|_KEY", name):
                    yield pod.resource.finding(f"{path}.env.{name}", "must come from a Secret")


def the_driver_is_protected(resources: Sequence[Resource]) -> Iterator[Finding]:
    """The head runs it: no worker on that pod, no eviction by scale-down, no spot host."""
    for resource, path, cluster in clusters(resources):
        head = cluster["headGroupSpec"]
        if head.get("rayStartParams", {}).get("num-cpus") != "0":
            field = f"{path}.headGroupSpec.rayStartParams.num-cpus"
            yield resource.finding(field, 'must be "0": no worker next to the driver')
        notes = head["template"].get("metadata", {}).get("annotations", {})
        evict = "cluster-autoscaler.kubernetes.io/safe-to-evict"
        if notes.get(evict) != "false":
            field = f"{path}.headGroupSpec.template.metadata.annotations.{evict}"
            yield resource.finding(field, 'must be "false"')
        head_labels = head["template"]["metadata"]["labels"] | {"ray.io/node-type": "head"}
        if not any(
            other.kind == "PodDisruptionBudget"
            and other.body["spec"].get("maxUnavailable") == 0
            and other.body["spec"]["selector"]["matchLabels"].items() <= head_labels.items()
            for other in resources
        ):
            field = f"{path}.headGroupSpec"
            yield resource.finding(field, "no PodDisruptionBudget keeps the head")
        on_spot = any(
            toleration.get("key") in SPOT_LABELS
            for group in cluster["workerGroupSpecs"]
            for toleration in group["template"]["spec"].get("tolerations", ())
        )
        if on_spot:
            yield from _is_protected(resource, f"{path}.headGroupSpec", head["template"]["spec"])


def _is_protected(resource: Resource, path: str, spec: dict[str, Any]) -> Iterator[Finding]:
    for toleration in spec.get("tolerations", ()):
        if toleration.get("key") in SPOT_LABELS or "key" not in toleration:
            yield resource.finding(f"{path}.template.spec.tolerations", "the head is no spot pod")
    terms = (
        spec.get("affinity", {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution", {})
        .get("nodeSelectorTerms", [{}])
    )
    for term in terms:
        away = {
            expression["key"]
            for expression in term.get("matchExpressions", ())
            if expression["operator"] == "NotIn"
        }
        for label in sorted(SPOT_LABELS - away):
            yield resource.finding(
                f"{path}.template.spec.affinity", f"the head must keep away from {label}"
            )


def hosts_join_and_drain(resources: Sequence[Resource]) -> Iterator[Finding]:
    """An elastic cluster has an autoscaler; a host that is removed drains first."""
    for resource, path, cluster in clusters(resources):
        for number, group in enumerate(cluster["workerGroupSpecs"]):
            fewest, most = group["minReplicas"], group["maxReplicas"]
            field = f"{path}.workerGroupSpecs[{number}]"
            if group.get("replicas") != fewest or fewest > most:
                yield resource.finding(f"{field}.replicas", "must begin with the fewest")
            grows = bool(cluster.get("enableInTreeAutoscaling"))
            if grows != (fewest < most):
                field = f"{path}.enableInTreeAutoscaling"
                yield resource.finding(field, f"does not fit {fewest} to {most} replicas")
            if grows and cluster["autoscalerOptions"].get("version") != "v2":
                yield resource.finding(f"{path}.autoscalerOptions.version", "must be v2")
    for pod in pods(resources):
        if pod.spec.get("restartPolicy") != "Never":
            yield pod.resource.finding(f"{pod.path}.restartPolicy", "must be Never")
        if pod.role == "worker":
            yield from _drains(pod)


def _drains(pod: Pod) -> Iterator[Finding]:
    path, container = next(pod.containers())
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if hook[:4] != ["python", "-m", "gatdist.cluster.drain", "--within"] or len(hook) != 5:
        yield pod.resource.finding(f"{path}.lifecycle.preStop", "must drain the host's Ray")
    elif float(hook[4]) + 10 > pod.spec.get("terminationGracePeriodSeconds", 30):
        yield pod.resource.finding(
            f"{pod.path}.terminationGracePeriodSeconds", f"is too short for --within {hook[4]}"
        )


def jobs_end_and_are_retried(resources: Sequence[Resource]) -> Iterator[Finding]:
    """A finished job frees its resources; a job whose head is lost is retried."""
    for resource, spec in jobs(resources):
        if spec.get("shutdownAfterJobFinishes") is not True:
            yield resource.finding("spec.shutdownAfterJobFinishes", "must be true")
        if "deletionStrategy" in spec:
            yield resource.finding(
                "spec.deletionStrategy", "excludes shutdownAfterJobFinishes; use one of them"
            )
        if not spec.get("backoffLimit"):
            yield resource.finding("spec.backoffLimit", "a lost head must be tried again")
        if not spec.get("activeDeadlineSeconds", 0) > 60:
            yield resource.finding("spec.activeDeadlineSeconds", "is a bound for the bill")
        if spec.get("submissionMode", "K8sJobMode") != "K8sJobMode":
            yield resource.finding("spec.submissionMode", "must be K8sJobMode")


def the_entry_point_is_valid(resources: Sequence[Resource]) -> Iterator[Finding]:
    """Its command parses, and the hosts have room for its workers."""
    for resource, spec in jobs(resources):
        words = shlex.split(spec["entrypoint"])
        if words[:2] != ["gatdist", "train"]:
            yield resource.finding("spec.entrypoint", "must be gatdist train")
            continue
        try:
            given = parser().parse_args(words[1:])
            workers = workers_range(given.workers or "1")
            if not given.preset.startswith("/config/"):  # which exists on the cluster only
                load_config(given.preset, [*given.set, f"cluster.workers={workers}"])
        except (SystemExit, GatdistError) as error:
            yield resource.finding("spec.entrypoint", f"gatdist does not understand it: {error}")
            continue
        if given.address != "auto":
            yield resource.finding("spec.entrypoint", "--address must be auto")
        yield from _fits(resource, spec["rayClusterSpec"], workers, given.run_dir)


def _fits(
    resource: Resource, cluster: dict[str, Any], workers: Any, run_dir: str
) -> Iterator[Finding]:
    fewest, most = workers if isinstance(workers, list) else (workers, workers)
    (group,) = cluster["workerGroupSpecs"]
    spec = group["template"]["spec"]
    limits = spec["containers"][0]["resources"]["limits"]
    a_host = int(limits.get("nvidia.com/gpu", math.floor(float(limits["cpu"]))))
    for count, hosts in (fewest, group["minReplicas"]), (most, group["maxReplicas"]):
        if count > max(hosts, 1) * a_host:
            rule = f"{count} workers do not fit on {hosts} hosts with room for {a_host} each"
            yield resource.finding("spec.entrypoint", rule)
    if "://" not in run_dir:
        shared = {v["name"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
        mounts = spec["containers"][0]["volumeMounts"]
        if not any(m["name"] in shared and run_dir.startswith(m["mountPath"]) for m in mounts):
            yield resource.finding("spec.entrypoint", f"--run-dir {run_dir} is seen by one host")


def versions_agree(resources: Sequence[Resource]) -> Iterator[Finding]:
    """KubeRay supports the version of Ray; an image has its own name."""
    for resource, path, cluster in clusters(resources):
        if cluster.get("rayVersion") != locked("ray"):
            yield resource.finding(
                f"{path}.rayVersion", f"must be {locked('ray')}, as requirements.lock says"
            )
    for pod in pods(resources):
        for path, container in pod.containers():
            tag = container["image"].rpartition("/")[2].partition(":")[2]
            if tag in ("", "latest"):
                yield pod.resource.finding(f"{path}.image", "must have a tag, and not latest")


def locked(package: str) -> str:
    """Return the package's version in requirements.lock."""
    text = (REPOSITORY / "requirements.lock").read_text()
    (found,) = re.findall(rf"^{package}==(.+)$", text, re.MULTILINE)
    return found


def the_network_is_closed(resources: Sequence[Resource]) -> Iterator[Finding]:
    """One policy applies to all pods, ingress and egress; no ingress is open to everyone."""
    policies = [resource for resource in resources if resource.kind == "NetworkPolicy"]
    for pod in pods(resources):
        if not any(
            policy.body["spec"]["podSelector"]["matchLabels"].items() <= pod.labels.items()
            for policy in policies
        ):
            path = pod.path.removesuffix(".spec") + ".metadata.labels"
            yield pod.resource.finding(path, "no NetworkPolicy holds for these pods")
    for policy in policies:
        if set(policy.body["spec"].get("policyTypes", ())) != {"Ingress", "Egress"}:
            yield policy.finding("spec.policyTypes", "must be Ingress and Egress")
        for number, rule in enumerate(policy.body["spec"].get("ingress", ())):
            if not rule.get("from"):
                yield policy.finding(f"spec.ingress[{number}].from", "lets everybody in")


def queued_jobs_are_suspended(resources: Sequence[Resource]) -> Iterator[Finding]:
    """Resources with a Kueue queue are created suspended."""
    for resource in resources:
        queue = resource.body["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        suspended = resource.body.get("spec", {}).get("suspend") is True
        if (queue is not None) != suspended:
            yield resource.finding("spec.suspend", "must be true where there is a queue")


Rule = Callable[[Sequence[Resource]], Iterator[Finding]]
RULES: tuple[Rule, ...] = (
    placeholders_are_filled_in,
    containers_request_resources,
    devices_are_limited_as_requested,
    pods_are_restricted,
    written_folders_have_volumes,
    a_token_is_required,
    no_secret_is_written_down,
    the_driver_is_protected,
    hosts_join_and_drain,
    jobs_end_and_are_retried,
    the_entry_point_is_valid,
    versions_agree,
    the_network_is_closed,
    queued_jobs_are_suspended,
)

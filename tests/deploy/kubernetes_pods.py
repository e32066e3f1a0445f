"""Locations of clusters, jobs and pods in the resources of deploy/kubernetes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from manifests import Resource


@dataclass(frozen=True)
class Pod:
    """Pod template.

    Attributes:
        resource: Resource that creates the pods.
        path: Path of the template's spec.
        spec: The spec.
        role: ``head``, ``worker`` or ``submitter``.
        labels: Labels of the pods.
    """

    resource: Resource
    path: str
    spec: dict[str, Any]
    role: str
    labels: dict[str, str]

    def containers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return path and body of each container."""
        for kind in ("containers", "initContainers"):
            for number, container in enumerate(self.spec.get(kind, ())):
                yield f"{self.path}.{kind}[{number}]", container


def cluster_of(resource: Resource) -> tuple[str, dict[str, Any]] | None:
    """Return path and body of a cluster's description, if the resource has one."""
    spec = resource.body.get("spec", {})
    if resource.kind == "RayCluster":
        return "spec", spec
    return ("spec.rayClusterSpec", spec["rayClusterSpec"]) if resource.kind == "RayJob" else None


def clusters(resources: Sequence[Resource]) -> Iterator[tuple[Resource, str, dict[str, Any]]]:
    """Yield each cluster with its resource and path."""
    for resource in resources:
        if found := cluster_of(resource):
            yield resource, *found


def jobs(resources: Sequence[Resource]) -> Iterator[tuple[Resource, dict[str, Any]]]:
    """Yield the spec of each RayJob."""
    for resource in resources:
        if resource.kind == "RayJob":
            yield resource, resource.body["spec"]


def pods(resources: Sequence[Resource]) -> Iterator[Pod]:
    """Yield all pod templates."""

    def pod(resource: Resource, path: str, template: dict[str, Any], role: str) -> Pod:
        labels = template.get("metadata", {}).get("labels", {})
        return Pod(resource, f"{path}.spec", template["spec"], role, labels)

    for resource, path, cluster in clusters(resources):
        yield pod(
            resource, f"{path}.headGroupSpec.template", cluster["headGroupSpec"]["template"], "head"
        )
        for number, group in enumerate(cluster["workerGroupSpecs"]):
            yield pod(
                resource, f"{path}.workerGroupSpecs[{number}].template", group["template"], "worker"
            )
    for resource, spec in jobs(resources):
        yield pod(resource, "spec.submitterPodTemplate", spec["submitterPodTemplate"], "submitter")


def strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each string of a document with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from strings(part, f"{path}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from strings(part, f"{path}[{number}]")

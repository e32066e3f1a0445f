"""Rendering of deploy/kubernetes, and validation against the schemas of Kubernetes and KubeRay."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERNETES = REPOSITORY / "deploy/kubernetes"
# KubeRay's JSON schemas; part of the project's design folder, not of its code.
CRDS = REPOSITORY.parent / "shared/crds"
CRD_FILES = {"RayCluster": "rayclusters.v1.schema.json", "RayJob": "rayjobs.v1.schema.json"}
# Installed from requirements.lock, so identical everywhere.
KUBECTL = Path(sys.executable).parent / "kubectl"
LOADER = yaml.CSafeLoader  # several times faster than the pure Python loader

# Values that a user must set; see the settings.yaml of each overlay.
VALUES = {
    "image": "registry.example/gatdist:0.1.0-gpu",
    "preset": "digits",
    "run-dir": "s3://example/runs/digits",
}
# Allowed keys of a settings.yaml, and patterns of their values.
SETTINGS = {
    "image": r"\S+:\S+",
    "name": r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?",
    "preset": r"\S+",
    "run-dir": r"\S+",
    "options": r".*",
    "hosts": r"\d+(:[1-9]\d*)?",
    "gpus-per-host": r"[1-9]\d*",
    "efa-per-host": r"[1-9]\d*",
    "cpus-per-host": r"[1-9]\d*",
    "memory-per-host": r"[1-9]\d*[GMT]i",
    "workers": r"[1-9]\d*(:[1-9]\d*)?",
    "deadline-seconds": r"[1-9]\d+",
    "queue": r"[a-z0-9.-]+",
}


@dataclass(frozen=True)
class Finding:
    """Error and its place.

    Attributes:
        file: File of deploy/kubernetes.
        field: Path within the resource, as ``kubectl explain`` writes it.
        rule: The violated rule.
    """

    file: str
    field: str
    rule: str

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: {self.rule}"


@dataclass(frozen=True)
class Resource:
    """Resource as rendered by an overlay.

    Attributes:
        overlay: Name of the overlay.
        file: File that defines the resource.
        body: The complete resource.
    """

    overlay: str
    file: str
    body: Mapping[str, Any] = field(repr=False)

    @property
    def kind(self) -> str:
        """Kind, such as ``RayJob``."""
        return self.body["kind"]

    def finding(self, path: str, rule: str) -> Finding:
        """Return a finding about the field at ``path``."""
        # A RayJob's cluster is a copy of the RayCluster.
        of_cluster = path.startswith("spec.rayClusterSpec.")
        file = "base/raycluster.yaml" if of_cluster else self.file
        return Finding(f"{file} (overlays/{self.overlay})", f"{self.kind}: {path}", rule)


class RenderError(Exception):
    """An error of kustomize for an overlay."""


def overlays(folder: Path = KUBERNETES) -> list[str]:
    """Return names of all overlays."""
    return sorted(path.name for path in (folder / "overlays").iterdir())


def copy_of(folder: Path) -> Path:
    """Return a copy of deploy/kubernetes below ``folder`` with its placeholders filled in."""
    copied = folder / "kubernetes"
    shutil.copytree(KUBERNETES, copied)
    for file in copied.glob("overlays/*/settings.yaml"):
        settings, *others = yaml.safe_load_all(file.read_text())
        given = VALUES | settings["data"]
        if "job" not in (file.parent / "kustomization.yaml").read_text():
            given = {name: given[name] for name in ("image", *settings["data"])}
        settings["data"] = given
        file.write_text(yaml.safe_dump_all([settings, *others], sort_keys=False))
    for file in copied.glob("overlays/*/kustomization.yaml"):
        # kustomize annotates each resource with its file.
        file.write_text(f"{file.read_text()}buildMetadata: [originAnnotations]\n")
    return copied


def settings_findings(folder: Path, overlay: str) -> Iterator[Finding]:
    """Return invalid settings of an overlay; kustomize's errors would not name them."""
    file = f"overlays/{overlay}/settings.yaml"
    settings, *_ = yaml.safe_load_all((folder / file).read_text())
    for name, value in settings["data"].items():
        if name not in SETTINGS:
            yield Finding(file, f"data.{name}", f"is none of {', '.join(SETTINGS)}")
        elif not isinstance(value, str) or not re.fullmatch(SETTINGS[name], value):
            yield Finding(file, f"data.{name}", f"{value!r} must be text like {SETTINGS[name]}")


def render(folder: Path, overlay: str) -> list[Resource]:
    """Return what ``kubectl apply -k`` would send.

    Args:
        folder: As ``copy_of`` creates it.
        overlay: Name of the overlay.

    Raises:
        RenderError: kustomize fails.
    """
    done = subprocess.run(
        [KUBECTL, "kustomize", folder / "overlays" / overlay],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"KUBECONFIG": os.devnull},
    )
    if done.returncode:
        raise RenderError(done.stderr)
    return [_resource(folder, overlay, body) for body in yaml.load_all(done.stdout, LOADER)]


def _resource(folder: Path, overlay: str, body: dict[str, Any]) -> Resource:
    annotations = body["metadata"].pop("annotations")
    origin = yaml.safe_load(annotations.pop("config.kubernetes.io/origin"))
    if annotations:
        body["metadata"]["annotations"] = annotations
    path = (folder / "overlays" / overlay / origin["path"]).resolve()
    return Resource(overlay, str(path.relative_to(folder.resolve())), body)


def schema_findings(resource: Resource) -> Iterator[Finding]:
    """Return violations of a resource's schema; unknown fields are errors."""
    if resource.kind in CRD_FILES:
        for error in _validator(resource.kind).iter_errors(resource.body):
            yield resource.finding(_path(error.absolute_path), error.message)
        return
    try:
        kubernetes_validate.validate(resource.body, _newest_kubernetes(), strict=True)
    except kubernetes_validate.ValidationError as error:
        yield resource.finding(_path(error.path), error.message)


def _path(parts: Any) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".")


@cache
def _newest_kubernetes() -> str:
    return kubernetes_validate.latest_version()


@cache
def _validator(kind: str) -> jsonschema.Validator:
    schema = json.loads((CRDS / CRD_FILES[kind]).read_text())
    text = {"type": "string"}
    named = {"type": "object", "additionalProperties": text}
    fields = {"name": text, "namespace": text, "labels": named, "annotations": named}
    # Checked by the API server itself.
    schema["properties"]["metadata"] = {"type": "object", "properties": fields}
    return jsonschema.Draft202012Validator(closed(schema))


def closed(schema: Any) -> Any:
    """Return a schema that rejects unknown fields at any depth."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(part) for name, part in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and "type" in schema and not is_open:
        result.setdefault("additionalProperties", False)
    return result

"""Checks files of Ray's cluster launcher before they cost money.

``python deploy/launcher/check.py FILE...`` prints the file, the field, the rule and a hint for each
mistake, and exits with status 2 if there is one. It needs Ray, and for AWS botocore; no cloud.

Ray checks what all clouds have in common, but passes the description of a machine on to the cloud,
so that a mistake there shows up only when the first worker is requested. This script checks
machines of AWS by botocore's description of the request, those of Azure by the parameters of Ray's
template, and those of Google by the fields that our files use. It also checks that the head is not
on spot, that Ray requires a token, that the file holds no secret, and that workers have a limit.
"""

from __future__ import annotations

import difflib
import functools
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PLACEHOLDER = "REPLACE-ME"
_SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{40,}\b|\bAccountKey="
    r"|(?i:(?:auth_token|access_key|account_key|password|private_key)\s*[=:]\s*[\w+/\"'-]{8})"
)


def _table(required: Iterable[str] = (), /, **properties: Any) -> dict[str, Any]:
    """Return the schema of a table without other keys."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _integer(minimum: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": minimum}


_STRING, _BOOLEAN, _OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
# The fields of a Google Cloud instance that our files use.
_GOOGLE = _table(
    ("machineType", "disks"),
    machineType=_STRING,
    disks=_list(
        _table(
            boot=_BOOLEAN,
            autoDelete=_BOOLEAN,
            type={"enum": ["PERSISTENT", "SCRATCH"]},
            initializeParams=_table(
                ("diskSizeGb", "sourceImage"),
                diskSizeGb=_integer(10),
                diskType=_STRING,
                sourceImage=_STRING,
            ),
        )
    ),
    guestAccelerators=_list(
        _table(
            ("acceleratorType", "acceleratorCount"),
            acceleratorType=_STRING,
            acceleratorCount=_integer(1),
        )
    ),
    serviceAccounts=_list(_table(("email", "scopes"), email=_STRING, scopes=_list(_STRING))),
    scheduling=_table(
        provisioningModel={"enum": ["SPOT", "STANDARD"]},
        instanceTerminationAction={"enum": ["DELETE", "STOP"]},
        onHostMaintenance={"enum": ["TERMINATE", "MIGRATE"]},
        automaticRestart=_BOOLEAN,
        preemptible=_BOOLEAN,
    ),
    networkInterfaces={"type": "array"},
    metadata=_OBJECT,
    labels=_OBJECT,
    tags=_OBJECT,
)


@dataclass(frozen=True)
class Mistake:
    """A mistake in a file."""

    file: str
    field: str  # dotted
    what: str  # the rule, and a hint

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: {self.what}"


def mistakes(text: str, name: str) -> list[Mistake]:
    """Return all mistakes in a file's text; ``name`` is the file's."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [Mistake(name, "file", f"is not YAML ({error})")]
    if not isinstance(config, dict):
        return [Mistake(name, "file", "holds no settings; start with a copy of ours")]
    found = [Mistake(name, *message) for message in _of_ray(config)]
    found += [Mistake(name, *message) for message in _of_all(text, config)]
    if found:  # the other rules rely on the form of the file
        return found
    rules = (_of_types, _of_machines, _of_commands)
    return [Mistake(name, *message) for rule in rules for message in rule(config)]


_Mistakes = Iterator[tuple[str, str]]  # field and message


def _of_ray(config: dict[str, Any]) -> _Mistakes:
    """Check by Ray's own rules."""
    provider = config.get("provider")
    cloud = provider.get("type") if isinstance(provider, dict) else None
    if cloud not in _SPOT:
        yield "provider.type", f"= {cloud!r}: use one of {', '.join(_SPOT)}"
        return
    head, types = config.get("head_node_type"), config.get("available_node_types")
    if not isinstance(types, dict):
        yield "available_node_types", "is missing: it describes the head and the workers"
        return
    if head not in types:
        yield "head_node_type", f"= {head!r}: is none of available_node_types ({', '.join(types)})"
        return
    try:
        # Ray prints that mounted files are not synced later; they need not be.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            validate_config(prepare_config(json.loads(json.dumps(config))))
    except jsonschema.ValidationError as error:
        yield from refused_by(error)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError) as error:
        yield "file", f"Ray refuses it: {error}"


def _of_all(text: str, config: dict[str, Any]) -> _Mistakes:
    """Check for secrets, also in comments, and placeholders."""
    for number, line in enumerate(text.splitlines(), 1):
        if _SECRET.search(line):
            field = line.partition(":")[0].strip(" -#") or "file"
            yield (
                field,
                f"line {number} looks like a secret: take it out, and use a file that is mounted "
                "(file_mounts) or the machine's own identity",
            )
    for field, value in _leaves(config):
        if PLACEHOLDER in str(value):
            yield field, f"= {value!r}: is not filled in; README.md says where to find it"


def _of_types(config: dict[str, Any]) -> _Mistakes:
    """Check that there is one head, not on spot and without workers, and a limit of workers."""
    head, types = config["head_node_type"], config["available_node_types"]
    spot = _SPOT[config["provider"]["type"]]
    for name, kind in types.items():
        place = f"available_node_types.{name}"
        for key in ("min_workers", "max_workers"):
            if key not in kind:
                yield f"{place}.{key}", "is missing: set it, rather than use Ray's default"
        where, is_spot = spot(kind["node_config"])
        if name == head:
            if is_spot:
                yield (
                    f"{place}.node_config.{where}",
                    "the head is on spot: when it is taken away, the cluster and the driver end; "
                    "put it on demand",
                )
            if kind["resources"].get("CPU") != 0:
                yield f"{place}.resources.CPU", "must be 0, so that no worker runs on the head"
            if kind.get("max_workers", 0) != 0:
                yield f"{place}.max_workers", "must be 0: there is one head"
    for key in ("max_workers", "idle_timeout_minutes"):
        if key not in config:
            yield key, "is missing: set it, rather than use Ray's default"


def _of_machines(config: dict[str, Any]) -> _Mistakes:
    """Check what the cloud would refuse."""
    check = _MACHINES[config["provider"]["type"]]
    for name, kind in config["available_node_types"].items():
        for field, message in check(kind["node_config"]):
            inside = ["available_node_types", name, "node_config", *filter(None, [field])]
            yield _dotted(inside), message


def _of_commands(config: dict[str, Any]) -> _Mistakes:
    """Check that Ray requires the token, has no CPUs on the head, and sends no statistics."""
    token = "/.ray/auth_token"
    if not any(remote.endswith(token) for remote in config.get("file_mounts", {})):
        yield "file_mounts", f"no file is mounted as ~{token}: nodes would have no token"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [line for line in config.get(key, []) if "ray start" in line]
        if not starts:
            yield key, "does not start Ray"
        for line in starts:
            if "RAY_AUTH_MODE=token" not in line:
                yield key, "starts Ray without RAY_AUTH_MODE=token: anyone could run code on it"
            if "RAY_USAGE_STATS_ENABLED=0" not in line:
                yield key, "starts Ray without RAY_USAGE_STATS_ENABLED=0"
            if key.startswith("head") and "RAY_JOB_STOP_WAIT_TIME_S=" not in line:
                rule = "starts the head without RAY_JOB_STOP_WAIT_TIME_S: ray job stop waits 3 s"
                yield key, rule
            if key.startswith("head") and "--num-cpus=0" not in line:
                yield key, "starts the head without --num-cpus=0: workers would run on it"
            if "--dashboard-host=0.0.0.0" in line:
                yield (
                    key,
                    "shows the dashboard to all: leave it on loopback, and use `ray dashboard`",
                )
    if not any("requirements.lock" in line for line in config.get("setup_commands", [])):
        yield "setup_commands", "do not install what requirements.lock says"


def _spot_of_aws(machine: Mapping[str, Any]) -> tuple[str, bool]:
    options = machine.get("InstanceMarketOptions") or {}
    return "InstanceMarketOptions", options.get("MarketType") == "spot"


def _spot_of_google(machine: Mapping[str, Any]) -> tuple[str, bool]:
    plan = machine.get("scheduling") or {}
    if not isinstance(plan, dict):
        return "scheduling", False
    return "scheduling", plan.get("provisioningModel") == "SPOT" or bool(plan.get("preemptible"))


def _spot_of_azure(machine: Mapping[str, Any]) -> tuple[str, bool]:
    parameters = machine.get("azure_arm_parameters") or {}
    return "azure_arm_parameters.priority", parameters.get("priority") in ("Spot", "Low")


_SPOT = {"aws": _spot_of_aws, "gcp": _spot_of_google, "azure": _spot_of_azure}


def _machine_of_aws(machine: Mapping[str, Any]) -> _Mistakes:
    """Check by botocore's description of the request that starts it."""
    from botocore.validate import ParamValidator

    request = {k: v for k, v in machine.items() if k != "SubnetIds"}
    request |= {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, _request_of_aws())
    for line in report.generate_report().splitlines():
        if found := re.match(r'Unknown parameter in (\S+): "(\w+)", must be one of: (.*)', line):
            inside, name, known = found.groups()
            field = name if inside == "input" else f"{inside}.{name}"
            yield field, _unknown(name, known.split(", "))
        else:
            found = re.search(r"for parameter ([^\s,]+)", line)
            yield found.group(1) if found else "", line
    if "ImageId" not in machine:
        yield "ImageId", "is missing: Ray's default has no driver for today's GPUs"
    if "IamInstanceProfile" not in machine:
        yield "IamInstanceProfile", "is missing: without it, access to the bucket needs keys"
    if "BlockDeviceMappings" not in machine:
        yield "BlockDeviceMappings", "is missing: the image's own disk has no room for torch"


@functools.cache
def _request_of_aws() -> Any:
    import botocore.session

    service = botocore.session.get_session().get_service_model("ec2")
    return service.operation_model("RunInstances").input_shape


def _machine_of_google(machine: Mapping[str, Any]) -> _Mistakes:
    for error in jsonschema.Draft7Validator(_GOOGLE).iter_errors(machine):
        yield from refused_by(error)
    if "guestAccelerators" in machine and "serviceAccounts" not in machine:
        yield "serviceAccounts", "is missing: without it, access to the bucket needs keys"


def _machine_of_azure(machine: Mapping[str, Any]) -> _Mistakes:
    """Check by the parameters of Ray's template."""
    folder = Path(ray.autoscaler.__file__).parent / "_private/_azure"
    template = json.loads((folder / "azure-vm-template.json").read_text())
    kinds = {"string": str, "int": int, "bool": bool, "object": dict, "array": list}
    known = {k: kinds[v["type"]] for k, v in template["parameters"].items() if v["type"] in kinds}
    known["availability_zone"] = str  # Ray's own
    for name in machine.keys() - {"azure_arm_parameters", "tags"}:
        yield name, _unknown(name, ["azure_arm_parameters", "tags"])
    parameters = machine.get("azure_arm_parameters", {})
    for name, value in parameters.items():
        field = f"azure_arm_parameters.{name}"
        if name not in known:
            yield field, _unknown(name, known)
        elif not isinstance(value, known[name]):
            yield field, f"= {value!r}: must be of type {known[name].__name__}"
    for name in {"vmSize", "osDiskSize"} - parameters.keys():
        yield f"azure_arm_parameters.{name}", "is missing"


_MACHINES = {"aws": _machine_of_aws, "gcp": _machine_of_google, "azure": _machine_of_azure}


def refused_by(error: jsonschema.ValidationError) -> _Mistakes:
    """Return what a schema refuses; unknown names one by one."""
    best = jsonschema.exceptions.best_match([error])
    if best.validator == "additionalProperties":
        known = best.schema.get("properties", {})
        patterns = best.schema.get("patternProperties", {})
        for name in best.instance.keys() - known.keys():
            if not any(re.search(pattern, name) for pattern in patterns):
                yield _dotted([*best.absolute_path, name]), _unknown(name, known)
    elif best.validator == "required":
        (name,) = re.findall(r"^'(.*)' is a required property$", best.message)
        yield _dotted([*best.absolute_path, name]), "is missing"
    else:
        yield _dotted(best.absolute_path), best.message


def _unknown(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"is not known; did you mean {close[0]}?" if close else "is not known; take it out"


def _leaves(value: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{field}.{index}")
    else:
        yield field, value


def _dotted(path: Iterable[object]) -> str:
    return ".".join(map(str, path)) or "file"


def main(files: list[str]) -> int:
    """Check files. Returns the exit status."""
    if not files:
        print("usage: python deploy/launcher/check.py FILE...", file=sys.stderr)
        return 2
    status = 0
    for file in files:
        try:
            found = mistakes(Path(file).read_text(), file)
        except (OSError, UnicodeDecodeError) as error:
            print(f"{file}: is not readable ({error})", file=sys.stderr)
            status = 2
            continue
        for mistake in found:
            print(mistake, file=sys.stderr)
            status = 2
        if not found:
            print(f"{file}: no mistakes found")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

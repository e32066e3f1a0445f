"""Checks files of Ray's cluster launcher before they cost money.

``python deploy/launcher/check.py FILE...`` tells of each mistake the file, the field, the rule and
the hint, and exits with status 2 if there is one. It needs Ray, and for AWS botocore; no cloud.

Ray checks what all clouds have in common; what a cloud is told of its machines is passed on unread,
and a mistake there would show only when the first worker is wanted. So here machines of AWS are
checked by botocore's own description of the request, those of Azure by the parameters of Ray's
template, and those of Google by the fields that we know. The rest are rules of ours: what runs the
driver is not taken away, nobody gets in without the token, nothing secret lies in the file, and
nothing grows without a limit.
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
# Of an instance of Google's, as far as our files go.
_GOOGLE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["machineType", "disks"],
    "properties": {
        "machineType": {"type": "string"},
        "disks": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "boot": {"type": "boolean"},
                    "autoDelete": {"type": "boolean"},
                    "type": {"enum": ["PERSISTENT", "SCRATCH"]},
                    "initializeParams": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["diskSizeGb", "sourceImage"],
                        "properties": {
                            "diskSizeGb": {"type": "integer", "minimum": 10},
                            "diskType": {"type": "string"},
                            "sourceImage": {"type": "string"},
                        },
                    },
                },
            },
        },
        "guestAccelerators": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["acceleratorType", "acceleratorCount"],
                "properties": {
                    "acceleratorType": {"type": "string"},
                    "acceleratorCount": {"type": "integer", "minimum": 1},
                },
            },
        },
        "serviceAccounts": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["email", "scopes"],
                "properties": {
                    "email": {"type": "string"},
                    "scopes": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
        "scheduling": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "provisioningModel": {"enum": ["SPOT", "STANDARD"]},
                "instanceTerminationAction": {"enum": ["DELETE", "STOP"]},
                "onHostMaintenance": {"enum": ["TERMINATE", "MIGRATE"]},
                "automaticRestart": {"type": "boolean"},
                "preemptible": {"type": "boolean"},
            },
        },
        "networkInterfaces": {"type": "array"},
        "metadata": {"type": "object"},
        "labels": {"type": "object"},
        "tags": {"type": "object"},
    },
}


@dataclass(frozen=True)
class Mistake:
    """What is wrong, and where.

    Attributes:
        file: its name.
        field: with dots between the names of what it lies in.
        what: the rule, and the hint.
    """

    file: str
    field: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: {self.what}"


def mistakes(text: str, name: str) -> list[Mistake]:
    """All that is wrong with a file.

    Args:
        text: its content.
        name: how it is called in messages.
    """
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [Mistake(name, "file", f"is no YAML ({error})")]
    if not isinstance(config, dict):
        return [Mistake(name, "file", "holds no settings; start with a copy of ours")]
    found = [Mistake(name, *message) for message in _of_ray(config)]
    found += [Mistake(name, *message) for message in _of_all(text, config)]
    if found:  # what follows takes the form of the file for granted
        return found
    rules = (_of_types, _of_machines, _of_commands)
    return [Mistake(name, *message) for rule in rules for message in rule(config)]


_Told = Iterator[tuple[str, str]]


def _of_ray(config: dict[str, Any]) -> _Told:
    """What Ray itself finds."""
    provider = config.get("provider")
    cloud = provider.get("type") if isinstance(provider, dict) else None
    if cloud not in _SPOT:
        yield "provider.type", f"= {cloud!r}: use one of {', '.join(_SPOT)}"
        return
    head, types = config.get("head_node_type"), config.get("available_node_types")
    if not isinstance(types, dict):
        yield "available_node_types", "is missing: the head and the workers are told there"
        return
    if head not in types:
        yield "head_node_type", f"= {head!r}: is none of available_node_types ({', '.join(types)})"
        return
    try:
        # Ray prints that files which are mounted are not synced later; they need not be.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            validate_config(prepare_config(json.loads(json.dumps(config))))
    except jsonschema.ValidationError as error:
        yield from told_of(error)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError) as error:
        yield "file", f"Ray refuses it: {error}"


def _of_all(text: str, config: dict[str, Any]) -> _Told:
    """Secrets anywhere, comments too, and what was not filled in."""
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
            yield field, f"= {value!r}: is not filled in; README.md tells where to find it"


def _of_types(config: dict[str, Any]) -> _Told:
    """The head stays, works for nobody and is one; workers have a limit."""
    head, types = config["head_node_type"], config["available_node_types"]
    spot = _SPOT[config["provider"]["type"]]
    for name, kind in types.items():
        place = f"available_node_types.{name}"
        for key in ("min_workers", "max_workers"):
            if key not in kind:
                yield f"{place}.{key}", "is missing: without it Ray's default holds; say it"
        where, is_spot = spot(kind["node_config"])
        if name == head:
            if is_spot:
                yield (
                    f"{place}.node_config.{where}",
                    "the head is on spot: when it is taken away the cluster and the driver are "
                    "gone, and nobody starts them again; put it on demand",
                )
            if kind["resources"].get("CPU") != 0:
                yield f"{place}.resources.CPU", "must be 0, so that no worker runs on the head"
            if kind.get("max_workers", 0) != 0:
                yield f"{place}.max_workers", "must be 0: there is one head"
    for key in ("max_workers", "idle_timeout_minutes"):
        if key not in config:
            yield key, "is missing: without it Ray's default holds; say it"


def _of_machines(config: dict[str, Any]) -> _Told:
    """What the cloud would refuse, or not understand."""
    check = _MACHINES[config["provider"]["type"]]
    for name, kind in config["available_node_types"].items():
        for field, message in check(kind["node_config"]):
            yield (
                _dotted(["available_node_types", name, "node_config", *filter(None, [field])]),
                message,
            )


def _of_commands(config: dict[str, Any]) -> _Told:
    """Ray starts with the token, on the head without CPUs, and tells nobody of its use."""
    token = "/.ray/auth_token"
    if not any(remote.endswith(token) for remote in config.get("file_mounts", {})):
        yield "file_mounts", f"no file is mounted as ~{token}: nodes would not know the token"
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
                yield (
                    key,
                    "starts the head without RAY_JOB_STOP_WAIT_TIME_S: ray job stop waits 3 s",
                )
            if key.startswith("head") and "--num-cpus=0" not in line:
                yield key, "starts the head without --num-cpus=0: workers would run on it"
            if "--dashboard-host=0.0.0.0" in line:
                yield key, "shows the dashboard to all: leave it on loopback, use `ray dashboard`"
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


def _machine_of_aws(machine: Mapping[str, Any]) -> _Told:
    """By botocore's description of the request that starts it."""
    from botocore.validate import ParamValidator

    request = {k: v for k, v in machine.items() if k != "SubnetIds"} | {
        "MinCount": 1,
        "MaxCount": 1,
    }
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
        yield "IamInstanceProfile", "is missing: without it, reaching the bucket would take keys"
    if "BlockDeviceMappings" not in machine:
        yield "BlockDeviceMappings", "is missing: the image's own disk has no room for torch"


@functools.cache
def _request_of_aws() -> Any:
    import botocore.session

    service = botocore.session.get_session().get_service_model("ec2")
    return service.operation_model("RunInstances").input_shape


def _machine_of_google(machine: Mapping[str, Any]) -> _Told:
    for error in jsonschema.Draft7Validator(_GOOGLE).iter_errors(machine):
        yield from told_of(error)
    if "guestAccelerators" in machine and "serviceAccounts" not in machine:
        yield "serviceAccounts", "is missing: without it, reaching the bucket would take keys"


def _machine_of_azure(machine: Mapping[str, Any]) -> _Told:
    """By the parameters of the template with which Ray starts it."""
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


def told_of(error: jsonschema.ValidationError) -> _Told:
    """Field and rule of what a schema refuses; names that it does not know one by one."""
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
            print(f"{file}: can't be read ({error})", file=sys.stderr)
            status = 2
            continue
        for mistake in found:
            print(mistake, file=sys.stderr)
            status = 2
        if not found:
            print(f"{file}: nothing is wrong with it that can be seen from here")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""SkyPilot's task file, as shipped and with mistakes."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.launcher.check import refused_by
from support import TOOLS

FILE = Path(__file__).resolve().parents[2] / "deploy/skypilot/train.yaml"
# Port of SkyPilot's own Ray on the same machines.
TAKEN = {"6380", "8266", "52365"}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Return SkyPilot's schemas of a task and of its ``resources``."""
    folder = TOOLS / "skypilot"
    if not (folder / "sky").exists():
        reason = "SkyPilot is not in .tools (make setup-system)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    dump = Path(__file__).with_name("skypilot_schemas.py")
    done = subprocess.run(
        [sys.executable, dump, folder], capture_output=True, text=True, check=True, timeout=300
    )
    task, resources = json.loads(done.stdout)
    # SkyPilot leaves it open for plugins; then a misspelled key would be ignored.
    for kind in resources["properties"]["job_recovery"]["anyOf"]:
        kind["additionalProperties"] = False
    return {"": task, "resources": resources}


def message(task: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Return errors of a task by SkyPilot's schemas and by our rules."""
    found = []
    for place, schema in schemas.items():
        part = task.get(place, {}) if place else {k: v for k, v in task.items() if v is not None}
        for error in jsonschema.Draft7Validator(schema).iter_errors(part):
            found += [
                ".".join(filter(None, [place, at])) + f": {rule}" for at, rule in refused_by(error)
            ]
    if found:
        return found
    resources, run = task.get("resources", {}), task.get("run", "")
    if "num_nodes" not in task:
        found.append("num_nodes: is missing")
    if resources.get("use_spot") and 75 not in resources["job_recovery"]["recover_on_exit_codes"]:
        found.append("resources.job_recovery.recover_on_exit_codes: status 75 must be tried again")
    if task.get("secrets") != {"RAY_AUTH_TOKEN": None}:
        found.append(
            "secrets.RAY_AUTH_TOKEN: must be null, so that it is given on the command line"
        )
    if "RAY_AUTH_MODE=token" not in run:
        found.append("run: starts Ray without RAY_AUTH_MODE=token")
    if "ray stop" in run:
        found.append("run: `ray stop` would end SkyPilot's own Ray")
    if "--dashboard-agent-listen-port=" not in run:
        found.append("run: the dashboard's agent would take the port of SkyPilot's (52365)")
    found += [f"run: port {port} is SkyPilot's" for port in TAKEN & set(re.findall(r"\d+", run))]
    return found


def task() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_shipped_file_is_valid(schemas):
    assert message(task(), schemas) == []
    assert task()["resources"]["use_spot"] is True
    assert task()["envs"]["RUN_DIR"] is None  # SkyPilot does not start without it


def edited(*path: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Set keys of the mapping at a path, or delete those given as ``...``."""

    def edit(found: dict[str, Any]) -> None:
        for name in path:
            found = found[name]
        for key, value in values.items():
            if value is ...:
                del found[key]
            else:
                found[key] = value

    return edit


def replaced(key: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def edit(found: dict[str, Any]) -> None:
        assert old in found[key]
        found[key] = found[key].replace(old, new)

    return edit


SEEDED = {
    "a misspelled field": (
        edited(num_node=2), "num_node: is not known; did you mean num_nodes?",
    ),
    "a misspelled resource": (
        edited("resources", use_spots=True),
        "resources.use_spots: is not known; did you mean use_spot?",
    ),
    "a misspelled recovery": (
        edited("resources", "job_recovery", recover_on_exit_code=[75]),
        "resources.job_recovery.recover_on_exit_code: is not known; did you mean recover_on",
    ),
    "a wrong type": (edited(num_nodes="two"), "num_nodes: 'two' is not of type 'integer'"),
    "a wrong type of a resource": (
        edited("resources", use_spot="yes"), "resources.use_spot: 'yes' is not of type 'boolean'",
    ),
    "an invalid status": (
        edited("resources", "job_recovery", recover_on_exit_codes=[750]),
        "resources.job_recovery.recover_on_exit_codes.0: 750 is greater than the maximum of 255",
    ),
    "an invalid name": (
        edited("envs", **{"RUN-DIR": "x"}), "envs.RUN-DIR: is not known",
    ),
    "a missing number of machines": (edited(num_nodes=...), "num_nodes: is missing"),
    "a status that is not retried": (
        edited("resources", "job_recovery", recover_on_exit_codes=[1]),
        "resources.job_recovery.recover_on_exit_codes: status 75 must be tried again",
    ),
    "a secret in the file": (
        edited("secrets", RAY_AUTH_TOKEN="0123456789abcdef" * 4),
        "secrets.RAY_AUTH_TOKEN: must be null",
    ),
    "no token mode": (
        replaced("run", "RAY_AUTH_MODE=token", ""), "run: starts Ray without RAY_AUTH_MODE=token",
    ),
    "a stop of SkyPilot's Ray": (
        replaced("run", "kill -KILL $ray", "ray stop"),
        "run: `ray stop` would end SkyPilot's own Ray",
    ),
    "SkyPilot's port": (
        replaced("run", "--port=6379", "--port=6380"), "run: port 6380 is SkyPilot's",
    ),
    "SkyPilot's port of agents": (
        replaced("run", "--dashboard-agent-listen-port=52366 ", ""), "run: the dashboard's agent",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SEEDED)
def test_mistake_is_reported(mistake, schemas):
    edit, expected = SEEDED[mistake]
    wrong = copy.deepcopy(task())
    edit(wrong)
    found = message(wrong, schemas)
    assert any(line.startswith(expected) for line in found), found


@pytest.mark.parametrize("key", ["setup", "run"])
def test_scripts_pass_shellcheck(key, tmp_path):
    script = tmp_path / key
    script.write_text("#!/bin/bash\n" + task()[key])
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([program, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

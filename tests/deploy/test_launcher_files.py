"""Files of Ray's cluster launcher, as shipped and with mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.launcher.check import _SPOT, mistakes

FOLDER = Path(__file__).resolve().parents[2] / "deploy/launcher"
CLOUDS = ["aws", "gcp", "azure"]
# Values that a user fills in, see README.md.
FILLED = {
    "ami-0123456789abcdef0": r"(?<=ImageId: )REPLACE-ME",
    "projects/mine/global/images/gpu": r"(?<=sourceImage: )REPLACE-ME",
    "my-project": r"REPLACE-ME",
}


def filled(cloud: str) -> str:
    text = (FOLDER / f"{cloud}.yaml").read_text()
    for value, pattern in FILLED.items():
        text = re.sub(pattern, value, text)
    return text


def message(text: str, cloud: str) -> list[str]:
    return [str(mistake) for mistake in mistakes(text, f"{cloud}.yaml")]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_filled_in_file_is_valid(cloud):
    text = filled(cloud)
    assert message(text, cloud) == []
    config = yaml.safe_load(text)
    on_spot = {
        name: _SPOT[cloud](kind["node_config"])[1]
        for name, kind in config["available_node_types"].items()
    }
    assert on_spot == {"head": False, "worker": True}
    for mounted in config["file_mounts"].values():
        assert mounted.startswith("~") or (FOLDER.parents[1] / mounted).exists(), mounted


# Text, replacement, cloud, and the expected message.
SEEDED = {
    "a misspelled field": (
        "aws", "idle_timeout_minutes", "idle_timeout_minute",
        "aws.yaml: idle_timeout_minute: is not known; did you mean idle_timeout_minutes?",
    ),
    "a misspelled field of a machine on AWS": (
        "aws", "MetadataOptions", "MetaDataOptions",
        "aws.yaml: available_node_types.head.node_config.MetaDataOptions: "
        "is not known; did you mean MetadataOptions?",
    ),
    "a misspelled field of a disk on AWS": (
        "aws", "VolumeSize: 200", "VolumeSizes: 200",
        "aws.yaml: available_node_types.worker.node_config.BlockDeviceMappings[0].Ebs.VolumeSizes: "
        "is not known; did you mean VolumeSize?",
    ),
    "a misspelled field of a machine on Google Cloud": (
        "gcp", "provisioningModel", "provisionModel",
        "gcp.yaml: available_node_types.worker.node_config.scheduling.provisionModel: "
        "is not known; did you mean provisioningModel?",
    ),
    "a misspelled field of a machine on Azure": (
        "azure", "osDiskSize: 200", "osDiskSizeGb: 200",
        "azure.yaml: available_node_types.worker.node_config.azure_arm_parameters.osDiskSizeGb: "
        "is not known; did you mean osDiskSize?",
    ),
    "a wrong type": (
        "gcp", "\nmax_workers: 8", "\nmax_workers: eight",
        "gcp.yaml: max_workers: 'eight' is not of type 'integer'",
    ),
    "a wrong type of a disk's size on AWS": (
        "aws", "VolumeSize: 200", "VolumeSize: 200GB",
        "available_node_types.worker.node_config.BlockDeviceMappings[0].Ebs.VolumeSize: ",
    ),
    "a wrong type of a disk's size on Google Cloud": (
        "gcp", "diskSizeGb: 200", "diskSizeGb: '200'",
        "available_node_types.worker.node_config.disks.0.initializeParams.diskSizeGb: "
        "'200' is not of type 'integer'",
    ),
    "a wrong type of a disk's size on Azure": (
        "azure", "osDiskSize: 200", "osDiskSize: large",
        "azure_arm_parameters.osDiskSize: = 'large': must be of type int",
    ),
    "no head": (
        "aws", "head_node_type: head\n", "", "aws.yaml: head_node_type: = None: is none of",
    ),
    "another head": (
        "azure", "head_node_type: head", "head_node_type: heads",
        "azure.yaml: head_node_type: = 'heads': is none of available_node_types (head, worker)",
    ),
    "no image": (
        "aws", "      ImageId: ami-0123456789abcdef0", "",
        "available_node_types.head.node_config.ImageId: is missing",
    ),
    "the head on spot, on AWS": (
        "aws", "InstanceType: m6i.xlarge",
        "InstanceType: m6i.xlarge\n      InstanceMarketOptions: {MarketType: spot}",
        "available_node_types.head.node_config.InstanceMarketOptions: the head is on spot",
    ),
    "the head on spot, on Google Cloud": (
        "gcp", "machineType: n2-standard-4",
        "machineType: n2-standard-4\n      scheduling: {provisioningModel: SPOT}",
        "available_node_types.head.node_config.scheduling: the head is on spot",
    ),
    "the head on spot, on Azure": (
        "azure", "osDiskSize: 100", "osDiskSize: 100\n        priority: Spot",
        "available_node_types.head.node_config.azure_arm_parameters.priority: the head is on spot",
    ),
    "work on the head": (
        "gcp", "resources: {CPU: 0, GPU: 0}", "resources: {CPU: 4, GPU: 0}",
        "available_node_types.head.resources.CPU: must be 0",
    ),
    "work on the head by Ray's own count": (
        "gcp", "--num-cpus=0 ", "", "gcp.yaml: head_start_ray_commands: starts the head without",
    ),
    "no limit of workers": (
        "azure", "    max_workers: 8\n", "",
        "azure.yaml: available_node_types.worker.max_workers: is missing",
    ),
    "a limit below the minimum": (
        "aws", "    min_workers: 0\n    max_workers: 8", "    min_workers: 9\n    max_workers: 9",
        "aws.yaml: file: Ray refuses it: The specified global `max_workers` is smaller",
    ),
    "no token mode": (
        "aws", "RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PATH", "PATH",
        "aws.yaml: head_start_ray_commands: starts Ray without RAY_AUTH_MODE=token",
    ),
    "no token": (
        "gcp", "  /home/ubuntu/.ray/auth_token: ~/.ray/auth_token\n", "",
        "gcp.yaml: file_mounts: no file is mounted as ~/.ray/auth_token",
    ),
    "usage statistics": (
        "azure", "RAY_USAGE_STATS_ENABLED=0 PATH", "PATH",
        "azure.yaml: head_start_ray_commands: starts Ray without RAY_USAGE_STATS_ENABLED=0",
    ),
    "a public dashboard": (
        "aws", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0",
        "aws.yaml: head_start_ray_commands: shows the dashboard to all",
    ),
    "untested versions": (
        "aws", "-r ~/gatdist/requirements.lock", "gatdist",
        "aws.yaml: setup_commands: do not install what requirements.lock says",
    ),
    "a job is killed before its checkpoint": (
        "gcp", "RAY_JOB_STOP_WAIT_TIME_S=120", "",
        "gcp.yaml: head_start_ray_commands: starts the head without RAY_JOB_STOP_WAIT_TIME_S",
    ),
    "a token in the file": (
        "azure", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=" + "0123456789abcdef" * 4,
        "looks like a secret",
    ),
    "a key in a comment": (
        "aws", "auth:", "# AKIA" + "ABCDEFGHIJKLMNOP\nauth:", "looks like a secret",
    ),
    "an account key": (
        "azure", "provider:", "provider:\n  account_key: 'c2VjcmV0c2VjcmV0'",
        "azure.yaml: account_key: line 9 looks like a secret",
    ),
    "another cloud": (
        "gcp", "type: gcp", "type: local",
        "gcp.yaml: provider.type: = 'local': use one of aws, gcp, azure",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SEEDED)
def test_mistake_is_reported(mistake):
    cloud, good, bad, expected = SEEDED[mistake]
    text = filled(cloud)
    assert good in text
    found = message(text.replace(good, bad, 1), cloud)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("cloud", CLOUDS)
def test_commands_pass_shellcheck(cloud, tmp_path):
    """Each is a line of a script for an interactive bash."""
    shellcheck = Path(sys.executable).parent / "shellcheck"
    config = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    keys = ["setup_commands", "head_setup_commands"]
    keys += ["head_start_ray_commands", "worker_start_ray_commands"]
    script = tmp_path / f"{cloud}.sh"
    script.write_text("#!/bin/bash\n" + "\n".join(line for key in keys for line in config[key]))
    # Variables that Ray sets, a file that exists on the machine only, and a line for that file.
    excluded = "--exclude=SC2154,SC1090,SC2016"
    done = subprocess.run([shellcheck, excluded, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_command_names_what_to_fill_in():
    done = subprocess.run(
        [sys.executable, FOLDER / "check.py", FOLDER / "gcp.yaml", FOLDER / "none.yaml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "gcp.yaml: provider.project_id: = 'REPLACE-ME': " in done.stderr
    assert "none.yaml: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "provider: {type: aws}"])
def test_other_files_are_rejected(text):
    assert message(text, "aws")

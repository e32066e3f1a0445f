"""Ray's autoscaler adds the hosts that a run requests, and removes them after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import free_port, ray_head

pytestmark = pytest.mark.hosts

HEAD = "f" * 51 + "00000"
# Hosts are further Ray processes on this machine: the provider is a fake, the autoscaler is real.
CLUSTER: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 3,
    "idle_timeout_minutes": 0.05,
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": HEAD,
    },
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    **{
        f"{what}_commands": []
        for what in (
            *("initialization", "setup", "head_setup", "worker_setup"),
            *("head_start_ray", "worker_start_ray"),
        )
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
}
PROGRAM = """
import sys, time
from pathlib import Path
from gatdist.cluster.connection import connected
import ray
from gatdist.cluster.demand import Demand
from gatdist.cluster.nodes import may_grow

def wait_for(cpus):
    deadline = time.monotonic() + 40
    while (there := ray.cluster_resources().get("CPU", 0)) != cpus:
        if time.monotonic() > deadline:
            sys.exit(f"{there} CPUs, not {cpus}")
        time.sleep(0.2)
    print(cpus, flush=True)

with connected(sys.argv[1], Path("log")):
    assert may_grow()
    wait_for(0)
    with Demand({"CPU": 1.0}, {}, 1, at_once=True):
        wait_for(1)
        with Demand({"CPU": 1.0}, {}, 1, at_once=True):
            wait_for(2)
        wait_for(1)
    wait_for(0)
"""


def test_hosts_are_added_for_each_run_and_removed_after_it(tmp_path: Path) -> None:
    file, port = tmp_path / "cluster.yaml", free_port()
    provider = CLUSTER["provider"] | {"gcs_address": f"127.0.0.1:{port}"}
    file.write_text(yaml.safe_dump(CLUSTER | {"provider": provider}))
    env = {"RAY_AUTH_MODE": "disabled", "RAY_enable_autoscaler_v2": "1"}
    env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    head = {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    options = "--num-cpus=0", "--object-store-memory=80000000", f"--autoscaling-config={file}"
    with ray_head(tmp_path, *options, env=env | head, port=port) as address:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, address],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | env,
            cwd=tmp_path,
        )
    assert done.stdout.split() == ["0", "1", "2", "1", "0"], done.stderr

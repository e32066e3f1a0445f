"""Workers of one host: their CPUs near their GPUs, and what each reports."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gatdist.common.host import Place, format_cpus, parse_cpus, plan_places
from gatdist.config import load_config
from gatdist.parallel.places import Device, places
from gatdist.storage import Store
from gatdist.training.loop import run
from support import spawn

GPUS = [f"0000:{bus:02x}:00.0" for bus in range(8)]
SETTINGS = [
    "run.total_samples=8",
    "run.global_batch=8",
    "model.generator.width=8",
    "model.discriminator.width=8",
    "monitor.tensorboard=false",
    "evaluate.metrics=[]",
    "run.reduction=canonical",  # DistributedDataParallel would import torch's compiler 8 times
    "run.virtual_workers=8",
    "cluster.workers=8",
    "cluster.bind_cpus=true",
]


def sysfs(root: Path, nodes: list[str], siblings: int = 0, gpus: list[int] | None = None) -> Path:
    """Write a tree of a host.

    Args:
        nodes: CPUs of each NUMA node.
        siblings: distance between the two threads of a core; 0 for one thread per core.
        gpus: NUMA node of each of ``GPUS``.
    """
    for node, cpus in enumerate(nodes):
        write(root / f"devices/system/node/node{node}/cpulist", cpus)
        for cpu in parse_cpus(cpus) if siblings else ():
            first = cpu % siblings
            file = root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            write(file, f"{first},{first + siblings}")
    for gpu, node in zip(GPUS, gpus or (), strict=False):
        write(root / f"bus/pci/devices/{gpu}/numa_node", str(node))
    return root


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(f"{text}\n")


def test_eight_gpus_on_two_nodes_get_the_cores_of_their_node(tmp_path):
    """The GPUs' order is not that of the nodes; hyperthreads stay with their core."""
    sys = sysfs(tmp_path, ["0-7,16-23", "8-15,24-31"], 16, gpus=[1, 1, 0, 0, 1, 0, 0, 1])
    plan = plan_places(GPUS, set(range(32)), sys)
    assert [place.numa_node for place in plan] == [1, 1, 0, 0, 1, 0, 0, 1]
    assert [format_cpus(place.cpus) for place in plan[:4]] == [
        *("8-9,24-25", "10-11,26-27", "0-1,16-17", "2-3,18-19")
    ]
    used = [cpu for place in plan for cpu in place.cpus]
    assert sorted(used) == list(range(32)), "each CPU belongs to one worker"


def test_only_allowed_cpus_are_divided(tmp_path):
    sys = sysfs(tmp_path, ["0-3", "4-7"], gpus=[0, 0, 1])
    plan = plan_places(GPUS[:3], {0, 1, 2, 6}, sys)
    assert [place.cpus for place in plan] == [(0,), (1, 2), (6,)]


@pytest.mark.parametrize("node", [-1, 5])
def test_unknown_node_shares_all_cpus(tmp_path, node):
    """Virtual machines report −1; a container may lack the GPU's node."""
    sys = sysfs(tmp_path, ["0-3"], gpus=[node, node])
    assert plan_places(GPUS[:2], set(range(4)), sys) == [Place(None, (0, 1)), Place(None, (2, 3))]
    assert plan_places(GPUS[:2], set(range(4)), tmp_path / "absent")[1].cpus == (2, 3)


def test_workers_whose_node_is_not_allowed_share_what_is(tmp_path):
    sys = sysfs(tmp_path, ["0-3", "4-7"], gpus=[1, -1])
    places = plan_places(GPUS[:2], set(range(4)), sys)
    assert places == [Place(None, (0, 1)), Place(None, (2, 3))]


def test_workers_share_cores_where_there_are_too_few(tmp_path):
    sys = sysfs(tmp_path, ["0-1", "2-3"], gpus=[0] * 4)
    assert {place.cpus for place in plan_places(GPUS[:4], {0, 1, 2, 3}, sys)} == {(0, 1)}


def test_workers_without_gpus_are_spread_over_the_nodes(tmp_path):
    sys = sysfs(tmp_path, ["0-3", "4-7"])
    plan = plan_places([""] * 4, set(range(8)), sys)
    assert plan == [Place(0, (0, 1)), Place(0, (2, 3)), Place(1, (4, 5)), Place(1, (6, 7))]


def test_lists_of_cpus():
    assert parse_cpus("0-2, 5,7-7\n") == {0, 1, 2, 5, 7}
    assert parse_cpus("") == set()
    assert format_cpus({7, 0, 1, 2, 5}) == "0-2,5,7"


def of_one_host(comm, sys, run_dir):
    """Report the places as on a host with 8 GPUs, then train there; runs in each process."""
    cpus = os.sched_getaffinity(0)

    def describe(_):
        return Device(f"cuda:{comm.rank}", "a GPU", GPUS[comm.rank])

    with places(comm, binds=True, describe=describe, sys=sys) as found:
        inside = os.sched_getaffinity(0)
    assert os.sched_getaffinity(0) == cpus
    run(load_config("ring", SETTINGS), comm, Store(run_dir))
    assert os.sched_getaffinity(0) == cpus
    return found, inside


def test_eight_workers_of_a_host_report_device_and_cpus(tmp_path):
    """Each is bound to its share of this machine's CPUs, as of a host with a GPU per worker."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("two CPUs are needed for two nodes")
    halves = [cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]]
    node = [0, 1, 0, 1, 1, 0, 0, 1]
    sys = sysfs(tmp_path / "sys", [format_cpus(half) for half in halves], gpus=node)
    results = spawn(8, of_one_host, sys, str(tmp_path / "run"))
    assert all(found == results[0][0] for found, _ in results)
    for rank, (found, inside) in enumerate(results):
        mine = found[rank]
        assert (mine["device"], mine["numa_node"]) == (f"cuda:{rank}", node[rank])
        assert parse_cpus(mine["cpus"]) == inside
        assert inside <= set(halves[node[rank]])
    (attempt,) = (tmp_path / "run/attempts.jsonl").read_text().splitlines()
    workers = json.loads(attempt)["workers"]
    assert [worker["device"] for worker in workers] == ["cpu"] * 8
    assert set().union(*(parse_cpus(worker["cpus"]) for worker in workers)) == set(cpus)


def of_divided_host(comm, sys):
    """Bind this process as ``srun --cpu-bind=cores`` does."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[comm.rank]})
    with places(comm, binds=True, sys=sys) as found:
        return found[comm.rank]["cpus"], os.sched_getaffinity(0)


def test_cpus_that_the_launcher_divided_are_left_alone(tmp_path):
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("two CPUs are needed to divide them")
    sys = sysfs(tmp_path, [format_cpus(cpus)])
    for cpu, found in zip(cpus, spawn(2, of_divided_host, sys), strict=False):
        assert found == (str(cpu), {cpu})

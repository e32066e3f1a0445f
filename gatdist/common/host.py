"""The workers of one host, and the CPUs near each worker's GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import NamedTuple

SYS = Path("/sys")


class Place(NamedTuple):
    """The CPUs that a worker should use."""

    numa_node: int | None  # None if unknown, or if the worker uses all of them
    cpus: tuple[int, ...]


def plan_places(gpus: Sequence[str], allowed: Set[int], sys: Path = SYS) -> list[Place]:
    """Divide CPUs among the workers of one host, each on the NUMA node of its GPU.

    Workers of one node get different physical cores, as equally many as possible; if there are
    fewer cores than workers, all of them share all cores of the node.

    Args:
        gpus: PCI address of each worker's GPU, such as ``0000:3b:00.0``; "" without one. Workers
            without a GPU are spread over the nodes in order.
        allowed: CPUs that the workers may use.
        sys: Root of sysfs.
    """
    nodes = {node: cpus & allowed for node, cpus in _nodes(sys).items() if cpus & allowed}
    found = [_node_of(gpu, sys) for gpu in gpus]
    of_workers = [node if node in nodes else None for node in found]
    if not any(gpus) and nodes:
        names = sorted(nodes)
        of_workers = [names[i * len(names) // len(gpus)] for i in range(len(gpus))]
    places = []
    for worker, node in enumerate(of_workers):
        pool = nodes[node] if node is not None else set(allowed)
        sharing = [i for i, other in enumerate(of_workers) if other == node]
        mine = _share(_cores(pool, sys), sharing.index(worker), len(sharing))
        places.append(Place(node, tuple(sorted(mine))))
    return places


def _share(cores: Sequence[Set[int]], index: int, count: int) -> set[int]:
    """Return the CPUs of part ``index`` of ``count`` of the cores; all if there are too few."""
    if len(cores) < count:
        return set().union(*cores)
    first, last = index * len(cores) // count, (index + 1) * len(cores) // count
    return set().union(*cores[first:last])


def _nodes(sys: Path) -> dict[int, set[int]]:
    """Return the CPUs of each NUMA node."""
    found = {}
    for folder in (sys / "devices/system/node").glob("node[0-9]*"):
        cpus = parse_cpus(_text(folder / "cpulist"))
        if cpus:
            found[int(folder.name.removeprefix("node"))] = cpus
    return found


def _node_of(gpu: str, sys: Path) -> int | None:
    """Return the NUMA node of a PCI device; None if it is unknown (virtual machines say −1)."""
    text = _text(sys / "bus/pci/devices" / gpu / "numa_node") if gpu else ""
    return int(text) if text.isdecimal() else None


def _cores(cpus: Set[int], sys: Path) -> list[set[int]]:
    """Group CPUs by physical core, in the order of their first CPU."""
    cores: list[set[int]] = []
    left = set(cpus)
    for cpu in sorted(cpus):
        if cpu in left:
            file = sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            cores.append((parse_cpus(_text(file)) | {cpu}) & left)
            left -= cores[-1]
    return cores


def parse_cpus(text: str) -> set[int]:
    """Return the numbers in a list of the kernel, such as ``0-3,8``."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def format_cpus(cpus: Iterable[int]) -> str:
    """Return numbers in the kernel's format, such as ``0-3,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1][1:] = [cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

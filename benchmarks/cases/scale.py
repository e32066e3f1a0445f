"""What a run with thousands of workers costs, simulated on one machine.

The mailbox is Ray's actor of a real run, which receives the messages of simulated hosts. Worker 0
of eight writes its share of a checkpoint in a process of its own. Each row has what it took before
(measured on 26 November), and the target.
"""

from __future__ import annotations

import atexit
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import ray
import torch

from benchmarks.case import parser, positive, save
from gatdist.cluster import policies, watch
from gatdist.cluster.bridge import Bridge, Mailbox
from gatdist.config import load_config
from gatdist.data.reading.host_cache import HostCache, block_key
from gatdist.monitor.timing import WorkerTimes, find_stragglers
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints, layout_of_each
from gatdist.storage import Store
from gatdist.training.integrity import require_equal_replicas
from gatdist.training.plan import check

WORKERS, WORKERS_PER_HOST = 4096, 8
# Parameters of both networks, of which half are the generator's, in tensors of a million.
PARAMETERS, IN_TENSOR = 10**9, 10**6
BLOCKS = 2**19
CPU = torch.device("cpu")


class Row(NamedTuple):
    """A measurement: in ``unit``, smaller is better."""

    what: str
    measure: Callable[[], float]
    unit: str
    before: str
    target: float


def main() -> None:
    arguments = parser("scale", __doc__)
    arguments.add_argument("--times", type=positive, default=5)
    given = arguments.parse_args()
    found = []
    with _ray():
        for row in ROWS:
            values = [row.measure() for _ in range(given.times)]
            one = {name: getattr(row, name) for name in ("what", "unit", "before", "target")}
            found.append(one | {"values": values, "median": median(values)})
            shown = f"{median(values):.3g} {row.unit}, target {row.target:g}, before {row.before}"
            print(f"{row.what}: {shown}", flush=True)
    save(given.out, {"workers": WORKERS, "workers_per_host": WORKERS_PER_HOST, "rows": found})


@contextmanager
def _ray() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        "local", num_cpus=1, include_dashboard=False, object_store_memory=10**8, log_to_driver=False
    )
    try:
        yield
    finally:
        ray.shutdown()


class _Measured(Mailbox):
    def cpu_s(self) -> float:
        return time.process_time()


def _heartbeats(host: int) -> list[dict[str, Any]]:
    where = {"host": f"host-{host}", "node": f"{host:056x}", "pid": 1, "phase": "discriminator"}
    step = {"step": 1000, "num_phases": 5000, "still_s": 0.1, "lengthy": False, "age_s": 0.2}
    seen = {"samples_seen": 10**6, "is_saved": False}
    ranks = range(host * WORKERS_PER_HOST, (host + 1) * WORKERS_PER_HOST)
    return [where | step | seen | {"rank": rank, "actor": f"{rank:032x}"} for rank in ranks]


def control_plane() -> float:
    """Return the share of a core that the driver's and the mailbox's processes take."""
    actor = ray.remote(num_cpus=0)(cast(Any, _Measured)).remote()
    bridge = Bridge(actor).begin(1)
    bridge.report("enroll", range(1, WORKERS + 1), [f"{rank:032x}" for rank in range(WORKERS)])
    hosts = range(WORKERS // WORKERS_PER_HOST)
    messages = [_heartbeats(host) for host in hosts]

    def send() -> None:
        sent = [actor.report.remote(1, "heartbeats_of_host", beats) for beats in messages]
        ray.get(sent)

    send()  # the first ones cost more
    before = ray.get(actor.cpu_s.remote())
    send()
    send()
    of_messages = (ray.get(actor.cpu_s.remote()) - before) / (2 * len(hosts))
    looks, before, mine = 5, ray.get(actor.cpu_s.remote()), time.process_time()
    for _ in range(looks):
        update = bridge.take()
        policies.straggler_report(update.heartbeats, 15.0)
        watch.suspects(update)
    of_looks = (ray.get(actor.cpu_s.remote()) - before + time.process_time() - mine) / looks
    ray.kill(actor)
    per_s = len(hosts) / policies.heartbeat_interval_s(len(hosts))
    return per_s * of_messages + of_looks / policies.look_interval_s(WORKERS)


class _AllEqual(LocalCommunicator):
    """One of many workers with the same state."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.world_size = WORKERS

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(WORKERS, *tensor.shape).clone()


def replicas() -> float:
    tensors = {f"tensor-{number}": torch.zeros(100) for number in range(1000)}
    return _timed(lambda: require_equal_replicas(tensors, _AllEqual()))


def stragglers() -> float:
    draw = random.Random(0)
    times = []
    for rank in range(WORKERS):
        late_s = draw.random() * 0.01 + (rank % 100 == 0)
        phases = {f"time/{name}_s": 0.2 + late_s / 4 for name in ("data", "generator", "optimizer")}
        seconds = {"time/step_s": 2.0, "time/communication_s": 1.2 - late_s, **phases}
        times.append(WorkerTimes(f"host-{rank // WORKERS_PER_HOST}", seconds, 8))
    return _timed(lambda: find_stragglers(times, 1.5))


def sizes() -> float:
    return _timed(load_config("digits", _ELASTIC).fitting_workers)


def checks() -> float:
    config = load_config("digits", _ELASTIC)
    return _timed(lambda: check(config, "/nowhere/run"))


def memory_of_checkpoint() -> float:
    """Return the memory that worker 0 takes while it writes, in bytes of its share."""
    return _in_new_process(_write_share)[0]


def cpu_of_checkpoint() -> float:
    return _in_new_process(_write_share)[1]


def _write_share() -> tuple[float, float]:
    parts = {"generator": 1, "discriminator": 1, "average": 1}
    parts |= {"optimizer_generator": 2, "optimizer_discriminator": 2}
    # Memory that was never written takes no room: only copies count.
    tensors = {
        f"{part}/{number}": torch.zeros(IN_TENSOR)
        for part, copies in parts.items()
        for number in range(copies * PARAMETERS // 2 // IN_TENSOR)
    }
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    (files, *_) = layout_of_each(sizes, WORKERS_PER_HOST)
    share = sum(sizes[name] for names in files.values() for name in names)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Store(folder))
        before, began = _peak_bytes(), time.process_time()
        entries = checkpoints.write(checkpoints.next_name(1, 1), tensors, files)
        checkpoints.wait()
        assert entries.keys() == files.keys()
        return (_peak_bytes() - before) / share, time.process_time() - began


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_of_cache() -> float:
    """Return the longest time to the first block of eight processes that start at the same time."""
    folder, processes = _full_cache(), 8
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_import_slowly, range(processes)))
        return max(pool.map(_first_block, [folder] * processes))


def _import_slowly(_: int) -> None:
    time.sleep(2.0)  # so that each process gets one


def _first_block(folder: str) -> float:
    began, key = time.perf_counter(), block_key("f" * 64, 0, 1)
    found = HostCache(folder, 2**40)
    (content,) = found.fetch([key], lambda _: [b"x"])
    assert content == b"x"
    assert not found.notes
    return time.perf_counter() - began


@cache
def _full_cache() -> str:
    """Make a cache folder with many blocks."""
    parent = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, parent)
    HostCache(parent, 2**40)
    (folder,) = Path(parent).iterdir()
    for number in range(BLOCKS):
        (folder / f"{number:040x}.block").touch()
    return parent


def _in_new_process(measure: Callable[[], Any]) -> Any:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure).result()


_ELASTIC = [f"run.global_batch={WORKERS}", f"cluster.workers=[1, {WORKERS}]"]


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


ROWS = (
    Row(
        f"heartbeats of {WORKERS:,} workers: share of a core of the driver's machine",
        control_plane,
        "cores",
        "1 core at 1,000 workers",
        0.3,
    ),
    Row(
        f"comparison of replicas, {WORKERS:,} workers with 1,000 tensors each",
        replicas,
        "s",
        "9.6 s at 512",
        0.2,
    ),
    Row(f"stragglers among {WORKERS:,} workers", stragglers, "s", "7.1 s at 2,048", 0.05),
    Row(f"numbers of workers in 1:{WORKERS}", sizes, "s", "15.7 s", 0.01),
    Row(f"checks before a run of 1:{WORKERS} workers", checks, "s", "not measured", 1.0),
    Row(
        "checkpoint of 10⁹ parameters, 8 workers: memory that worker 0 takes, in its shares",
        memory_of_checkpoint,
        "shares",
        "22 GB, 13 shares",
        1.1,
    ),
    Row("the same: CPU time of worker 0", cpu_of_checkpoint, "s", "60 s", 60 / 8 * 1.1),
    Row(
        f"start of 8 processes with {BLOCKS:,} blocks in the cache of their host",
        start_of_cache,
        "s",
        "6 of 8 failed",
        1.0,
    ),
)


if __name__ == "__main__":
    main()

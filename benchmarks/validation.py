"""``gatdist simulate`` compared with closed forms, published tables, and measurements."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import RESULTS
from gatdist.bench.simulate.faults import Kind, Situation, play
from gatdist.bench.simulate.intervals import best_interval
from gatdist.bench.simulate.measured import fitted_link
from gatdist.bench.simulate.model import Link, Phase, StepModel, Topology, expected_maximum, ring_s
from gatdist.bench.simulate.scenario import parse
from gatdist.bench.simulate.study import study

Row = dict[str, Any]

# Seconds for 1,000 images on 1, 2, 4 and 8 GPUs, batch 32 (NVIDIA, StyleGAN3, docs/configs.md).
STYLEGAN3: dict[str, dict[str, tuple[float, ...]]] = {
    "StyleGAN3-T": {
        "128²": (27.20, 13.74, 7.52, 4.40),
        "256²": (49.81, 25.05, 13.26, 7.32),
        "512²": (90.25, 45.42, 22.81, 12.29),
        "1024²": (156.91, 79.16, 39.62, 20.01),
    },
    "StyleGAN3-R": {
        "128²": (34.23, 17.29, 9.53, 5.69),
        "256²": (56.73, 28.60, 14.39, 8.03),
        "512²": (110.13, 55.18, 27.99, 14.04),
        "1024²": (184.81, 92.58, 46.53, 23.42),
    },
    "StyleGAN3-T, V100": {
        "128²": (73.68, 37.30, 20.66, 11.31),
        "256²": (89.15, 45.45, 23.94, 13.04),
        "512²": (137.33, 69.65, 34.88, 18.47),
        "1024²": (221.85, 113.44, 57.04, 28.71),
    },
    "StyleGAN3-R, V100": {
        "128²": (58.44, 29.92, 15.49, 8.43),
        "256²": (87.37, 44.12, 22.42, 11.88),
        "512²": (158.91, 79.96, 40.86, 20.44),
        "1024²": (263.44, 134.22, 67.33, 34.12),
    },
}
# The same of V100, and the batch, which grew with the GPUs: the middle of the range that is
# given, as 12.8 to 13.7 (NVIDIA, StyleGAN2-ADA, README and `--cfg=auto`).
STYLEGAN2_ADA: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "128²": ((13.25, 6.65, 4.35, 4.40), (32, 64, 64, 64)),
    "256²": ((22.90, 11.50, 5.75, 4.95), (16, 32, 64, 64)),
    "512²": ((73.70, 38.85, 18.90, 9.60), (8, 16, 32, 64)),
    "1024²": ((157.95, 83.40, 40.45, 20.40), (4, 8, 16, 32)),
}
# Images a second on 1, 2, 4 and 8 P100 of a DGX-1, 64 a GPU (TensorFlow, benchmarks, 2017).
TENSORFLOW: dict[str, tuple[float, ...]] = {
    "TensorFlow Inception v3": (142, 284, 569, 1131),
    "TensorFlow ResNet-50": (219, 422, 852, 1734),
    "TensorFlow ResNet-152": (91.8, 181, 356, 716),
    "TensorFlow VGG-16": (154, 295, 584, 1081),
}
# 512 P100, four a host, 25 Gbit/s with RoCE, 64 a GPU (Horovod, benchmarks): share of 512 single
# ones. Images a second of one GPU: VGG-16 by TensorFlow; ResNet-101 by Horovod's own 16 GPUs.
HOROVOD = {
    "Horovod VGG-16": (0.68, 138.4e6, 154.0),
    "Horovod ResNet-101": (0.90, 44.5e6, 1656.82 / 16),
}


def row(
    family: str,
    what: str,
    truth: float,
    simulated: float,
    kind: str,
    *,
    counts: bool = True,
    between: tuple[float, float] | None = None,
) -> Row:
    """Return a check; ``counts``: whether the model applies; ``between``: the 80 % interval."""
    groups = {"exact": "closed forms", "published": "published", "measured": "measured here"}
    return {
        "group": groups[kind], "family": family, "what": what, "truth": truth,
        "simulated": simulated, "error": simulated / truth - 1, "kind": kind, "counts": counts,
        "between": between,
    }  # fmt: skip


def is_inside(row: Row) -> bool:
    low, high = row["between"]
    return bool(low <= row["truth"] <= high)


def answer(**scenario: Any) -> dict[str, Any]:
    return study(parse(scenario), Path())


def closed_forms() -> Iterator[Row]:

    def exact(what: str, truth: float, simulated: float) -> Row:
        return row("closed forms", what, truth, simulated, "exact")

    link = Link(20e-6, 1e9)
    phases = (Phase(2e-3, 40e6), Phase(1e-3, 100e6))
    plain = StepModel(phases, topology=Topology(1, link, link, "ring"), overlap=False)
    for p in (1, 8, 512):
        rings = ring_s(40e6, p, link) + ring_s(100e6, p, link)
        what = f"a step on {p} workers, a ring, no overlap, s"
        yield exact(what, 32 * 3e-3 + rings, float(plain.parts(p, 32).total))
    for p, known in ((2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))):
        yield exact(f"the slowest of {p}, in deviations", known, expected_maximum(p))
    m, r, c, hours = 3600.0, 120.0, 20.0, 100
    crash = Kind("crash", 1 / m, False, 20.0, 100.0, 0.0, 0.0)
    run = Situation(hours * 3600, 1, 1, (1.0,), c, 0.0, (crash,))
    for interval_s in (100.0, 379.0, 1500.0):
        segment_s = m * math.exp(r / m) * (math.exp((interval_s + c) / m) - 1)
        played = play(run, np.array([interval_s]), 0, 400).total.mean()
        what = f"{hours} h of steps, a fault an hour, a checkpoint every {interval_s:.0f} s, h"
        yield exact(what, segment_s * hours / interval_s, float(played) / 3600)
    tries = np.geomspace(60, 3600, 100_000)
    best = tries[np.argmin((np.exp((tries + c) / m) - 1) / tries)]
    yield exact("the best interval there, s (Young: 379)", float(best), best_interval(run, 0)[0])


def published() -> Iterator[Row]:
    for family, sizes in STYLEGAN3.items():
        for size, times in sizes.items():
            yield from _from_one_and_two(family, size, times, workload={"batch": "shared"})
    for size, (times, batches) in STYLEGAN2_ADA.items():
        yield from _from_one_and_two("StyleGAN2-ADA, V100", size, times, batches)
    for family, speeds in TENSORFLOW.items():
        times = tuple(1000 / speed for speed in speeds)
        yield from _from_one_and_two(family, "", times, workload={"batch": "per_worker"})
    for name, (efficiency, parameters, speed) in HOROVOD.items():
        found = answer(
            predict={"workers": [512]},
            workload={
                "batch_per_worker": 64,
                "discriminator": {"seconds_per_sample": 1 / speed, "parameters": parameters},
            },
            network={
                "workers_per_host": 4, "bandwidth_bits_per_s": 25e9,
                "host_bandwidth_bytes_per_s": 10e9,
            },
            stragglers={"deviation": 0.02},
        )  # fmt: skip
        what = f"{name}, efficiency of 512 GPUs from figures"
        yield row(name, what, efficiency, found["points"][0]["efficiency"], "published")


def _from_one_and_two(
    family: str,
    size: str,
    times: Sequence[float],
    batches: Sequence[int] | None = None,
    **scenario: Any,
) -> Iterator[Row]:
    seen, ahead = ({}, {}) if batches is None else (
        {"global_batch": list(part)} for part in (batches[:2], batches[2:])
    )  # fmt: skip
    found = answer(
        observed={"workers": [1, 2], "seconds_per_1000_samples": list(times[:2]), **seen},
        predict={"workers": [4, 8], **ahead},
        **scenario,
    )
    for point, truth in zip(found["points"], times[2:], strict=True):
        what = f"{family} {size}".strip() + f", {point['workers']} GPUs from 1 and 2, s / 1,000"
        time = "seconds_per_1000_samples"
        between = (point[f"{time}_low"], point[f"{time}_high"])
        yield row(family, what, truth, point[time], "published", between=between)


def links(found: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Compare all-reduces and steps measured by :mod:`benchmarks.slow_links`."""
    as_they_are = _link(found[0])
    for rate in found:
        mbit_per_s = rate["mbit_per_s"]
        slowed = mbit_per_s is not None  # else two cores are the bottleneck of four hosts
        name = f"{mbit_per_s:.0f} Mbit/s" if slowed else "links as they are"
        for one in rate["network"].get("4", ()):
            if one["bytes"] >= 1_000_000:
                what = f"{name}: all-reduce of {one['bytes'] / 1e6:.0f} MB on 4 hosts from 2, s"
                simulated = ring_s(one["bytes"], 4, _link(rate))
                family = "all-reduce, 4 hosts from 2"
                yield row(family, what, one["seconds"], simulated, "measured", counts=slowed)
        points = {point["workers"]: point for point in rate["scaling"]["points"]}
        network = network_at(as_they_are, mbit_per_s)
        seen = network_at(_link(rate), None)
        for workers, (source, figures) in product(
            (2, 4), {"rate": network, "doctor": seen}.items()
        ):
            what = f"{name}: step on {workers} hosts from computation alone and the {source}, s"
            simulated = step_s(points[workers], points[1], figures)
            truth = points[workers]["step_s"]
            family = f"step from the {source}"
            yield row(family, what, truth, simulated, "measured", counts=slowed)
        what = f"{name}: 4 hosts from 1 and 2, s / 1,000"
        family = "step, 4 hosts from 1 and 2"
        yield row(family, what, *_held_out(points, network), "measured", counts=slowed)


def _link(rate: Mapping[str, Any]) -> Link:
    return fitted_link({"hosts": [0, 0], "network": rate["network"]["2"]})


def network_at(as_they_are: Link, mbit_per_s: float | None) -> dict[str, Any]:
    """Return network figures from a link's rate, or the measured link."""
    figures = {"latency_s": as_they_are.latency_s, "algorithm": "ring"}
    if mbit_per_s is None:
        bandwidth = as_they_are.bandwidth_bytes_per_s
        return figures | {"efficiency": 1.0, "bandwidth_bytes_per_s": bandwidth}
    efficiency = 1448 / (1514 + 66 / 2)
    return figures | {"efficiency": efficiency, "bandwidth_bits_per_s": 1e6 * mbit_per_s}


def alone_s(point: Mapping[str, Any]) -> float:
    return float(point["global_batch"] / point["limit_samples_per_s"])


def _players(point: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any]:
    phases = one["phases"]
    slower = alone_s(point) / sum(phases.values()) / one["global_batch"]
    sent = point["bytes_sent"] * point["workers"] / (2 * (point["workers"] - 1))
    return {
        name: {"seconds_per_sample": phases[name] * slower, "parameters": sent / 2 / 4}
        for name in ("discriminator", "generator")
    } | {"overhead_s": phases["optimizer"] * slower * one["global_batch"]}


def step_s(point: Mapping[str, Any], one: Mapping[str, Any], network: Mapping[str, Any]) -> float:
    found = answer(
        predict={"workers": [point["workers"]]},
        workload={"batch_per_worker": one["global_batch"], **_players(point, one)},
        network=network,
        stragglers={"deviation": 0.0},
    )
    return float(found["points"][0]["step_s"])


def _held_out(
    points: Mapping[int, Mapping[str, Any]], network: Mapping[str, Any]
) -> tuple[float, float]:
    """Four workers' seconds for 1,000 samples, and their prediction from one and two."""
    one = alone_s(points[1])
    steps = {p: one + max(0.0, points[p]["step_s"] - alone_s(points[p])) for p in (2, 4)} | {1: one}
    batch = points[1]["global_batch"]
    seconds = {p: 1000 * s / (batch * p) for p, s in steps.items()}
    sent = points[2]["bytes_sent"] / 2 / 4
    found = answer(
        observed={
            "workers": [1, 2], "seconds_per_1000_samples": [seconds[1], seconds[2]],
            "deviation": 0.05,
        },
        predict={"workers": [4]},
        workload={
            "batch_per_worker": batch,
            "discriminator": {"parameters": sent, "share": 0.57},
            "generator": {"parameters": sent, "share": 0.43},
        },
        network=network,
    )  # fmt: skip
    return seconds[4], found["points"][0]["seconds_per_1000_samples"]


def soaks() -> Iterator[Row]:
    for file in sorted(RESULTS.glob("*_soak/result.json")):
        yield from soak(json.loads(file.read_text()))


def soak(soaked: Mapping[str, Any]) -> Iterator[Row]:
    """Compare the goodput of a soak with that of times which other benchmarks measured."""
    of = f"the soak of {time.strftime('%-d %B', time.gmtime(soaked['began']))}"
    # This machine was slower between the soak's faults than before them.
    slower = soaked["step_s_in_soak"]
    for step_s, what in (
        (soaked["step_s"], f"goodput of {of}"),
        (slower, f"goodput of {of}, with the step time between faults"),
    ):
        goodput = soak_run(soaked, step_s)["goodput"] * soaked["step_s"] / step_s
        yield row("soak", what, soaked["goodput"], goodput, "measured")


def soak_run(soaked: Mapping[str, Any], step_s: float) -> dict[str, Any]:
    """Simulate the run of a soak; see :func:`~gatdist.bench.simulate.study.simulate`."""
    cost = _newest("overheads")["checkpoint_s"]
    restarts = _newest("recovery")["median_s"]
    recoveries = _newest("after_loss")["median_s"]
    worker, host = recoveries["worker, elastic"], recoveries["host, elastic"]
    after_loss = soaked.get("after_loss", "restart")
    noticed_s, back_s = 0.0, _JOIN_S
    if after_loss == "continue":
        noticed_s = host["pause_s"] - worker["pause_s"]
        back_s = host["replaced_s"] - worker["replaced_s"]
    found = answer(
        observed={
            "workers": [2], "global_batch": 64, "seconds_per_1000_samples": [1000 * step_s / 64],
        },
        predict={"workers": [2]},
        workload={"global_batch": 64, "overhead_s": 0.0},
        stragglers={"deviation": 0.0},
        run={"total_samples": soaked["steps"] * 64, "min_workers": 1, "after_loss": after_loss},
        recovery={
            "change_s": worker["pause_s"],
            "replace_s": worker["replaced_s"],
            "join_s": worker["join_s"],
        },
        checkpoints={
            "interval_samples": 8192,
            "snapshot_s": cost["compare"] + cost["snapshot"],
            "write_s": cost["write"],
        },
        faults=list(_soak_faults(soaked, restarts, noticed_s, back_s)),
        simulation={"repeats": 400},
    )  # fmt: skip
    (run,) = found["points"][0]["runs"]
    return dict(run)


# Design of the soak's faults: what fails (default: a worker); detection (0: a worker's death is
# seen at once; 10: Ray's health checks; 20: cluster.heartbeat_timeout_s); absence of a host,
# notice, and whether work is lost.
_JOIN_S = 3.0
_SOAK: dict[str, dict[str, Any]] = {
    "network_cut_for_5_s": {"detection_s": 5.0, "restart_s": 0.0, "loses_work": False},
    "worker_stops_for_8_s": {"detection_s": 8.0, "restart_s": 0.0, "loses_work": False},
    "network_cut_for_40_s": {"of": "host", "detection_s": 10.0, "away_s": 40.0},
    "worker_stops_for_good": {"detection_s": 20.0},
    "host_dies_for_6_s": {"of": "host", "away_s": 6.0},
    "host_dies_for_40_s": {"of": "host", "away_s": 40.0},
    "preemption": {"of": "host", "notice_s": 12.0, "away_s": 12 + 12.5},
    "kill_all_workers": {"of": "run"},
    "bit_flips": {"of": "run"},
    "driver_dies": {"of": "run"},
}


def _soak_faults(
    soaked: Mapping[str, Any], restarts: Mapping[str, float], noticed_s: float, back_s: float
) -> Iterator[dict[str, Any]]:
    """Return the soak's faults.

    A host is noticed ``noticed_s`` later than a worker, and can work ``back_s`` after its return.
    """
    names = [fault["name"] for fault in soaked["faults"]]
    for name in dict.fromkeys(names):
        figures: dict[str, Any] = {"of": "worker", "detection_s": 0.0} | _SOAK.get(name, {})
        figures.setdefault("restart_s", restarts["driver" if name == "driver_dies" else "worker"])
        if name.startswith("host_dies"):
            figures["detection_s"] = noticed_s
        if "away_s" in figures:
            figures["away_s"] += back_s
        many = 1 if figures["of"] == "run" else 2
        mtbf_hours = many * soaked["wall_s"] / names.count(name) / 3600
        yield {"name": name, "mtbf_hours": mtbf_hours, **figures}


def _newest(case: str) -> dict[str, Any]:
    return dict(json.loads(max(RESULTS.glob(f"*_{case}/result.json")).read_text()))


def main() -> None:
    """Print how well the goodput of soaks is predicted, and what it is with either after_loss."""
    for file in [Path(name) for name in sys.argv[1:]] or sorted(RESULTS.glob("*_soak/result.json")):
        soaked = json.loads(file.read_text())
        for found in soak(soaked):
            print("{what}: {truth:.3f}, simulated {simulated:.3f} ({error:+.1%})".format(**found))
        for one in soak_run(soaked, soaked["step_s"])["recoveries"]:
            print("  {size}, {after_loss}: simulated {goodput:.3f}".format(**one))


if __name__ == "__main__":
    main()

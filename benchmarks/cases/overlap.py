"""Shows in a trace that the discriminator's gradients travel while the generator's are computed.

python -m benchmarks.cases.overlap [--out benchmarks/results/DATE_overlap]

Two gloo processes run the one-stage step; one of them notes when each bucket of gradients sets out
and arrives, and when each parameter's gradient is ready. ``trace.json.gz`` is what torch's profiler
saw of the same step (open it in Perfetto), ``overlap.png`` a drawing of the notes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import environment
from gatdist.bench.processes import Report, together
from gatdist.config import parse_config
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import TorchCommunicator
from gatdist.training.state import TrainState
from gatdist.training.step import train_step

SHAPE, BATCH = (3, 32, 32), 16
NETWORK = {"name": "residual", "width": 32, "max_width": 128}


@dataclass
class Event:
    """Something that took from ``start_s`` to ``end_s``, on the clock of the step."""

    player: str
    kind: str
    start_s: float
    end_s: float


def events_of(comm: TorchCommunicator, rule: str, trace: Path | None = None) -> list[Event]:
    """What happens in a step's backward on this worker, after three steps to warm up."""
    player = {"learning_rate": 1e-3}
    config = parse_config(
        {
            "run": {"total_samples": 10**6, "global_batch": BATCH * comm.world_size},
            "data": {"url": "builtin:digits"},
            "model": {"generator": NETWORK, "discriminator": NETWORK},
            "game": {"update_rule": rule, "latents": "shared"},
            "optim": {"generator": player, "discriminator": player},
        }
    )
    state = TrainState(config, comm, SHAPE, 0)
    the_rule = state.rule(config)
    events: list[Event] = []
    owner = {p: n for n, owner in state.players.items() for p in owner.bare.parameters()}
    _note_buckets(comm, owner, events)
    for parameter, name in owner.items():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: events.append(Event(name, "ready", time.perf_counter(), 0.0))
        )
    real = torch.randn(BATCH, *SHAPE)

    def step() -> None:
        positions = state.samples_seen + torch.arange(BATCH) * comm.world_size + comm.rank
        batch = Batch(real, None, positions, 0)
        train_step(state, the_rule, batch, config, Statistics(comm.device), PhaseTimer(comm.device))

    for _ in range(3):
        step()
    events.clear()
    began = time.perf_counter()
    step()
    noted = [Event(e.player, e.kind, e.start_s - began, e.end_s - began) for e in events]
    if trace:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        profiler.export_chrome_trace(str(trace))
    else:
        step()  # the other worker's share of the profiled one
    return noted


def _note_buckets(comm: TorchCommunicator, owner: dict[Tensor, str], events: list[Event]) -> None:
    original = comm._mean

    def noted(bucket: Any, compress: bool) -> Any:
        event = Event(owner[bucket.parameters()[0]], "bucket", time.perf_counter(), 0.0)
        events.append(event)
        future = original(bucket, compress)

        def arrived(done: Any) -> Any:
            event.end_s = time.perf_counter()
            return done.value()

        return future.then(arrived)

    comm._mean = noted  # type: ignore[method-assign]


def _member(comm: TorchCommunicator, report: Report, rule: str, trace: Path | None) -> list[Event]:
    torch.set_num_threads(1)
    return events_of(comm, rule, trace if comm.is_main else None)


def measure(rule: str, trace: Path | None = None) -> list[Event]:
    """Worker 0's events, of two."""
    first: list[Event] = together(2, _member, rule, trace, report=print, silence_s=120.0)[0]
    return first


def overlapped(rule: str, events: list[Event]) -> float:
    """The share of D's time on the way in which the backward that sent it went on computing."""
    # In the alternating rule that backward is D's own, whose last bucket nothing hides.
    last_player = "generator" if rule == "one_stage" else "discriminator"
    last = max(e.start_s for e in events if (e.player, e.kind) == (last_player, "ready"))
    buckets = [e for e in events if (e.player, e.kind) == ("discriminator", "bucket")]
    hidden = sum(max(0.0, min(e.end_s, last) - e.start_s) for e in buckets)
    return hidden / sum(e.end_s - e.start_s for e in buckets)


def main() -> None:
    """Measure, draw, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_overlap")
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for rule in ("one_stage", "alternating"):
            trace = Path(folder) / f"{rule}.json" if rule == "one_stage" else None
            found[rule] = measure(rule, trace)
            if trace:
                (out / "trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))
            share = overlapped(rule, found[rule])
            print(f"{rule}: {share:.0%} of D's time on the way is hidden by the backward")
    result = {
        rule: {"overlapped": overlapped(rule, events), "events": [asdict(e) for e in events]}
        for rule, events in found.items()
    }
    text = json.dumps(result | {"environment": environment()}, ensure_ascii=False)
    (out / "result.json").write_text(text + "\n")
    draw(found, out / "overlap.png")


def draw(found: dict[str, list[Event]], path: Path) -> None:
    """One lane for each player's gradients and one for its buckets, a panel a rule."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(found), 1, figsize=(9, 1.9 * len(found)), layout="constrained", sharex=True
    )
    lanes = [(p, k) for p in ("generator", "discriminator") for k in ("bucket", "ready")]
    names = {"ready": "gradients ready", "bucket": "buckets on the way"}
    colors = {"discriminator": "tab:orange", "generator": "tab:blue"}
    for (rule, events), axis in zip(found.items(), axes, strict=True):
        for event in events:
            row, color = lanes.index((event.player, event.kind)), colors[event.player]
            if event.kind == "bucket":
                width = (event.end_s - event.start_s) * 1e3
                axis.barh(row, width, left=event.start_s * 1e3, height=0.5, color=color, alpha=0.6)
            else:
                axis.plot(event.start_s * 1e3, row, "|", color=color, markersize=9)
        axis.set_yticks(range(len(lanes)), [f"{p}: {names[k]}" for p, k in lanes], fontsize=7)
        axis.set_title(rule, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds since the step began")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

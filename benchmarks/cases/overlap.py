"""Overlap of communication and computation: gradient buckets in flight during a backward pass.

``trace.json.gz`` is torch's profile of the one-stage step (open it in Perfetto).
"""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.case import parser, save
from gatdist.bench.cases import GatdistCase, Size
from gatdist.bench.processes import Report, together
from gatdist.monitor.figures import figure
from gatdist.parallel.communicator import TorchCommunicator

SIZE = Size("overlap", "residual", {"width": 32, "max_width": 128}, (3, 32, 32), 16)


@dataclass
class Event:
    """An event from ``start_s`` to ``end_s`` after the start of the step."""

    player: str
    kind: str
    start_s: float
    end_s: float


def events_of(comm: TorchCommunicator, rule: str, trace: Path | None = None) -> list[Event]:
    config = SIZE.config({"game": {"update_rule": rule, "latents": "shared"}}, comm.world_size)
    case = GatdistCase(config, torch.randn(SIZE.batch, *SIZE.shape), comm)
    events: list[Event] = []
    owner = {p: n for n, owner in case.state.players.items() for p in owner.bare.parameters()}
    _record_buckets(comm, owner, events)
    for parameter, name in owner.items():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: events.append(Event(name, "ready", time.perf_counter(), 0.0))
        )

    for _ in range(3):
        case.step()
    events.clear()
    began = time.perf_counter()
    case.step()
    found = [Event(e.player, e.kind, e.start_s - began, e.end_s - began) for e in events]
    if trace:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            case.step()
        profiler.export_chrome_trace(str(trace))
    else:
        case.step()  # the other worker's part of the profiled step
    return found


def _record_buckets(comm: TorchCommunicator, owner: Mapping[Any, str], events: list[Event]) -> None:
    original = comm._mean

    def recorded(bucket: Any, compress: bool) -> Any:
        event = Event(owner[bucket.parameters()[0]], "bucket", time.perf_counter(), 0.0)
        events.append(event)
        future = original(bucket, compress)

        def arrived(done: Any) -> Any:
            event.end_s = time.perf_counter()
            return done.value()

        return future.then(arrived)

    comm._mean = recorded  # type: ignore[method-assign]


def _member(comm: TorchCommunicator, report: Report, rule: str, trace: Path | None) -> list[Event]:
    torch.set_num_threads(1)
    return events_of(comm, rule, trace if comm.is_main else None)


def overlapped(rule: str, events: list[Event]) -> float:
    """Return the share of D's communication that is hidden by the backward pass that sends it."""
    # In the alternating rule that is D's own, which can't hide the last bucket.
    last_player = "generator" if rule == "one_stage" else "discriminator"
    last = max(e.start_s for e in events if (e.player, e.kind) == (last_player, "ready"))
    buckets = [e for e in events if (e.player, e.kind) == ("discriminator", "bucket")]
    hidden = sum(max(0.0, min(e.end_s, last) - e.start_s) for e in buckets)
    return hidden / sum(e.end_s - e.start_s for e in buckets)


def main() -> None:
    out = parser("overlap", __doc__).parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for rule in ("one_stage", "alternating"):
            trace = Path(folder) / f"{rule}.json" if rule == "one_stage" else None
            found[rule] = together(2, _member, rule, trace, report=print, silence_s=120.0)[0]
            if trace:
                (out / "trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))
            share = overlapped(rule, found[rule])
            print(f"{rule}: {share:.0%} of D's communication is hidden")
    result = {
        rule: {"overlapped": overlapped(rule, events), "events": [asdict(e) for e in events]}
        for rule, events in found.items()
    }
    save(out, result, indent=None)
    draw(found, out / "overlap.png")


def draw(found: dict[str, list[Event]], path: Path) -> None:
    rows = [(p, k) for p in ("generator", "discriminator") for k in ("bucket", "ready")]
    names = {"ready": "gradients ready", "bucket": "buckets in flight"}
    colors = {"discriminator": "tab:orange", "generator": "tab:blue"}
    with figure(9, 1.9 * len(found)) as made:
        axes = made.subplots(len(found), 1, sharex=True)
        for (rule, events), axis in zip(found.items(), axes, strict=True):
            for event in events:
                row, color = rows.index((event.player, event.kind)), colors[event.player]
                if event.kind == "bucket":
                    begin, width = event.start_s * 1e3, (event.end_s - event.start_s) * 1e3
                    axis.barh(row, width, left=begin, height=0.5, color=color, alpha=0.6)
                else:
                    axis.plot(event.start_s * 1e3, row, "|", color=color, markersize=9)
            axis.set_yticks(range(len(rows)), [f"{p}: {names[k]}" for p, k in rows], fontsize=7)
            axis.set_title(rule, fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1].set_xlabel("milliseconds since the step began")
        made.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

"""Summarize the records in ``benchmarks/results`` in a line or two each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.case import RESULTS
from benchmarks.gpu.tables import LARGE, compared

Found = Mapping[str, Any]


class Line(NamedTuple):
    """A result: what was measured, its value with unit and baseline, its spread."""

    what: str
    value: str
    spread: str


@dataclass(frozen=True)
class Record:
    folder: Path
    found: Found

    @property
    def date(self) -> str:
        return self.folder.name.partition("_")[0]

    @property
    def name(self) -> str:
        return self.folder.name.partition("_")[2]

    @property
    def made_on(self) -> str:
        """Commit (``+``: with changes; ``r``: of the record) and hardware."""
        facts = self.found.get("environment") or self.found["hosts"][0]
        if facts.get("commit"):
            commit, changes, _ = facts["commit"].partition("+")
            message = f"`{commit[:7]}`{changes}"
        else:
            message = f"`{facts['recorded_in'][:7]}`r"
        processor = facts["processor"].replace("(R)", "").replace(" Processor", "")
        hardware = f"{processor} × {facts['cores']}"
        return f"{message}, {facts.get('gpu') or hardware}"

    def lines(self) -> list[Line]:
        if "samples_seen" in self.found and "metrics" in self.found:
            return _run(self.name, self.found)
        report = REPORTERS.get(self.name)
        return report(self.found) if report else []


def newest(results: Path = RESULTS) -> list[Record]:
    found: dict[str, Record] = {}
    for file in sorted(results.glob("*/result.json")):
        record = Record(file.parent, json.loads(file.read_text(encoding="utf-8")))
        found[record.name] = record
    return [found[name] for name in sorted(found)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _range(row: Mapping[str, Any], key: str = "ratio") -> str:
    return f"{_number(row[f'{key}_low'])} to {_number(row[f'{key}_high'])}"


# The quality of runs


def _run(name: str, found: Found) -> list[Line]:
    metrics = {key.removeprefix("metric/"): value for key, value in found["metrics"].items()}
    main = next(key for key in ("fid", "jsd") if key in metrics)
    compared = f"real-vs-real {_number(metrics[f'{main}_real_split'])}"
    if "baseline_metrics" in found:
        compared += f", baseline {_number(found['baseline_metrics'][main])}"
    values = [f"{main.upper()} {_number(metrics[main])} ({compared})"]
    for key, text in (
        ("label_accuracy", "label accuracy"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("novel_well_formed", "new and well-formed"),
    ):
        if key in metrics:
            values.append(f"{text} {_share(metrics[key])}")
    how = ", one process" if "--local" in found["command"] else ", two workers"
    what = f"`{name}`: {found['samples_seen']:,} samples, {found['seconds'] / 60:.1f} min{how}"
    return [Line(what, "; ".join(values), "one run")]


def _ring(found: Found) -> list[Line]:
    runs = found["runs"]
    shares = [run["share_within_3_sigma"] for run in runs]
    modes = [run["modes"] for run in runs]
    value = f"{min(modes)} of 8 modes, {_share(median(shares))} of points within 3 σ"
    spread = f"{len(runs)} seeds, {_share(min(shares))} to {_share(max(shares))}"
    return [Line(f"`ring`: {median(run['seconds'] for run in runs) / 60:.1f} min", value, spread)]


def _modes(found: Found) -> list[Line]:
    real, runs = found["real"], found["runs"]
    count = f"{found['num_fakes']:,}"
    lines = []
    for name in dict.fromkeys(run["loss"] for run in runs):
        modes, kl = ([run[key] for run in runs if run["loss"] == name] for key in ("modes", "kl"))
        value = f"{median(modes):.0f} of 1,000 modes, KL {_number(median(kl))} nats"
        baseline = f"({count} real samples: {real['modes']:.0f}, {_number(real['kl'])})"
        spread = f"{len(modes)} seeds, {min(modes):.0f} to {max(modes):.0f} modes"
        what = f"mode coverage, stacked digits, {_spaced(name)}, {found['samples']:,} samples"
        lines.append(Line(what, f"{value} {baseline}", spread))
    return lines


def _quality(found: Found) -> list[Line]:
    """Report bfloat16 at the lowest goal that all seeds reached."""
    for reached in found["goals"]:
        one = next(s for s in reached["settings"] if s["name"] == "alternating_fresh_bfloat16")
        if one["reached_the_goal"] == one["seeds"]:
            break
    samples, end = one["samples_to_goal"], one["at_the_end"]
    return [
        Line(
            f"`{found['preset']}` in bfloat16, to {reached['goal']} × the real-vs-real FID",
            f"{_number(samples['mean'])} samples; {_number(one['time_over_bare'])} × the time of a "
            f"hand-written float32 loop; at the end {_number(end['mean'])} × the real-vs-real FID",
            f"{one['seeds']} seeds, ± {_number(samples['deviation'])} samples",
        )
    ]


# Speed


def _step(found: Found) -> list[Line]:
    rows = {row["name"]: row for row in found["cases"] if row["size"] == "dcgan64_w32"}
    peers = [
        f"{name.capitalize()} {_number(rows[name]['ratio_to_bare'])}"
        for name in ("lightning", "accelerate")
        if name in rows
    ]
    lines = []
    for name in ("alternating", "alternating_bfloat16", "one_stage_bfloat16"):
        row = rows[name]
        peer_ratios = f" ({', '.join(peers)})" if name == "alternating" and peers else ""
        value = f"{_number(row['ratio_to_bare'])} × a hand-written float32 loop{peer_ratios}"
        if "cpu_to_bare" in row:
            value += f"; {_number(row['cpu_to_bare'])} × its CPU time"
        what = f"throughput of a step, DCGAN-64, {_spaced(name)}, one process"
        lines.append(Line(what, value, _range(row)))
    return lines


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _data(found: Found) -> list[Line]:
    rows = {
        row["reader"]: row
        for row in found["cases"]
        if row["resolution"] == 256 and not row["reader"].startswith("bare")
    }
    mine = rows.pop("gatdist")
    peers = [f"{_spaced(name)} {_number(row['ratio_to_limit'])}" for name, row in rows.items()]
    value = f"{_number(mine['ratio_to_limit'])} of decode-only throughput"
    value += f" ({', '.join(peers)})" if peers else ""
    return [Line("reading images of 256²", value, _range(mine))]


def _storage(found: Found) -> list[Line]:
    cases = {row["case"]: row for row in found["cases"]}
    row = cases["cold"]
    lines = [
        Line(
            "the same from S3 at 30 ms, first epoch",
            f"{_number(row['ratio_to_limit'])} of the measured upper bound",
            _range(row) if "ratio_low" in row else "not kept",
        )
    ]
    if "faults" in cases:
        row = cases["faults"]
        value = f"{_number(row['ratio_to_clean'])} of the throughput without failures"
        spread = _range(row, "clean") if "clean_low" in row else "not kept"
        lines.append(Line("the same, 1 % of requests failing", value, spread))
    return lines


def _scaling(found: Found) -> list[Line]:
    return [
        Line(
            f"{point['workers']} workers, {point['mode']} scaling, DCGAN-64",
            f"{_share(point['efficiency'])} of the throughput of {point['workers']} independent "
            "processes",
            f"{_share(point['efficiency_low'])} to {_share(point['efficiency_high'])}",
        )
        for point in found["points"]
        if point["workers"] > 1
    ]


def _seconds(values: Sequence[float]) -> tuple[str, str]:
    spread = f"{len(values)} times, {_number(min(values))} to {_number(max(values))} s"
    return f"{_number(median(values))} s", spread


def _recovery(found: Found) -> list[Line]:
    what = {
        "worker": "recovery time after a worker is killed, to the next new step",
        "host": "the same after a host is killed (it is back after 6 s)",
        "driver": "the same after the driver is killed and restarted",
    }
    return [
        Line(what[kind], *_seconds([one["total_s"] for one in measured]))
        for kind, measured in found["measured"].items()
    ]


_AFTER_LOSS = {
    "elastic": "the others continue, elastic number of workers",
    "fixed": "the others continue, fixed number of workers",
    "spare": "the others continue, with a spare worker",
    "restart": "all restart, elastic number of workers",
}


def _after_loss(found: Found) -> list[Line]:
    lines = []
    for case, measured in found["measured"].items():
        killed, mode = case.split(", ")
        what = f"a {killed} is killed ({_AFTER_LOSS[mode]}): no new step"
        lines.append(Line(what, *_seconds([one["pause_s"] for one in measured])))
    return lines


def _undo(found: Found) -> list[Line]:
    pairs = zip(found["times_s"]["undoable"], found["times_s"]["plain"], strict=True)
    ratios = [undoable / plain for undoable, plain in pairs]
    spread = (
        f"{_number(min(ratios))} to {_number(max(ratios))} ×, copy {_number(found['copy_s'])} s"
    )
    what = "step of DCGAN-64 on two workers that can be undone, compared with one that can't"
    return [Line(what, f"{_number(median(ratios))} ×", spread)]


def _scale(found: Found) -> list[Line]:
    return [
        Line(
            row["what"],
            f"{_number(row['median'])} {row['unit']}",
            f"{_number(min(row['values']))} to {_number(max(row['values']))}; before: "
            f"{row['before']}",
        )
        for row in found["rows"]
    ]


def _startup(found: Found) -> list[Line]:
    return [Line(one["what"], *_seconds(one["seconds"])) for one in found["cases"]]


def _soak(found: Found) -> list[Line]:
    count = len(found["faults"])
    ended = {
        True: "bit-identical to an undisturbed run",
        False: "other bytes",
        None: "not yet compared with an undisturbed run",
    }[found.get("equal")]
    continues = found.get("after_loss") == "continue"
    after = "the others continue" if continues else "each restarts all workers"
    what = f"{found['wall_s'] / 60:.0f} minutes with {count} faults on two hosts ({after})"
    return [
        Line(what, f"goodput {_share(found['goodput'])} (100 %: no faults); {ended}", "one run")
    ]


def _using(found: Found) -> list[Line]:
    rows = found["generation"]
    ratios = [row["ratio_to_bare"] for row in rows]
    value = f"{_number(median(ratios))} × a hand-written loop, median of {len(rows)} networks"
    return [
        Line("generated samples per s", value, f"{_number(min(ratios))} to {_number(max(ratios))}")
    ]


def _gpu(found: Found) -> list[Line]:
    return [
        Line(
            f"step of `{row['preset']}`, {row['batch']} samples on one GPU",
            f"{_number(row['samples_per_s'])} samples per second, "
            f"{_number(row['ratio'])} × a hand-written loop",
            _range(row),
        )
        for row in compared(found["parts"])
        if row["implementation"] == "gatdist" and "ratio" in row and row["preset"] in LARGE
    ]


REPORTERS: dict[str, Callable[[Found], list[Line]]] = {
    "ring": _ring,
    "modes": _modes,
    "quality_digits": _quality,
    "quality_glyphs": _quality,
    "step": _step,
    "data": _data,
    "storage": _storage,
    "scaling": _scaling,
    "startup": _startup,
    "recovery": _recovery,
    "after_loss": _after_loss,
    "undo": _undo,
    "scale": _scale,
    "soak": _soak,
    "using": _using,
    "gpu": _gpu,
}

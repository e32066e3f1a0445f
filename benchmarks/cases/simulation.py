"""Validation of ``gatdist simulate``, and a scaling study of 1 to 4,096 workers.

Without root, or with ``--links``, an earlier measurement of slowed links is used. No prediction is
fitted to its own truth. With unslowed links, four hosts are limited by this machine's two cores;
those rows are not counted among the errors.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import validation
from benchmarks.case import RESULTS, parser, positive, save, write_json
from benchmarks.hosts import why_not
from gatdist.bench.environment import environment
from gatdist.bench.simulate.report import draw
from gatdist.bench.simulate.study import simulate
from gatdist.monitor.figures import LIMIT, MEASURED, figure, files, tidy
from gatdist.monitor.numbers import aligned, number

STUDY = "benchmarks/study.toml"
MONTH = "month"
TARGET = {"StyleGAN3-T": 0.10}
MONTH_TARGET_S = 10.0


def main() -> None:
    arguments = parser("simulation", __doc__)
    arguments.add_argument("--rounds", type=positive, default=5)
    arguments.add_argument("--links", type=Path, help="an earlier links.json")
    given = arguments.parse_args()
    links = _links(given.links, given.rounds)
    rows = [
        *validation.closed_forms(),
        *validation.published(),
        *validation.links(links["rates"]),
        *validation.soaks(),
    ]
    began = time.perf_counter()
    month = simulate(MONTH)
    month_s = time.perf_counter() - began
    study = simulate(STUDY)
    result = {
        "rows": rows,
        "mean_errors": _mean_errors(rows),
        "in_range": _in_range(rows),
        "month_s": month_s,
        "targets": {**TARGET, "month_s": MONTH_TARGET_S},
        "month": month,
        "study": study,
    }
    out = given.out
    save(out, result)
    write_json(out / "links.json", links)
    (out / "study.png").write_bytes(draw(study)["simulation.png"])
    (out / "validation.png").write_bytes(drawn(rows)["validation.png"])
    print(table(result))


def _links(earlier: Path | None, rounds: int) -> dict[str, Any]:
    if earlier is None and (os.geteuid() or why_not()):
        earlier = max(RESULTS.glob("*_simulation/links.json"))
    if earlier is not None:
        return dict(json.loads(earlier.read_text()))
    from benchmarks.slow_links import measured

    return {
        "rounds": rounds,
        "rates": measured(rounds),
        "environment": environment("torch", "numpy"),
    }


def _mean_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(row["family"] for row in rows if row["counts"])
    return {
        name: fmean(abs(row["error"]) for row in rows if row["counts"] and row["family"] == name)
        for name in names
    }


def _in_range(rows: Sequence[validation.Row]) -> dict[str, int]:
    known = [row for row in rows if row["between"]]
    return {"inside": sum(map(validation.is_inside, known)), "of": len(known)}


def table(result: Mapping[str, Any]) -> str:
    blocks = []
    for group, rows in groupby(result["rows"], key=lambda row: row["group"]):
        lines = [
            (
                row["what"],
                number(row["truth"]),
                number(row["simulated"]),
                f"{row['error']:+.1%}" + ("" if row["counts"] else " (cores shared)"),
            )
            for row in rows
        ]
        blocks.append(aligned([(group, "true", "simulated", "error"), *lines]))
    means = [(name, f"{error:.1%}") for name, error in result["mean_errors"].items()]
    blocks.append(aligned([("mean error", ""), *means]))
    blocks.append("in the 80 % interval: {inside} of {of}".format(**result["in_range"]))
    blocks.append(f"a month on 4,096 workers is simulated in {result['month_s']:.1f} s")
    return "\n\n".join(blocks)


def drawn(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    compared = [row for row in rows if row["kind"] != "exact"]
    families = list(dict.fromkeys(row["family"] for row in compared))
    with figure(9.0, 0.42 * len(families) + 1.6) as made:
        axis = made.subplots()
        axis.axvspan(-10, 10, color="#e6e8eb", linewidth=0)
        axis.axvline(0, color="#8a8f98", linewidth=1)
        for kind, colour, sign in (("published", LIMIT, "D"), ("measured", MEASURED, "o")):
            for counts in (True, False):
                chosen = [r for r in compared if (r["kind"], r["counts"]) == (kind, counts)]
                if not chosen:
                    continue
                axis.plot(
                    [100 * row["error"] for row in chosen],
                    [families.index(row["family"]) for row in chosen],
                    sign, color=colour, markersize=7,
                    markerfacecolor=colour if counts else "none",
                    label=kind if counts else f"{kind}, hosts share two cores",
                )  # fmt: skip
        axis.set_yticks(range(len(families)), families)
        axis.invert_yaxis()
        axis.set_xlabel("error of the simulated value, % (gray: within 10 %)")
        axis.set_title("simulated against published and measured values")
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        tidy(axis)
        axis.grid(visible=False, axis="y")
        return files(made, "validation")


if __name__ == "__main__":
    main()

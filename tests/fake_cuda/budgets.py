"""The committed costs of every case, and what a change of them means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("budgets.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "gpus.md"
BEGIN = "<!-- costs: written by `python tests/fake_cuda --write` -->"
END = "<!-- end of costs -->"
SHOWN = ("r3gan-256", "stylegan2-256")

# By kind of step (``due``, ``plain``), the counts of :class:`step_costs.Costs`.
Table = dict[str, dict[str, Any]]

# None of these may grow; the others, by 5 %.
EXACT = ("host_reads", "copies", "cpu", "float64", "map_kernels", "nondeterministic")
WITHIN = 1.05
SCALED = ("operators", "gib")


def load() -> dict[str, Table]:
    """Return the committed costs by case."""
    found: dict[str, Table] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def write(found: dict[str, Table], *, is_all: bool) -> None:
    """Replace the costs of these cases, or of all cases, and the table of the documentation."""
    known = {} if is_all else load()
    merged = dict(sorted((known | found).items()))
    FILE.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), merged), encoding="utf-8")


def exceeded(budget: Table, found: Table) -> list[str]:
    """Return a line for each count that is above its budget."""
    lines = []
    for kind, limits in budget.items():
        for key in (*EXACT, *SCALED):
            limit, value = _number(limits[key]), _number(found[kind][key])
            if value > (limit * WITHIN if key in SCALED else limit):
                lines.append(f"{kind} step: {key} = {value:g}, budget {limit:g}")
    return lines


def _number(value: Any) -> float:
    return sum(value.values()) if isinstance(value, dict) else value


def with_table(page: str, found: dict[str, Table]) -> str:
    """Return the page with the table of the two largest presets."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin
    assert end
    rows = [
        "| preset, samples per GPU | step | operators | convolutions (whole-map kernels) | TFLOP "
        "| GiB through kernels | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    steps = {"due": "all penalties due", "plain": "no penalty due"}
    for name in SHOWN:
        for kind, costs in found[f"preset/{name}"].items():
            rows.append(
                f"| `{name}`, {costs['batch']} | {steps[kind]} | {costs['operators']:,} "
                f"| {costs['convolutions']:,} ({costs['map_kernels']:,}) | {costs['tflop']:.1f} "
                f"| {costs['gib']:.0f} | {costs['peak_gib']:.1f} |"
            )
    table = "\n".join(rows)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"

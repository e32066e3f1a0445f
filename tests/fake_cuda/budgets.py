"""The committed costs of every case, and what a change of them means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("budgets.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "gpus.md"
BEGIN = "<!-- {}: written by `python tests/fake_cuda --write` -->"
END = "<!-- end of {} -->"
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
    """Replace the costs of these cases, or of all cases, and the tables of the documentation."""
    known = {} if is_all else load()
    merged = dict(sorted((known | found).items()))
    FILE.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), merged), encoding="utf-8")


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


def with_tables(page: str, found: dict[str, Table]) -> str:
    """Return the page with the tables of the two largest presets."""
    for name, rows in (("costs", _costs(found)), ("roofline", _roofline(found))):
        head, begin, rest = page.partition(BEGIN.format(name))
        _, end, tail = rest.partition(END.format(name))
        assert begin
        assert end
        page = "\n".join([head + begin, "", *rows, "", end + tail])
    return page


def _shown(
    found: dict[str, Table], cases: tuple[str, ...] = ("preset",)
) -> Iterator[tuple[str, dict[str, Any]]]:
    kinds = {"due": "all penalties due", "plain": "no penalty due"}
    for name in SHOWN:
        for case in cases:
            suffix = ", without Triton" if case == "without-triton" else ""
            for kind, costs in found[f"{case}/{name}"].items():
                yield f"`{name}`, {costs['batch']} | {kinds[kind]}{suffix}", costs


def _costs(found: dict[str, Table]) -> Iterator[str]:
    yield (
        "| preset, samples per GPU | step | operators | convolutions (whole-map kernels) | TFLOP "
        "| GiB through kernels | peak GiB |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for step, costs in _shown(found, ("preset", "without-triton")):
        yield (
            f"| {step} | {costs['operators']:,} "
            f"| {costs['convolutions']:,} ({costs['map_kernels']:,}) | {costs['tflop']:.1f} "
            f"| {costs['gib']:.0f} | {costs['peak_gib']:.1f} |"
        )


def _roofline(found: dict[str, Table]) -> Iterator[str]:
    (_, first), *_ = _shown(found)
    gpus = [name for name, milliseconds in first["roofline_ms"].items() if milliseconds]
    yield f"| preset, samples per GPU | step | {' | '.join(gpus)} |"
    yield "| --- " * (2 + len(gpus)) + "|"
    for step, costs in _shown(found):
        times = (f"{costs['roofline_ms'][gpu]:.0f}" for gpu in gpus)
        yield f"| {step} | {' | '.join(times)} |"

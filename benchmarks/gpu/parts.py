"""The parts of the benchmark, each of which runs in a process of its own."""

from __future__ import annotations

from fnmatch import fnmatch

from benchmarks.gpu import correctness
from benchmarks.gpu.runner import Part
from benchmarks.gpu.tables import LARGE
from gatdist.bench.presets import PRESETS

PROFILED = (*LARGE, "r3gan-64", "biggan-128")
_FIRST = ("r3gan-256", "stylegan2-256", "r3gan-64", "biggan-128")


def implementations(preset: str) -> list[str]:
    """Return what a preset is measured with, of :data:`benchmarks.gpu.speed.IMPLEMENTATIONS`."""
    config = PRESETS[preset].config()
    network = config.model.generator.name
    names = ["gatdist", "hand_written"]
    if network in ("r3gan", "stylegan2", "wavegan"):
        names.append("published")
    if network == "stylegan2":
        names.append("published_by_sample")
    if preset in LARGE:
        names += ["gatdist_graphs", "gatdist_without_triton"]
    if preset in LARGE and "path_length" not in config.game.penalties:
        names.append("gatdist_compiled")  # of what has no second derivatives: the generator
    return names


def parts() -> list[Part]:
    """Return all parts in the order in which they run."""
    found = [Part(f"correctness/{name}") for name in correctness.CHECKS]
    for preset in dict.fromkeys((*_FIRST, *PRESETS)):
        limit_s = 420 if preset in LARGE else 180
        found += [
            Part(f"speed/{preset}/{name}", 60 if preset in LARGE else 30, limit_s)
            for name in implementations(preset)
        ]
        if preset in PROFILED:
            found.append(Part(f"kernels/{preset}", limit_s=limit_s))
    return found


def chosen(patterns: list[str]) -> list[Part]:
    """Return the parts that match any of the patterns, or all parts."""
    found = parts()
    return [p for p in found if not patterns or any(fnmatch(p.name, each) for each in patterns)]

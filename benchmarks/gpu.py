"""The step on an accelerator: is it right, and how fast? Needs torch, numpy and pydantic; no Ray.

python -m benchmarks.gpu [--device cuda] [--size NAME]... [--rounds 7] [--out FOLDER]

* Right: after a few steps in every precision and layout, weights are near those of float64;
  compiled networks, and a step or a generator replayed from a CUDA graph, give what plain ones do.
* Fast: samples a second of gatdist's rules and of a bare loop, in interleaved rounds, and what
  a step takes of memory at its peak.

Writes ``result.json``, and prints a table. Exit status 1: something was not right. What
could not be done here is told with its reason. ``--device cpu`` is for trying the script.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from gatdist.bench.bare import Bare
from gatdist.bench.case import BFLOAT16, SIZES, Case, Overrides, Size
from gatdist.bench.gatdist_case import RULES, GatdistCase
from gatdist.bench.memory import measure_memory
from gatdist.bench.rounds import interleave, settled, speed, steps_in_a_turn
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.recording import CudaRecorder, cuda_recorder
from gatdist.training.graphs import WARM_UP_STEPS

SMALL = Size("dcgan16", "dcgan", {"width": 16}, (3, 16, 16), 16)
LARGE = (
    Size("dcgan64_w64", "dcgan", {"width": 64}, (3, 64, 64), 128),
    Size("r3gan64", "r3gan", {"width": 256, "max_width": 768}, (3, 64, 64), 64),
    Size("stylegan2_64", "stylegan2", {}, (3, 64, 64), 32),
)
KNOWN = {size.name: size for size in (SMALL, *LARGE, *SIZES.values())}
# Relative error of what a few steps have moved, as float64 has it.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.3, "float16": 0.1}
STEPS = 4
# Adam divides by gradients; an ε of their size keeps rounding from deciding signs.
_ADAM = {"learning_rate": 1e-3, "eps": 1e-4}
STEADY: Overrides = {"optim": {"generator": _ADAM, "discriminator": _ADAM}}
CHECKED = ("alternating", "simultaneous", "one_stage")
TIMED = (
    "alternating",
    "alternating_kept",
    "alternating_bfloat16",
    "one_stage",
    "one_stage_bfloat16",
)
COMPILED: Overrides = {"precision": {"compile": ["generator", "discriminator"]}}
BARE = {"bare": None, "bare_bfloat16": BFLOAT16}
Row = dict[str, Any]


def main() -> int:
    """Check, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, or cpu")
    parser.add_argument("--size", action="append", choices=KNOWN, help="may be given often")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-s", type=float, default=1.0, help="of a case in a round")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE_gpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA device here; --device cpu tries it out")
        torch.cuda.set_device(device)
    compiles = not arguments.no_compile
    sizes = [KNOWN[name] for name in arguments.size or [SMALL.name, *(size.name for size in LARGE)]]
    found: dict[str, Any] = {
        "correctness": [
            *precisions(device),
            *(compiled(device) if compiles else ()),
            *graphs(device),
        ],
        "throughput": [
            row
            for size in sizes
            for row in throughput(device, size, arguments.rounds, arguments.turn_s, compiles)
        ],
        "environment": environment() | {"gpu": _name(device), "cuda": torch.version.cuda},
    }
    out = arguments.out or Path(f"benchmarks/results/{time.strftime('%Y-%m-%d')}_gpu")
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(table(found))
    return int(any(row["ok"] is False for row in found["correctness"]))


def _name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


# Is it right?


def precisions(device: torch.device) -> Iterator[Row]:
    """Each rule in each precision and layout, beside float64."""
    for rule in CHECKED:
        reference = RULES[rule] | STEADY | {"precision": {"dtype": "float64"}}
        start, there = trained(device, reference, 0), trained(device, reference)
        for dtype, tolerance in TOLERANCE.items():
            for channels_last in (False, True):
                precision = {"dtype": dtype, "channels_last": channels_last}
                here = trained(device, RULES[rule] | STEADY | {"precision": precision})
                error = ((here - there).norm() / (there - start).norm()).item()
                layout = ", channels last" if channels_last else ""
                yield _checked(f"{rule}, {dtype}{layout}", error, tolerance)


def compiled(device: torch.device) -> Iterator[Row]:
    """Compiled networks beside plain ones."""
    for rule in ("alternating", "one_stage"):
        with telling(f"{rule}, torch.compile", rows := []):
            start, there = (trained(device, RULES[rule] | STEADY, n) for n in (0, STEPS))
            here = trained(device, RULES[rule] | STEADY | COMPILED)
            error = ((here - there).norm() / (there - start).norm()).item()
            rows.append(_checked(f"{rule}, torch.compile", error, TOLERANCE["float32"]))
        yield from rows


def graphs(device: torch.device) -> Iterator[Row]:
    """A step and a generator replayed from CUDA graphs beside plain ones."""
    for name, check in (("a step", recorded_step), ("a generator", recorded_generator)):
        title = f"{name} from a CUDA graph"
        rows: list[Row] = []
        if device.type != "cuda":
            rows.append({"name": title, "ok": None, "reason": "needs CUDA"})
        else:
            with telling(title, rows):
                rows.append(check(device, title))
        yield from rows


@contextmanager
def telling(name: str, rows: list[Row]) -> Iterator[None]:
    """What goes wrong in here becomes a row."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        rows.append({"name": name, "ok": False, "reason": reason})


def _checked(name: str, error: float, tolerance: float) -> Row:
    return {"name": name, "error": error, "tolerance": tolerance, "ok": error < tolerance}


def trained(device: torch.device, overrides: Overrides, steps: int = STEPS) -> Tensor:
    """All weights after a few steps, float64 on the CPU."""
    case = GatdistCase(SMALL, overrides, LocalCommunicator(device))
    for _ in range(steps):
        case.step()
    return weights(case)


def weights(case: Case) -> Tensor:
    """Both players', float64 on the CPU."""
    networks = (case.generator, case.discriminator)
    parameters = [p for network in networks for p in network.parameters()]
    return torch.cat([p.detach().double().flatten().cpu() for p in parameters])


def recorded_step(device: torch.device, title: str) -> Row:
    """Replay the step's phases and compare weights and times with plain steps."""
    overrides = RULES["alternating"] | STEADY
    plain = GatdistCase(SMALL, overrides, LocalCommunicator(device))
    case = GatdistCase(SMALL, overrides, LocalCommunicator(device), cuda_recorder(device))
    start = weights(plain)
    for _ in range(WARM_UP_STEPS + STEPS):
        plain.step()
        case.step()
    there = weights(plain)
    error = ((weights(case) - there).norm() / (there - start).norm()).item()
    row = _checked(title, error, TOLERANCE["float32"])
    return row | {"speedup": timed(plain.step) / timed(case.step)}


def recorded_generator(device: torch.device, title: str) -> Row:
    """Replay a generator, as one does to sample."""
    case = GatdistCase(SMALL, RULES["alternating"], LocalCommunicator(device))
    generator = case.generator.eval()
    latents = torch.randn(1, case.config.model.latent_size, device=device)

    @torch.no_grad()
    def generate() -> Tensor:
        made: Tensor = generator(latents, None)
        return made

    recorder = CudaRecorder(device)
    for _ in range(WARM_UP_STEPS):
        recorder.warm_up(generate)
    made, replay = recorder.record(generate)
    latents.normal_()
    replay()
    there = generate()
    error = ((made - there).norm() / there.norm()).item()
    return _checked(title, error, 1e-3) | {"speedup": timed(generate) / timed(replay)}


def timed(function: Callable[[], object], calls: int = 50) -> float:
    """Seconds of a call, when many follow one another."""
    function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


# How fast is it?


def throughput(
    device: torch.device, size: Size, rounds: int, turn_s: float, compiles: bool
) -> list[Row]:
    """Samples a second and memory, all cases in turn."""
    builders: dict[str, Callable[[], Case]] = {
        **{n: partial(Bare, size, precision, str(device)) for n, precision in BARE.items()},
        **{n: partial(GatdistCase, size, RULES[n], LocalCommunicator(device)) for n in TIMED},
    }
    if device.type == "cuda":
        builders["alternating_recorded"] = lambda: GatdistCase(
            size, RULES["alternating"], LocalCommunicator(device), cuda_recorder(device)
        )
    if compiles:
        precision = BFLOAT16["precision"] | COMPILED["precision"]
        overrides = RULES["alternating"] | {"precision": precision}
        builders["alternating_bfloat16_compiled"] = partial(
            GatdistCase, size, overrides, LocalCommunicator(device)
        )
    memory = {name: peak_bytes(device, build) for name, build in builders.items()}
    with settled():
        cases = {name: build() for name, build in builders.items()}
        cases["bare"].run(1)
        steps = steps_in_a_turn(1, cases["bare"].run(1), turn_s)
        report = partial(print, f"{size.name}:", file=sys.stderr, flush=True)
        seconds = interleave(list(cases), rounds, lambda name: cases[name].run(steps), report)
    return [_timed(size, name, steps, seconds, memory[name]) for name in cases]


def _timed(size: Size, name: str, steps: int, seconds: dict[str, list[float]], peak: int) -> Row:
    return {
        "name": name,
        "size": size.name,
        **speed(size.batch * steps, seconds[name], seconds["bare"]),
        "step_s": median(seconds[name]) / steps,
        "peak_bytes": peak,
    }


def peak_bytes(device: torch.device, build: Callable[[], Case]) -> int:
    """The most that two steps need, beside what lasts from step to step."""
    if device.type != "cuda":
        return measure_memory(build).peak_bytes
    case = build()
    case.run(1)
    case.release_gradients()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    case.run(1)
    return torch.cuda.max_memory_allocated(device) - before


def table(found: dict[str, Any]) -> str:
    """What was found, for people."""
    lines = []
    for row in found["correctness"]:
        verdict = {True: "right", False: "WRONG", None: "left out"}[row["ok"]]
        message = row.get("reason") or f"error {row['error']:.2g}, at most {row['tolerance']:.2g}"
        if "speedup" in row:
            message += f"; {row['speedup']:.2f} times as fast"
        lines.append(f"{verdict:9} {row['name']:44} {message}")
    lines.append("")
    lines += [
        f"{row['size']:14} {row['name']:24} {row['samples_per_s']:10.0f} samples/s  × bare "
        f"{row['ratio_to_bare']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})  "
        f"peak {row['peak_bytes'] / 2**20:.0f} MiB"
        for row in found["throughput"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Correctness and speed of the step on an accelerator. Needs torch, numpy and pydantic; no Ray.

Weights after a few steps are compared with those of float64, compiled and recorded steps with eager
ones. Exit status 1: something is wrong. ``--device cpu`` tries the script.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import parser, positive, progress, save
from gatdist.bench.cases import BFLOAT16, RULES, SIZES, Case, Overrides, Size, gatdist_case
from gatdist.bench.memory import measure_memory
from gatdist.bench.reference import Bare
from gatdist.bench.rounds import settled, timed
from gatdist.bench.step import measure_cases
from gatdist.common.numerics import kernels, tf32
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
# Error relative to the change of the weights in float64.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.3, "float16": 0.1}
STEPS = 4
# Adam divides by gradients; with an ε of their size, rounding does not decide signs.
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


@tf32(False)
@kernels(deterministic=False)  # as in runs with the default configuration
def main() -> int:
    arguments = parser("gpu", __doc__)
    arguments.add_argument("--device", default="cuda", help="cuda (default), cuda:1, or cpu")
    arguments.add_argument("--size", action="append", choices=KNOWN)
    arguments.add_argument("--rounds", type=positive, default=7)
    arguments.add_argument("--turn-s", type=float, default=1.0)
    arguments.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    given = arguments.parse_args()
    device, compiles = torch.device(given.device), not given.no_compile
    gpu = None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            arguments.error("--device cuda: torch finds no CUDA device; --device cpu tries it out")
        torch.cuda.set_device(device)
        gpu = torch.cuda.get_device_name(device)
    sizes = [KNOWN[name] for name in given.size or [SMALL.name, *(size.name for size in LARGE)]]
    checks = [*precisions(device), *(compiled(device) if compiles else ()), *graphs(device)]
    found = {
        "correctness": checks,
        "throughput": [
            row
            for size in sizes
            for row in throughput(device, size, given.rounds, given.turn_s, compiles)
        ],
    }
    save(given.out, found, gpu=gpu, cuda=torch.version.cuda)
    print(table(found))
    return int(any(row["ok"] is False for row in checks))


# Correctness


def precisions(device: torch.device) -> Iterator[Row]:
    for rule in CHECKED:
        reference = RULES[rule] | STEADY | {"precision": {"dtype": "float64"}}
        start, there = trained(device, reference, 0), trained(device, reference)
        for dtype, tolerance in TOLERANCE.items():
            for channels_last in (False, True):
                precision = {"dtype": dtype, "channels_last": channels_last}
                here = trained(device, RULES[rule] | STEADY | {"precision": precision})
                error = _error(here, there, start)
                layout = ", channels last" if channels_last else ""
                yield _checked(f"{rule}, {dtype}{layout}", error, tolerance)


def compiled(device: torch.device) -> Iterator[Row]:
    for rule in ("alternating", "one_stage"):
        with failing(f"{rule}, torch.compile", rows := []):
            start, there = (trained(device, RULES[rule] | STEADY, n) for n in (0, STEPS))
            here = trained(device, RULES[rule] | STEADY | COMPILED)
            error = _error(here, there, start)
            rows.append(_checked(f"{rule}, torch.compile", error, TOLERANCE["float32"]))
        yield from rows


def graphs(device: torch.device) -> Iterator[Row]:
    for name, check in (("a step", recorded_step), ("a generator", recorded_generator)):
        title = f"{name} from a CUDA graph"
        rows: list[Row] = []
        if device.type != "cuda":
            rows.append({"name": title, "ok": None, "reason": "needs CUDA"})
        else:
            with failing(title, rows):
                rows.append(check(device, title))
        yield from rows


@contextmanager
def failing(name: str, rows: list[Row]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        rows.append({"name": name, "ok": False, "reason": reason})


def _checked(name: str, error: float, tolerance: float) -> Row:
    return {"name": name, "error": error, "tolerance": tolerance, "ok": error < tolerance}


def _error(here: Tensor, there: Tensor, start: Tensor) -> float:
    return ((here - there).norm() / (there - start).norm()).item()


def trained(device: torch.device, overrides: Overrides, steps: int = STEPS) -> Tensor:
    case = gatdist_case(SMALL, overrides, LocalCommunicator(device))
    for _ in range(steps):
        case.step()
    return weights(case)


def weights(case: Case) -> Tensor:
    """Return both players' weights, float64 on the CPU."""
    networks = (case.generator, case.discriminator)
    parameters = [p for network in networks for p in network.parameters()]
    return torch.cat([p.detach().double().flatten().cpu() for p in parameters])


def recorded_step(device: torch.device, title: str) -> Row:
    overrides = RULES["alternating"] | STEADY
    plain = gatdist_case(SMALL, overrides, LocalCommunicator(device))
    case = gatdist_case(SMALL, overrides, LocalCommunicator(device), cuda_recorder(device))
    start = weights(plain)
    for _ in range(WARM_UP_STEPS + STEPS):
        plain.step()
        case.step()
    row = _checked(title, _error(weights(case), weights(plain), start), TOLERANCE["float32"])
    return row | {"speedup": call_s(plain.step) / call_s(case.step)}


def recorded_generator(device: torch.device, title: str) -> Row:
    case = gatdist_case(SMALL, RULES["alternating"], LocalCommunicator(device))
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
    return _checked(title, error, 1e-3) | {"speedup": call_s(generate) / call_s(replay)}


def call_s(function: Callable[[], object], calls: int = 50) -> float:
    def many(count: int) -> None:
        for _ in range(count):
            function()
        torch.cuda.synchronize()

    many(1)
    return timed(partial(many, calls)).wall / calls


# Speed


def throughput(
    device: torch.device, size: Size, rounds: int, turn_s: float, compiles: bool
) -> list[Row]:
    builders: dict[str, Callable[[], Case]] = {
        **{n: partial(Bare, size, precision, str(device)) for n, precision in BARE.items()},
        **{n: partial(gatdist_case, size, RULES[n], LocalCommunicator(device)) for n in TIMED},
    }
    if device.type == "cuda":
        builders["alternating_recorded"] = lambda: gatdist_case(
            size, RULES["alternating"], LocalCommunicator(device), cuda_recorder(device)
        )
    if compiles:
        precision = BFLOAT16["precision"] | COMPILED["precision"]
        overrides = RULES["alternating"] | {"precision": precision}
        builders["alternating_bfloat16_compiled"] = partial(
            gatdist_case, size, overrides, LocalCommunicator(device)
        )
    memory = {name: peak_bytes(device, build) for name, build in builders.items()}
    with settled():
        cases = {name: build() for name, build in builders.items()}
        rows = measure_cases(size, cases, rounds, turn_s, progress)
    return [row | {"peak_bytes": memory[row["name"]]} for row in rows]


def peak_bytes(device: torch.device, build: Callable[[], Case]) -> int:
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
    lines = []
    for row in found["correctness"]:
        outcome = {True: "ok", False: "WRONG", None: "skipped"}[row["ok"]]
        message = row.get("reason") or f"error {row['error']:.2g}, at most {row['tolerance']:.2g}"
        if "speedup" in row:
            message += f"; {row['speedup']:.2f} times as fast"
        lines.append(f"{outcome:9} {row['name']:44} {message}")
    lines.append("")
    lines += [
        f"{row['size']:14} {row['name']:24} {row['samples_per_s']:10.0f} samples/s  × bare "
        f"{row['ratio_to_bare']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})  "
        f"CPU × bare {row['cpu_to_bare']:.2f}  "
        f"peak {row['peak_bytes'] / 2**20:.0f} MiB"
        for row in found["throughput"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Is the step on the device the one that float64 on the CPU makes?

Errors are relative: ‖found − expected‖ / ‖expected‖, of weights to their change in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatdist import nn as own
from gatdist.bench.cases import RULES, Case, Overrides, Size, gatdist_case
from gatdist.bench.presets import PRESETS
from gatdist.bench.rounds import timed
from gatdist.common.numerics import tf32
from gatdist.models.image.resampling import downsample, upsample
from gatdist.models.image.stylegan2 import StyledConv2d
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.parallel.recording import CudaRecorder, cuda_recorder
from gatdist.training.graphs import WARM_UP_STEPS
from gatdist.training.step import as_configured

CPU = torch.device("cpu")
SMALL = Size("dcgan16", "dcgan", {"width": 16}, (3, 16, 16), 16)
# TF32 rounds as float16 does.
TOLERANCE = {"float32": 0.02, "float32, TF32": 0.1, "bfloat16": 0.3, "float16": 0.1}
STEPS = 4
# Adam divides by gradients; with an ε of their size, rounding does not decide signs.
_ADAM = {"learning_rate": 1e-3, "eps": 1e-4}
STEADY: Overrides = {"optim": {"generator": _ADAM, "discriminator": _ADAM}}
COMPILED: Overrides = {"precision": {"compile": ["generator", "discriminator"]}}
Row = dict[str, Any]


def run(name: str, device: torch.device) -> dict[str, Any]:
    """Return the ``rows`` of a check: ``name``, ``ok``, and ``error`` of ``tolerance``.

    ``ok`` is None with a ``reason`` where the device can't do it.
    """
    return {"rows": list(CHECKS[name](device))}


# Steps


def precisions(rule: str, device: torch.device) -> Iterator[Row]:
    """Weights after some steps, by precision and layout, compared with float64 on the CPU."""
    reference = RULES[rule] | STEADY | {"precision": {"dtype": "float64"}}
    start, there = trained(CPU, reference, 0), trained(CPU, reference)
    for name, tolerance in {"float64": 1e-6, **TOLERANCE}.items():
        dtype, *fast = name.split(", ")
        for channels_last in (False, True):
            precision = {"dtype": dtype, "channels_last": channels_last, "tf32": bool(fast)}
            here = trained(device, RULES[rule] | STEADY | {"precision": precision})
            layout = ", channels last" if channels_last else ""
            yield checked(f"{rule}, {name}{layout}", _error(here, there, start), tolerance)


def compiled(device: torch.device) -> Iterator[Row]:
    """Weights after some steps of compiled networks."""
    for rule in ("alternating", "one_stage"):
        start, there = (trained(device, RULES[rule] | STEADY, n) for n in (0, STEPS))
        here = trained(device, RULES[rule] | STEADY | COMPILED)
        error = _error(here, there, start)
        yield checked(f"{rule}, torch.compile", error, TOLERANCE["float32"])


def repeated(device: torch.device) -> Iterator[Row]:
    """Two runs, and a run continued from a copy of its state, bit for bit."""
    canonical = RULES["canonical"] | STEADY
    for dtype in ("float32", "bfloat16"):
        overrides = canonical | {"precision": {"dtype": dtype}}
        one, other = (trained(device, overrides) for _ in range(2))
        yield identical(f"canonical, {dtype}: two runs", one, other)
        yield identical(f"canonical, {dtype}: continued", continued(device, overrides), one)
    one, other = (trained(device, RULES["alternating"] | STEADY) for _ in range(2))
    same = torch.equal(one, other)
    yield {"name": "fast: two runs", "ok": None, "reason": "equal" if same else "not equal"}


def trained(device: torch.device, overrides: Overrides, steps: int = STEPS) -> Tensor:
    """Return the weights after some steps."""
    with as_configured(SMALL.config(overrides)):
        case = gatdist_case(SMALL, overrides, LocalCommunicator(device))
        for _ in range(steps):
            case.step()
    return weights(case)


def continued(device: torch.device, overrides: Overrides) -> Tensor:
    """Return the weights after as many steps, half of them by a state restored from tensors."""
    with as_configured(SMALL.config(overrides)):
        first, second = (
            gatdist_case(SMALL, overrides, LocalCommunicator(device)) for _ in range(2)
        )
        for _ in range(STEPS // 2):
            first.step()
        saved = {
            name: tensor.to("cpu", copy=True) for name, tensor in first.state.tensors().items()
        }
        second.state.load(first.state.samples_seen, saved)
        for _ in range(STEPS - STEPS // 2):
            second.step()
    return weights(second)


def weights(case: Case) -> Tensor:
    """Return both players' weights, float64 on the CPU."""
    networks = (case.generator, case.discriminator)
    parameters = [p for network in networks for p in network.parameters()]
    return torch.cat([p.detach().double().flatten().cpu() for p in parameters])


# CUDA graphs


def graphs(device: torch.device) -> Iterator[Row]:
    """A step and a generator from CUDA graphs."""
    for name, check in (("a step", recorded_step), ("a generator", recorded_generator)):
        title = f"{name} from a CUDA graph"
        if device.type != "cuda":
            yield {"name": title, "ok": None, "reason": "needs CUDA"}
        else:
            with as_configured(SMALL.config({})):
                yield check(device, title)


def recorded_step(device: torch.device, title: str) -> Row:
    overrides = RULES["alternating"] | STEADY
    plain = gatdist_case(SMALL, overrides, LocalCommunicator(device))
    case = gatdist_case(SMALL, overrides, LocalCommunicator(device), cuda_recorder(device))
    start = weights(plain)
    for _ in range(WARM_UP_STEPS + STEPS):
        plain.step()
        case.step()
    row = checked(title, _error(weights(case), weights(plain), start), TOLERANCE["float32"])
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
    return checked(title, error, 1e-3) | {"speedup": call_s(generate) / call_s(replay)}


def call_s(function: Callable[[], object], calls: int = 50) -> float:
    def many(count: int) -> None:
        for _ in range(count):
            function()
        torch.cuda.synchronize()

    many(1)
    return timed(partial(many, calls)).wall / calls


# Derivatives

_BY_PRECISION = {"float64": 1e-9, "float32": 2e-5, "float32, TF32": 2e-2}
# Of a convolution: its function, input, weight, and further arguments.
_CONVOLUTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], Any]] = {
    "3×3": (own.conv2d, (4, 16, 9, 11), (24, 16, 3, 3), {"padding": 1}),
    "3×3, stride 2": (own.conv2d, (4, 16, 10, 11), (24, 16, 3, 3), {"stride": 2}),
    "3×3, 4 groups": (own.conv2d, (4, 16, 9, 11), (24, 4, 3, 3), {"padding": 1, "groups": 4}),
    "transposed, stride 2": (own.conv_transpose2d, (4, 16, 7, 5), (16, 24, 3, 3), {"stride": 2}),
    "1D, stride 4": (own.conv1d, (4, 8, 64), (12, 8, 25), {"stride": 4, "padding": 12}),
}


def convolutions(device: torch.device) -> Iterator[Row]:
    """Values, first and second derivatives of the convolutions of :mod:`gatdist.nn`."""
    for name, (function, *shapes, options) in _CONVOLUTIONS.items():
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        compute = partial(function, **options)
        there = derivatives(compute, tensors, tensors[1:])
        for precision, tolerance in _BY_PRECISION.items():
            dtype, fast = _dtype(precision)
            for last in (False, True) if len(shapes[0]) == 4 else (False,):
                layout = torch.channels_last if last else torch.contiguous_format
                moved = [t.to(device, dtype, memory_format=layout) for t in tensors]
                with tf32(fast):
                    here = derivatives(compute, moved, moved[1:])
                title = f"convolution {name}, {precision}{', channels last' * last}"
                yield checked(title, _largest(here, there), tolerance)


def networks(device: torch.device) -> Iterator[Row]:
    """Values, first and second derivatives of small networks of several families."""
    for preset in ("r3gan-256", "stylegan2-256", "wavegan-16384", "digits", "words"):
        case = PRESETS[preset].small()
        config = case.config(["precision.dtype=float64"])
        built = case.networks(config)
        torch.manual_seed(0)
        for player, network in zip(("generator", "discriminator"), built, strict=True):
            for parameter in network.parameters():  # some start at zero
                parameter.data += 0.1 * torch.randn_like(parameter)
            shape = [config.model.latent_size] if player == "generator" else case.shape
            inputs = [torch.rand(8, *shape, dtype=torch.float64)]
            if size := getattr(network, "noise_size", 0):
                inputs.append(torch.randn(8, size, dtype=torch.float64))
            yield from _of_network(f"{preset} {player}", network, inputs, device)


def _of_network(
    title: str, network: nn.Module, inputs: list[Tensor], device: torch.device
) -> Iterator[Row]:
    def compute(x: Tensor, *noise: Tensor) -> Tensor:
        found: Tensor = network(x, None, *noise)
        return found

    there = derivatives(compute, inputs, list(network.parameters()))
    for precision, tolerance in _BY_PRECISION.items():
        dtype, fast = _dtype(precision)
        network.to(device, dtype)
        with tf32(fast):
            moved = [t.to(device, dtype) for t in inputs]
            here = derivatives(compute, moved, list(network.parameters()))
        network.to("cpu", torch.float64)
        yield checked(f"{title}, {precision}", _largest(here, there), 10 * tolerance)


# Kernels of Triton


class _Block(nn.Module):
    """R3GAN's residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.widen = own.Conv2d(channels, wide, 1)
        self.grouped = own.Conv2d(wide, wide, 3, padding=1, groups=wide // 16)
        self.narrow = own.Conv2d(wide, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return own.bottleneck(x, self.widen, self.grouped, self.narrow, negative_slope=0.2)


class _Styled(nn.Module):
    """What follows StyleGAN2's convolutions, and the filter in front of it."""

    style: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = StyledConv2d(channels, channels, 16, up=True)
        nn.init.ones_(self.layer.noise_strength)
        self.register_buffer("style", torch.linspace(-1, 1, 16)[None])

    def forward(self, x: Tensor) -> Tensor:
        noise = x[:, :1].detach().repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.layer(downsample(upsample(x)), self.style.expand(len(x), -1), noise)


_LAYERS: dict[str, Callable[[int], nn.Module]] = {"residual block": _Block, "styles": _Styled}
_BY_DTYPE = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.2}
_SMALL_LAYER, _LARGE_LAYER = (2, 32, 6, 4), (16, 96, 256, 256)


def kernels(device: torch.device) -> Iterator[Row]:
    """Layers with fused kernels: derivatives, and time compared with torch's operators."""
    for name, make in _LAYERS.items():
        layer = make(_SMALL_LAYER[1]).double()
        x = torch.randn(_SMALL_LAYER, generator=torch.Generator().manual_seed(0)).double()
        there = derivatives(layer, [x], list(layer.parameters()))
        for precision, tolerance in _BY_DTYPE.items():
            dtype = getattr(torch, precision)
            for last in (False, True):
                title = f"{name}, {precision}{', channels last' * last}"
                layout = torch.channels_last if last else torch.contiguous_format
                moved = x.to(device, dtype, memory_format=layout)
                if not own.fuses(moved):
                    yield {"name": title, "ok": None, "reason": "no kernels of Triton here"}
                    continue
                layer = layer.to(device, dtype)
                here = derivatives(layer, [moved], list(layer.parameters()))
                layer = layer.to("cpu", torch.float64)
                row = checked(title, _largest(here, there), tolerance)
                if device.type == "cuda":
                    large = torch.randn(_LARGE_LAYER, device=device, dtype=dtype)
                    row["speedup"] = _speedup(make, large.to(memory_format=layout))
                yield row


def _speedup(make: Callable[[int], nn.Module], x: Tensor) -> float:
    """Return how many times as fast forward and backward of a layer are as without kernels."""
    layer = make(x.shape[1]).to(x.device, x.dtype)
    x.requires_grad_()

    def step() -> None:
        y = layer(x)
        y.backward(torch.ones_like(y))

    step()
    fused_s = call_s(step, 10)
    with own.without_kernels():
        step()
        return call_s(step, 10) / fused_s


def derivatives(
    compute: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor]
) -> list[Tensor]:
    """Return outputs, their slopes by the first input, and the derivatives of its squared norm."""
    first = inputs[0].detach().requires_grad_()
    rest = [t.requires_grad_() if any(t is w for w in weights) else t for t in inputs[1:]]
    out = compute(first, *rest)
    (slopes,) = torch.autograd.grad(out.square().sum(), first, create_graph=True)
    second = torch.autograd.grad(slopes.square().mean(), [first, *weights], materialize_grads=True)
    by_weights = torch.cat([t.flatten() for t in second[1:]])
    return [t.detach().double().cpu() for t in (out, slopes, second[0], by_weights)]


def _dtype(precision: str) -> tuple[torch.dtype, bool]:
    return torch.float64 if precision == "float64" else torch.float32, "TF32" in precision


def _largest(here: list[Tensor], there: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(here, there, strict=True))


# Rows


def checked(name: str, error: float, tolerance: float) -> Row:
    return {"name": name, "error": error, "tolerance": tolerance, "ok": error < tolerance}


def identical(name: str, here: Tensor, there: Tensor) -> Row:
    different = (here != there).double().mean().item()
    row = {"name": name, "ok": different == 0}
    return row if row["ok"] else row | {"reason": f"{different:.2%} of the weights differ"}


def _error(here: Tensor, there: Tensor, start: Tensor) -> float:
    return ((here - there).norm() / (there - start).norm()).item()


CHECKS: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    **{rule: partial(precisions, rule) for rule in ("alternating", "simultaneous", "one_stage")},
    "convolutions": convolutions,
    "networks": networks,
    "kernels": kernels,
    "repeated": repeated,
    "graphs": graphs,
    "compiled": compiled,
}

"""Operators that fuse several of torch's into one Triton kernel, for large tensors on CUDA.

Each is an operator of ``torch.ops.gatdist``, without derivatives, so that fake tensors and
profilers see it as one; the layers that call it define the derivatives. :func:`fuses` says whether
they may: Triton is optional, and comes with torch's builds for CUDA.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gatdist.nn.derivatives import is_plain

# Types of devices with kernels; tests add "cpu", where Triton's interpreter runs them.
DEVICES = {"cuda"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_PIXELS = 2**29  # of a sample; they are int32, and 4 times as many after upsampling
_CHANNELS = 64  # of a tile, at most
_TILE = 2048  # numbers in it
_FIR_TILE = 512  # with a pointer for each tap
_STEPS = 8  # tiles that one program adds up
# A product of fewer operations per number that it moves takes as long as the memory.
_MEMORY_BOUND = 256
# Philox4x32-10 of zeros, from Random123's known answers.
_FIRST_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)

_enabled = True
_found: dict[torch.device, bool] = {}  # whether kernels work
_checking = Lock()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Compute without Triton in this block, for comparisons."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def runs_kernels(x: Tensor) -> bool:
    """Return whether kernels for ``x`` run, or would on a GPU if it is a fake tensor."""
    return _enabled and (_is_counting() or _works(x.device))


def _is_counting() -> bool:
    """Return whether tensors are fake: operators are counted, not run."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _works(device: torch.device) -> bool:
    """Return whether kernels work on a device, which the first use finds out.

    Not while a CUDA graph is being recorded, where the host can't read results: it is recorded
    without kernels.
    """
    if device in _found:
        return _found[device]
    with _checking:
        if device not in _found:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            _found[device] = _is_correct(device)
        return _found[device]


def _is_correct(device: torch.device) -> bool:
    """Compile the kernels and compare them with torch.

    Wrong or missing kernels must not end or change a run: it does without them then.
    """
    on_amd = torch.version.hip is not None  # untested
    if device.type not in DEVICES or on_amd:
        return False
    try:
        if find_spec("triton") is None:
            return False
        with torch.autocast(device.type, enabled=False):
            problem = "" if _agree(device) else "its results are wrong"
    except Exception as error:  # of a compiler, a driver, or Triton itself
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        warnings.warn(
            f"gatdist.nn: fused kernels are off, because Triton does not work on {device} "
            f"({problem}). Training is slower without them.",
            stacklevel=2,
        )
    return not problem


@torch.no_grad()
def _agree(device: torch.device) -> bool:
    """Compare each operator with torch, on small numbers that are exact in float16."""
    x = (torch.arange(2 * 16 * 64, device=device) % 13 - 6).view(2, 16, 8, 8).half()
    x = laid_out(x, True)
    bias, weight = x[0, :, 0, 0].contiguous(), x[:, :, 1, :1].flatten()[:256].repeat(8)[:256]
    weight = weight.view(16, 16, 1, 1)
    y, signs = activate(x, None, bias, None, None, 0.5, 1.0, True)
    biased = x + bias[:, None, None]
    pairs = [(y, functional.leaky_relu(biased, 0.5))]
    gradient, sums = activate_gradient(x, signs, None, None, None, 0.5, 1.0, True)
    expected = torch.where(biased > 0, x, 0.5 * x)
    pairs += [(gradient, expected), (sums[:, :, 0].sum((0, 1)), expected.float().sum((0, 2, 3)))]
    product, *_ = pointwise(x, weight, None, x, None, 1.0, 1.0, False, False)
    pairs += [(product, (functional.conv2d(x.float(), weight.float()) + x).half())]
    ones = torch.ones_like(x)
    pairs += [(fir(ones, 1, 2, 1, 1, 64.0)[:, :, 1, 1], 64 * ones[:, :, 0, 0])]
    words = philox(torch.zeros(1, dtype=torch.int64, device=device), 1, 0, 0, 0)
    pairs += [(words, torch.tensor([_FIRST_WORDS], device=device))]
    return all(torch.equal(a, b) for a, b in pairs)


def fuses(x: Tensor) -> bool:
    """Return whether layers on samples [n, c, h, w] use the operators of this module."""
    if x.dim() != 4 or x.dtype not in _DTYPES or is_plain(x):
        return False
    return x.numel() > 0 and x.shape[2] * x.shape[3] < _MOST_PIXELS and runs_kernels(x)


def fuses_product(x: Tensor, weight: Tensor) -> bool:
    """Return whether a 1×1 convolution of ``x`` may be :func:`pointwise`.

    Only where memory is the limit. Others are left to cuDNN.
    """
    outputs, inputs = weight.shape[:2]
    return (
        fuses(x)
        and x.dtype in _product_dtypes(x.device)
        and is_channels_last(x)
        and inputs % 16 == outputs % 16 == 0
        and inputs * outputs <= _MEMORY_BOUND * (inputs + outputs)
    )


def _product_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    if not _is_counting():
        if device.type == "cpu":  # Triton's interpreter multiplies the bits of bfloat16
            return (torch.float16,)
        if torch.cuda.get_device_capability(device) < (8, 0):  # no matrix units for Triton
            return ()
    return torch.float16, torch.bfloat16


def is_channels_last(x: Tensor) -> bool:
    """Return whether [n, c, h, w] has channels last in memory, and is not contiguous as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def laid_out(x: Tensor, last: bool) -> Tensor:
    """Return ``x`` with channels last, or contiguous."""
    layout = torch.channels_last if last else torch.contiguous_format
    return x.contiguous(memory_format=layout)


_library = torch.library.Library("gatdist", "DEF")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator by its kernel; ``fake`` returns its results uninitialized."""

    def define(launch: Callable[..., None]) -> Any:
        name = launch.__name__

        def run(*args: Any) -> Any:
            results, device = fake(*args), args[0].device
            # Triton launches on the current device.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                launch(*args, *(results if isinstance(results, tuple) else (results,)))
            return results

        _library.define(f"{name}{schema}")
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gatdist::{name}", fake, lib=_library)
        return getattr(torch.ops.gatdist, name)

    return define


def _kernels() -> Any:
    from gatdist.nn import kernels

    return kernels


def _empty(x: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    """Return an uninitialized [n, c, h, w] like ``x``, with channels last or contiguous."""
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _tiles(
    x: Tensor, last: bool, steps: int = 1, numbers: int = _TILE
) -> tuple[int, int, dict[str, Any]]:
    """Return numbers of programs, in all and for the pixels of a channel, and the tile's size."""
    n, channels, pixels = len(x), x.shape[1], math.prod(x.shape[2:])
    width = min(_CHANNELS, max(8, _power_of_2(channels))) if last else 8
    height = min(numbers // width, max(16, _power_of_2(pixels)))
    blocks = -(-pixels // (height * steps))
    tile = {"PIXELS": height, "CHANNELS": width, "LAST": last}
    return n * -(-channels // width) * blocks, blocks, tile


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _empty_signs(x: Tensor) -> Tensor:
    """Return a bit for each number of ``x``, in bytes along its rows in memory."""
    n, channels, pixels = len(x), x.shape[1], math.prod(x.shape[2:])
    rows, columns = (pixels, channels) if is_channels_last(x) else (channels, pixels)
    return x.new_empty(n, rows, (columns + 7) // 8, dtype=torch.uint8)


def _activated(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _empty_signs(x) if args[-1] else x.new_empty(0, dtype=torch.uint8)


@_operator(
    "(Tensor x, Tensor? scale, Tensor? bias, Tensor? noise, Tensor? strength, float slope, "
    "float gain, bool keeps_signs) -> (Tensor, Tensor)",
    _activated,
)
def activate(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    slope: float,
    gain: float,
    keeps_signs: bool,
    y: Tensor,
    signs: Tensor,
) -> None:
    """Gain · leaky ReLU(x · scale[n, c] + bias[c] + strength · noise[n, 1, h, w]), and signs."""
    programs, _, tile = _tiles(x, is_channels_last(x))
    pixels = math.prod(x.shape[2:])
    kept = signs if keeps_signs else None
    _kernels().activate[(programs,)](
        *(x, scale, bias, noise, strength, y, kept, pixels, x.shape[1]),
        *(None if noise is None else noise.stride(0), slope, gain),
        **tile,
    )


def _activated_gradient(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    blocks = _tiles(grad, is_channels_last(grad), _STEPS)[1] if args[-1] else 0
    sums = grad.new_empty(len(grad), blocks, 3, grad.shape[1], dtype=torch.float32)
    return torch.empty_like(grad), sums


@_operator(
    "(Tensor grad, Tensor signs, Tensor? x, Tensor? scale, Tensor? noise, float slope, "
    "float gain, bool adds) -> (Tensor, Tensor)",
    _activated_gradient,
)
def activate_gradient(
    grad: Tensor,
    signs: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    slope: float,
    gain: float,
    adds: bool,
    out: Tensor,
    sums: Tensor,
) -> None:
    """The gradient by x of :func:`activate`, and [n, blocks, 3, c]: sums for that by the others.

    ``grad`` and ``x`` have the layout that :func:`activate` was given.
    """
    steps = _STEPS if adds else 1
    programs, _, tile = _tiles(grad, is_channels_last(grad), steps)
    pixels, kept = math.prod(grad.shape[2:]), sums if adds else None
    stride = None if noise is None else noise.stride(0)
    _kernels().activate_gradient[(programs,)](
        *(grad, signs, x, scale, noise, out, kept, pixels, grad.shape[1], stride, slope, gain),
        **tile,
        STEPS=steps,
    )


_ROWS, _OUTPUTS, _INPUTS = 128, 64, 32  # of a tile of a product


def _product(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = x.shape
    outputs, activates, adds = len(weight), args[-2], args[-1]
    y = _empty(x, (n, outputs, h, w), True)
    signs = x.new_empty(n, h * w, (outputs + 7) // 8 if activates else 0, dtype=torch.uint8)
    blocks = -(-n * h * w // _ROWS) if adds else 0
    return y, signs, x.new_empty(blocks, outputs, dtype=torch.float32)


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? mask, float slope, "
    "float gain, bool activates, bool adds) -> (Tensor, Tensor, Tensor)",
    _product,
)
def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    slope: float,
    gain: float,
    activates: bool,
    adds: bool,
    y: Tensor,
    signs: Tensor,
    sums: Tensor,
) -> None:
    """A 1×1 convolution, channels last, with what follows it.

    With ``activates``, :func:`activate` with ``bias``, and signs; with a ``mask`` of signs, the
    derivative of an activation, and with ``adds`` sums [blocks, c] of the result; with a
    ``residual``, its addition.
    """
    (n, inputs, h, w), outputs = x.shape, len(weight)
    programs = -(-outputs // _OUTPUTS) * -(-n * h * w // _ROWS)
    kept, added = signs if activates else None, sums if adds else None
    _kernels().pointwise[(programs,)](
        *(x, weight, bias, residual, mask, y, kept, added, n * h * w, inputs, outputs),
        *(weight.stride(0), weight.stride(1), slope, gain),
        **{"ROWS": _ROWS, "INPUTS": _INPUTS, "OUTPUTS": _OUTPUTS},
    )


def _resampled(x: Tensor, up: int, down: int, before: int, after: int, gain: float) -> Tensor:
    n, channels, *sides = x.shape
    height, width = ((side * up + before + after - 4) // down + 1 for side in sides)
    return _empty(x, (n, channels, height, width), is_channels_last(x))


@_operator("(Tensor x, int up, int down, int before, int after, float gain) -> Tensor", _resampled)
def fir(x: Tensor, up: int, down: int, before: int, after: int, gain: float, y: Tensor) -> None:
    """Resample with [1, 3, 3, 1] / 8 in both axes, times ``gain``.

    Zeros are put after each pixel (``up`` − 1), before the first and after the last pixel; every
    ``down``-th result remains.
    """
    # A result of one pixel is contiguous, too.
    programs, _, tile = _tiles(y, is_channels_last(x), numbers=_FIR_TILE)
    (height, width), (out_height, out_width) = x.shape[2:], y.shape[2:]
    sizes = height, width, out_height, out_width, x.shape[1], before, gain
    _kernels().fir[(programs,)](x, y, *sizes, UP=up, DOWN=down, **tile)


_WORDS = 256  # of a program, in fours


def _drawn(positions: Tensor, blocks: int, *args: Any) -> Tensor:
    return positions.new_empty(len(positions), 4 * blocks)


@_operator("(Tensor positions, int blocks, int stream, int low, int high) -> Tensor", _drawn)
def philox(positions: Tensor, blocks: int, stream: int, low: int, high: int, words: Tensor) -> None:
    """Philox4x32-10 of (block, stream, position) with the key (low, high): [n, 4 · blocks]."""
    count = len(positions) * blocks
    signed = (word - (word >> 31 << 32) for word in (stream, low, high))  # int32, the same bits
    grid = (-(-count // _WORDS),)
    _kernels().philox[grid](positions, words, blocks, *signed, len(positions), BLOCK=_WORDS)

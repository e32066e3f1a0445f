"""Networks over long inputs, in overlapping tiles that give what the whole input gives.

An output depends on the inputs within its receptive field. A tile is cut with a margin, and outputs
whose receptive field reaches beyond a cut are dropped, so that the others are those of the whole
input, within rounding.

Legend: c channels; positions are pixels, samples or frames along an axis of the input; a function
maps [n, c, *sides] to [n, c′, *sides × scale].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

_LONGEST = 16  # probes, in lengths of training
_TOLERANCE = 1e-9  # of float64, to the largest output
_FLOAT64 = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Axis:
    """How outputs depend on inputs along an axis.

    Attributes:
        scale: Outputs per input position.
        period: Shifts of the input by its multiples shift the output; lengths are multiples of it.
        left: Input positions from a cut on the left to the first output that does not depend on
            inputs beyond the cut; a multiple of the period.
        right: The same for a cut on the right.
    """

    scale: int
    period: int
    left: int
    right: int

    @property
    def shortest(self) -> int:
        """The shortest tile that keeps as many positions as it drops."""
        return max(2 * (self.left + self.right), 2 * self.period)


def scales_of(function: Function, shape: Sequence[int], like: Tensor) -> tuple[int, ...] | None:
    """Return outputs per input position along each axis; None if one is not a whole number.

    ``shape`` is [c, *sides], of inputs in training; ``like`` has their dtype and device.
    """
    sides = function(like.new_zeros(1, *shape)).shape[2:]
    if len(sides) != len(shape) - 1 or any(
        out % side or not out for out, side in zip(sides, shape[1:], strict=True)
    ):
        return None
    return tuple(out // side for out, side in zip(sides, shape[1:], strict=True))


@torch.no_grad()
def periods_of(function: Function, shape: Sequence[int], like: Tensor) -> tuple[int, ...] | None:
    """Return the number whose multiples a function accepts as length, along each axis.

    Lengths of training plus a multiple are tried; 0: only those of training. None if outputs per
    input position are no whole number.
    """
    scales = scales_of(function, shape, like)
    if scales is None:
        return None
    found = []
    for axis, scale in enumerate(scales):
        length = shape[1 + axis]
        accepted = (
            period
            for period in _divisors(length)
            if _accepts(function, tuple(shape), axis, length + period, scale, like)
        )
        found.append(next(accepted, 0))
    return tuple(found)


@torch.no_grad()
def measure(function: Function, shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """Measure how a function in float64, on the CPU, depends on its inputs along each axis.

    The receptive field is found by inputs that are not a number, which make exactly those outputs
    not a number that depend on them. What was measured is then tested: tiles and the whole of a
    random input must agree.

    Args:
        function: Must be deterministic.
        shape: [c, *sides] of inputs in training.

    Returns:
        None if the inputs can't be cut: each output depends on all positions (such as with
        instance normalization), positions are not equivalent, or other lengths are refused.
    """
    scales = scales_of(function, shape, _FLOAT64)
    if scales is None:
        return None
    found = []
    for axis, scale in enumerate(scales):
        measured = _measure_axis(function, tuple(shape), axis, scale)
        if measured is None:
            return None
        found.append(measured)
    return tuple(found)


def _measure_axis(function: Function, shape: tuple[int, ...], axis: int, scale: int) -> Axis | None:
    length = shape[1 + axis]
    for period in _divisors(length):
        if not _accepts(function, shape, axis, length + period, scale, _FLOAT64):
            continue
        reach = _reach(function, shape, axis, scale, period)
        if reach is None:  # nor is it finite for longer periods
            return None
        found, probed = reach
        if _is_exact(function, shape, axis, found, probed):
            return found
    return None


def _divisors(number: int) -> Iterator[int]:
    return (d for d in range(1, number + 1) if number % d == 0)


def _probe(shape: tuple[int, ...], axis: int, length: int) -> Tensor:
    sides = [*shape]
    sides[1 + axis] = length
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, *sides, dtype=torch.float64, generator=generator) - 0.5


def _accepts(
    function: Function, shape: tuple[int, ...], axis: int, length: int, scale: int, like: Tensor
) -> bool:
    try:
        probe = _probe(shape, axis, length).to(like)
        return function(probe).shape[2 + axis] == length * scale
    except Exception:  # torch's or the network's own, for shapes that do not fit
        return False


def _reach(
    function: Function, shape: tuple[int, ...], axis: int, scale: int, period: int
) -> tuple[Axis, int] | None:
    """Return an axis, and the length of the input in which its margins were found."""
    factor = 1
    while factor <= _LONGEST:
        length = factor * shape[1 + axis]
        begin = length // 2 // period * period
        probe = _probe(shape, axis, length)
        probe.narrow(2 + axis, begin, period).fill_(math.nan)
        wrong = function(probe).isnan().movedim(2 + axis, 0).flatten(1).any(1).nonzero()
        if not len(wrong):
            return Axis(scale, period, 0, 0), length
        first, last = int(wrong[0]), int(wrong[-1])
        if first > 0 and last < length * scale - 1:
            # Outputs before the inputs that reach them, and after: margins at cuts.
            before = max(begin * scale - first, 0)
            after = max(last + 1 - (begin + period) * scale, 0)
            unit = period * scale
            left, right = (-(-count // unit) * period for count in (after, before))
            return Axis(scale, period, left, right), length
        factor *= 2
    return None


def _is_exact(
    function: Function, shape: tuple[int, ...], axis: int, found: Axis, probed: int
) -> bool:
    tile = found.left + found.right + found.period
    length = max(probed, tile + 2 * found.period)
    length = -(-length // found.period) * found.period
    probe = _probe(shape, axis, length)
    whole = function(probe)
    ones = [Axis(out // side, side, 0, 0) for out, side in _sides(whole, probe)]
    axes = [found if i == axis else one for i, one in enumerate(ones)]
    sides = [tile if i == axis else one.period for i, one in enumerate(ones)]
    tiled = in_tiles(function, probe, axes, sides)
    limit = _TOLERANCE * float(whole.abs().max())
    return float((whole - tiled).abs().max()) <= limit


def _sides(whole: Tensor, probe: Tensor) -> list[tuple[int, int]]:
    return list(zip(whole.shape[2:], probe.shape[2:], strict=True))


def in_tiles(
    function: Function,
    whole: Tensor,
    axes: Sequence[Axis],
    tiles: Sequence[int],
    *,
    batch: int = 1,
) -> Tensor:
    """Return ``function(whole)``, [1, c′, …], computed in tiles.

    Args:
        function: Called with ``batch`` tiles at a time, always.
        whole: [1, c, *sides]; sides are multiples of the periods.
        axes: As measured.
        tiles: Sides of a tile, which are rounded down to multiples of the periods; at least
            :attr:`Axis.shortest`, or the whole side.
        batch: Tiles at a time.
    """
    windows = [
        list(_windows(side, min(side, tile // axis.period * axis.period), axis))
        for side, tile, axis in zip(whole.shape[2:], tiles, axes, strict=True)
    ]
    out: Tensor | None = None
    for group in _groups(list(itertools.product(*windows)), batch):
        cut = torch.cat([_at(whole, [w.input for w in place]) for place in group])
        made = function(filled(cut, batch))
        if out is None:
            sides = [side * axis.scale for side, axis in zip(whole.shape[2:], axes, strict=True)]
            out = made.new_empty(1, made.shape[1], *sides)
        for place, tile in zip(group, made, strict=False):
            kept = _at(tile[None], [w.kept for w in place])
            _at(out, [w.output for w in place]).copy_(kept)
    assert out is not None
    return out


def _at(tensor: Tensor, sides: Sequence[slice]) -> Tensor:
    """Return a view of a part of each side, of [n, c, *sides]."""
    for axis, side in enumerate(sides):
        tensor = tensor.narrow(2 + axis, side.start, side.stop - side.start)
    return tensor


def filled(samples: Tensor, count: int) -> Tensor:
    """Repeat the last sample up to ``count``: convolutions may round differently in other batches.

    So what a sample gives does not depend on the number of samples beside it.
    """
    missing = max(count - len(samples), 0)
    return torch.cat([samples, samples[-1:].expand(missing, *samples.shape[1:])])


@dataclass(frozen=True)
class _Window:
    """A tile along an axis: inputs, kept outputs within the tile, and their place in the whole."""

    input: slice
    kept: slice
    output: slice


def _windows(side: int, tile: int, axis: Axis) -> Iterator[_Window]:
    """Yield windows of equal length; the last one ends with the side."""
    assert tile == side or tile > axis.left + axis.right, "no output would be kept"
    done = 0
    while done < side:
        begin = min(max(done - axis.left, 0), side - tile)
        end = begin + tile
        stop = side if end == side else end - axis.right
        first, last = done * axis.scale, stop * axis.scale
        offset = begin * axis.scale
        yield _Window(slice(begin, end), slice(first - offset, last - offset), slice(first, last))
        done = stop


def _groups(places: list[tuple[_Window, ...]], size: int) -> Iterator[list[tuple[_Window, ...]]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]

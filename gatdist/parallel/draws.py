"""Random numbers as a pure function of seed, stream and position, never of the rank.

Every draw is keyed by the sample's position in the run, so that N workers draw the numbers of one,
and resuming needs no generator state. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). Shapes: n samples, k numbers for each.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gatdist.common.numerics import cached_tensors
from gatdist.nn import fused
from gatdist.parallel.communicator import bare

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def is_readable(tensor: Tensor) -> bool:
    """Return whether the host can read the tensor's numbers without waiting."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor  # not a fake one


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: counter int64 [4, ...] → the same shape, all entries in [0, 2³²)."""
    if is_readable(counter):
        words = _philox_by_numpy(counter.numpy().astype(np.uint64), key)
        return torch.from_numpy(words.view(np.int64))
    return _philox_by_torch(counter, key)


def _philox_by_torch(counter: Tensor, key: tuple[int, int]) -> Tensor:
    words = counter.reshape(4, -1)
    even, odd = words[0::2].clone(), words[1::2].clone()  # words 0, 2 and words 1, 3
    multipliers, round_keys = _constants(key, counter.device)
    for round_key in round_keys:
        # The 64-bit product wraps into int64's sign bit; masks after the shift recover both
        # unsigned halves.
        product = even * multipliers
        high = (product >> 32) & _LOW
        even, odd = high.flip(0) ^ odd ^ round_key, (product & _LOW).flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]]).view(counter.shape)


@cached_tensors
def _constants(key: tuple[int, int], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    keys = torch.from_numpy(np.stack(_round_keys(key)).view(np.int64)).to(device)
    return torch.tensor(_MULTIPLIERS, device=device)[:, None], list(keys)


def _philox_by_numpy(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """NumPy version: unsigned words need no masks, 5 times as fast for a small batch."""
    words = counter.reshape(4, -1)
    even, odd = words[0::2].copy(), words[1::2].copy()
    multipliers = np.array(_MULTIPLIERS, np.uint64)[:, None]
    product = np.empty_like(even)
    for round_key in _round_keys(key):
        np.multiply(even, multipliers, out=product)
        np.right_shift(product[::-1], 32, out=even)
        even ^= odd
        even ^= round_key
        np.bitwise_and(product[::-1], _LOW, out=odd)
    return np.stack([even[0], odd[0], even[1], odd[1]]).reshape(counter.shape)


@lru_cache(maxsize=8)
def _round_keys(key: tuple[int, int]) -> list[NDArray[np.uint64]]:
    """Return the ten rounds' keys, [2, 1] each."""
    words = [[[(k + i * w) & _LOW] for k, w in zip(key, _WEYL, strict=True)] for i in range(10)]
    return list(np.array(words, np.uint64))


def bits(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """Draw 32-bit words, int64 [n, k].

    Args:
        seed: of the run, in [0, 2⁶³).
        stream: name of what is drawn; different streams are independent.
        positions: int64 [n], each sample's position in the run (≥ 0).
        count: k, words per sample.
    """
    blocks = -(-count // 4)
    if is_readable(positions):
        counters = np.empty((4, len(positions), blocks), np.uint64)
        counters[0], counters[1] = np.arange(blocks), zlib.crc32(stream.encode())
        place = positions.numpy().astype(np.uint64)[:, None]
        counters[2], counters[3] = place & np.uint64(_LOW), place >> np.uint64(32)
        found = _philox_by_numpy(counters, (seed & _LOW, seed >> 32))
        rows = found.transpose(1, 2, 0).reshape(len(positions), blocks * 4)
        return torch.from_numpy(rows[:, :count].view(np.int64))
    if fused.runs_kernels(positions):
        key = zlib.crc32(stream.encode()), seed & _LOW, seed >> 32
        return fused.philox(positions.contiguous(), blocks, *key)[:, :count]
    block = torch.arange(blocks, device=positions.device).expand(len(positions), blocks)
    counter = torch.stack(
        [
            block,
            torch.full_like(block, zlib.crc32(stream.encode())),
            (positions & _LOW)[:, None].expand_as(block),
            (positions >> 32)[:, None].expand_as(block),
        ]
    )
    words = philox(counter, (seed & _LOW, seed >> 32))  # [4, n, blocks]
    return words.permute(1, 2, 0).reshape(len(positions), blocks * 4)[:, :count]


def uniform(
    seed: int,
    stream: str,
    positions: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw [n, *shape] uniform in (0, 1) on the device of ``positions``, 32 random bits each."""
    words = bits(seed, stream, positions, math.prod(shape))
    # Half a step above a multiple of 2⁻³², rounded once. Narrower dtypes have too small a range.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = ((2 * words + 1).to(wide) * 2**-33).to(dtype).view(len(positions), *shape)
    # They would round up to 1.
    return values.clamp_(max=1 - torch.finfo(dtype).eps / 2)


def normal(
    seed: int,
    stream: str,
    positions: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw [n, *shape] standard normal on the device of ``positions`` (Box & Muller 1958).

    Computed in float64 on the CPU. On other devices, where float64 may be 64 times as slow, in
    float32 unless ``dtype`` is float64: the numbers differ by rounding.
    """
    count = math.prod(shape)
    pairs = -(-count // 2)
    exact = dtype == torch.float64 or is_readable(positions)
    u = uniform(seed, stream, positions, (2, pairs), torch.float64 if exact else torch.float32)
    radius, angle = (-2.0 * u[:, 0].log()).sqrt(), 2.0 * math.pi * u[:, 1]
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :count].to(dtype).view(len(positions), *shape)


def of_network(
    network: nn.Module,
    seed: int,
    stream: str,
    positions: Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Draw the last argument of a network with a ``noise_size``, [n, noise_size]; () for others."""
    size = getattr(bare(network), "noise_size", 0)
    return (normal(seed, f"{stream}/noise", positions, (size,), dtype),) if size else ()


def integers(seed: int, stream: str, positions: Tensor, high: int) -> Tensor:
    """Draw int64 [n] uniform in [0, high); the bias is below high / 2³²."""
    return (bits(seed, stream, positions, 1)[:, 0] * high) >> 32

"""Wavelet filters along one axis of an image, as matrices.

Each matrix includes the mirrored continuation of the axis, ``… 2 1 0 1 2 …``, without repeating the
edge. Matrices are float64 tensors on the CPU; :func:`on` copies them to a device, and
:func:`along_axes` applies them to images.

Legend: s is the size of the axis.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gatdist.common.numerics import cached_tensors

_Array = NDArray[np.float64]

# Low-pass filters of Daubechies' least asymmetric orthonormal wavelets with 2 and 6 vanishing
# moments (Daubechies 1992, "Ten Lectures on Wavelets", tables 6.1 and 6.3), with sum √2.
SYM2 = np.array([1 - 3**0.5, 3 - 3**0.5, 3 + 3**0.5, 1 + 3**0.5]) / 32**0.5
SYM6 = np.array(
    [
        0.015404109327027373,
        0.0034907120842174702,
        -0.11799011114819057,
        -0.048311742585633,
        0.4910559419267466,
        0.787641141030194,
        0.3379294217276218,
        -0.07263752278646252,
        -0.021060292512300564,
        0.04472490177066578,
        0.0017677118642428036,
        -0.007800708325034148,
    ]
)
HALF = len(SYM6) // 2
NUM_BANDS = 4
# With rows of other lengths, the last bit of a product of matrices depends on their place in the
# batch.
_MULTIPLE = 8


@cached_tensors
def on(
    device: torch.device, dtype: torch.dtype, make: Callable[[int], Tensor], size: int
) -> Tensor:
    """Return ``make(size)`` on a device, with zeros appended for :func:`along_axes`.

    Equal arguments return the same tensor.
    """
    matrices = make(size)
    below, right = (-length % _MULTIPLE for length in matrices.shape[-2:])
    return functional.pad(matrices, [0, right, 0, below]).to(device, dtype)


def along_axes(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Apply a matrix to each column of images [n, C, H, W], and one to each row.

    Args:
        images: of the matrices' dtype.
        vertical: [1 or n, 1, h, H'] with the zeros that :func:`on` appends: H' is at least H.
        horizontal: [1 or n, 1, w, W'], likewise.

    Returns:
        [n, C, h, w].
    """
    below, right = vertical.shape[3] - images.shape[2], horizontal.shape[3] - images.shape[3]
    if below or right:
        images = functional.pad(images, [0, right, 0, below])
    # Contiguous, because matmul copies some of its arguments first, which depends on n.
    return vertical @ (images @ horizontal.mT.contiguous())


def period(size: int) -> int:
    """Return after how many pixels the mirrored continuation of an axis repeats."""
    return max(1, 2 * (size - 1))


def upsampling(size: int) -> Tensor:
    """Return [2 · period + 1, s], which doubles the resolution with :data:`SYM6`.

    Row 2 i is at pixel i, and the last row is the first one again. The filter is not symmetric, so
    that the rows beyond the edge are not the mirrored ones of the image; they repeat with the
    period of the continuation.
    """
    found = np.zeros((2 * period(size) + 1, size))
    rows = np.arange(len(found))
    for tap, weight in enumerate(np.sqrt(2) * SYM6[::-1]):
        double = rows + tap - HALF  # at twice the resolution only even places have pixels
        here = double % 2 == 0
        np.add.at(found, (rows[here], _mirrored(double[here] // 2, size)), weight)
    return torch.from_numpy(found)


def downsampling(size: int) -> Tensor:
    """Return [s, 2 s + 12], which halves the resolution: the transpose of :func:`upsampling`.

    Column j is at (j − 6) / 2 pixels, so that 6 columns lie beyond each edge.
    """
    found = np.zeros((size, 2 * (size + HALF)))
    for row in range(size):
        found[row, 2 * row + 1 : 2 * row + 1 + len(SYM6)] = SYM6 / np.sqrt(2)
    return torch.from_numpy(found)


def bands(size: int) -> Tensor:
    """Return filters [4, s, s] of the frequency bands, from low to high; their sum is the identity.

    With H the transform of :data:`SYM2` and L(z) = H(z) H(1/z) / 2, they are the products
    L(z) L(z²) L(z⁴), L(z) L(z²) L(−z⁴), L(z) L(−z²) and L(−z).
    """
    rows = np.arange(size)
    found = np.zeros((NUM_BANDS, size, size))
    for band, taps in enumerate(_band_taps()):
        for tap, weight in enumerate(taps, -(len(taps) // 2)):
            np.add.at(found[band], (rows, _mirrored(rows + tap, size)), weight)
    return torch.from_numpy(found)


def _band_taps() -> list[_Array]:
    """Return the filters of :func:`bands` as symmetric, odd sequences of taps."""
    low = np.convolve(SYM2, SYM2[::-1]) / 2
    high = low * (-1.0) ** (np.arange(len(low)) - len(low) // 2)
    found: list[_Array] = []
    coarser = np.ones(1)
    for level in range(NUM_BANDS - 1):
        found.append(np.convolve(coarser, _spread(high, 2**level)))
        coarser = np.convolve(coarser, _spread(low, 2**level))
    return [coarser, *found[::-1]]


def _spread(taps: _Array, step: int) -> _Array:
    """Return H(z^step): the taps with zeros between them."""
    found = np.zeros((len(taps) - 1) * step + 1)
    found[::step] = taps
    return found


def _mirrored(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the pixels seen at ``places`` of the mirrored continuation."""
    inside = places % period(size)
    return np.where(inside < size, inside, period(size) - inside)

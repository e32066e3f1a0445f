"""Resampling written from its definition: zeros between pixels, convolution, decimation."""

import torch

TAPS = (1.0, 3.0, 3.0, 1.0)


def stuffing(size):
    """Zeros after each pixel, [2 size, size]."""
    matrix = torch.zeros(2 * size, size, dtype=torch.float64)
    for i in range(size):
        matrix[2 * i, i] = 1
    return matrix


def filtering(size, before, after, total):
    """[1, 3, 3, 1] with the sum ``total`` on zeros, pixels, zeros: [size + padding − 3, size]."""
    matrix = torch.zeros(size + before + after - 3, size, dtype=torch.float64)
    for i in range(len(matrix)):
        for k, tap in enumerate(TAPS):
            if 0 <= i + k - before < size:
                matrix[i, i + k - before] += tap * total / sum(TAPS)
    return matrix


def both_axes(x, matrix_of):
    """Apply the matrix for each side's size to images [n, c, h, w]."""
    rows, columns = matrix_of(x.shape[2]), matrix_of(x.shape[3])
    return torch.einsum("ih,jw,nchw->ncij", rows, columns, x)


def upsampled(x):
    return both_axes(x, lambda size: filtering(2 * size, 2, 1, 2.0) @ stuffing(size))


def downsampled(x):
    return both_axes(x, lambda size: filtering(size, 1, 1, 1.0)[::2])


def blurred(x, padding):
    return both_axes(x, lambda size: filtering(size, padding, padding, 1.0))

"""Writes samples of a trained generator to files."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gatdist.data import to_pixels
from gatdist.errors import ConfigError
from gatdist.monitor.grid import encode_png, make_grid, make_scatter
from gatdist.runs import TrainedGenerator
from gatdist.storage import Store

_CHUNK = 256


def write_samples(
    generator: TrainedGenerator, num: int, *, seed: int, out: str, grid: bool
) -> list[str]:
    """Write ``num`` samples: ``000000.png`` … (``.npy`` for points), or one picture of all.

    Args:
        generator: trained.
        num: how many (> 0).
        seed: of the noise. Sample i of a seed is the same whatever ``num`` is.
        out: URL of a folder, or of one ``.png`` with ``grid``.
        grid: all in one picture.

    Returns:
        The URLs written.

    Raises:
        ConfigError: ``num`` is not positive.
        StorageError: ``out`` can't be written.
    """
    if num <= 0:
        raise ConfigError("--num", "must be above 0", value=num)
    if grid:
        folder, _, name = out.rpartition("/")
        name = name if name.endswith(".png") else f"{name}.png"
        Store(folder or ".").publish(name, encode_png(_picture(generator, num, seed)))
        return [f"{folder}/{name}"]
    store = Store(out)
    written = []
    for start, samples in _samples(generator, num, seed):
        for i, (name, content) in enumerate(_files(samples)):
            file = f"{start + i:06d}{name}"
            store.publish(file, content)
            written.append(f"{out.rstrip('/')}/{file}")
    return written


def _samples(generator: TrainedGenerator, num: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    sampler = generator.sampler(seed, "sample")
    device = next(generator.network.parameters()).device
    for start in range(0, num, _CHUNK):
        positions = torch.arange(start, min(start + _CHUNK, num), device=device)
        # Numbers past the end fill the last chunk: convolutions may round differently in a smaller
        # batch.
        filled = torch.arange(start, start + _CHUNK, device=device)
        yield start, sampler(filled)[: len(positions)].cpu()


def _picture(generator: TrainedGenerator, num: int, seed: int) -> np.ndarray:
    samples = torch.cat([chunk for _, chunk in _samples(generator, num, seed)])
    if samples.dim() == 4:
        return make_grid(to_pixels(samples).numpy(), math.ceil(math.sqrt(num)))
    return make_scatter(samples.double().numpy(), extent=float(samples.abs().max()) * 1.1)


def _files(samples: Tensor) -> Iterator[tuple[str, bytes]]:
    if samples.dim() == 4:
        for pixels in to_pixels(samples).numpy():
            yield ".png", encode_png(pixels)
        return
    for point in samples.float().numpy():
        buffer = io.BytesIO()
        np.save(buffer, point)
        yield ".npy", buffer.getvalue()

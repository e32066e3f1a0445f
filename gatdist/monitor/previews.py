"""Previews of samples: image grids, audio and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatdist.data.codecs.audio import encode_wav
from gatdist.data.sample_format import SampleFormat, TextFormat
from gatdist.models.audio import LogMel
from gatdist.monitor.grid import Pixels, encode_png, make_grid, make_rows, make_scatter

_PAUSE_S = 0.25  # between clips


@dataclass(frozen=True)
class Preview:
    """Some samples together."""

    image: Pixels | None = None  # uint8 [height, width, C]: a grid, or points
    audio: tuple[NDArray[np.float32], int] | None = None  # float32 [C, t], and hertz
    text: str | None = None  # one sample per line

    def files(self) -> dict[str, Callable[[], bytes]]:
        """Return functions that encode its files, by extension, the most informative first."""
        found: dict[str, Callable[[], bytes]] = {}
        text, audio, image = self.text, self.audio, self.image
        if text is not None:
            found[".txt"] = lambda: f"{text}\n".encode()
        if audio is not None:
            found[".wav"] = lambda: encode_wav(*audio)
        if image is not None:
            found[".png"] = lambda: encode_png(image)
        return found


def preview(
    sample_format: SampleFormat,
    seen: Tensor,
    *,
    extent: float | None = None,
    columns: int | None = None,
) -> Preview:
    """Preview samples as the networks see them, [n, *shape], on the CPU.

    Of points, the square [−extent, extent]² is shown; None fits it. ``columns`` is the number of
    images per row; None makes the grid about square.
    """
    samples = sample_format.to_samples(seen).numpy()
    if sample_format.modality == "image":
        if samples.dtype == np.uint16:  # a screen shows 8 bits
            samples = (samples >> 8).astype(np.uint8)
        return Preview(image=make_grid(samples, columns))
    if sample_format.modality == "points":
        extent = extent or float(seen.abs().max()) * 1.1
        return Preview(image=make_scatter(samples.astype(np.float64), extent=extent))
    if sample_format.modality == "audio":
        rate = sample_format.metadata["sample_rate"]
        return Preview(_spectrograms(seen, rate), (_in_a_row(samples, rate), rate))
    if isinstance(sample_format, TextFormat):
        lines = (sample_format.vocabulary.decode(ids) for ids in samples)
        # A text may hold line breaks of its own.
        return Preview(text="\n".join(line.replace("\n", "⏎") for line in lines))
    return Preview(text="\n".join(" ".join(map(str, ids)) for ids in samples))


def preview_columns(sample_format: SampleFormat, columns: Mapping[str, Tensor]) -> Preview:
    """Preview several fields of the same samples side by side.

    Args:
        sample_format: Of the target.
        columns: Fields as networks see them, on the CPU, by title: images [n, 1 or 3, h, w], or
            audio [n, C, t]. Of other samples the column ``output`` is shown alone.
    """
    if sample_format.modality == "image":
        pixels = {
            title: ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            for title, images in columns.items()
        }
        return Preview(make_rows({k: x.permute(0, 2, 3, 1).numpy() for k, x in pixels.items()}))
    if sample_format.modality == "audio":
        rate = sample_format.metadata["sample_rate"]
        shown = {title: _levels(clips, rate) for title, clips in columns.items()}
        # One column after the other of each sample: [n, k, C, t] → [n·k, C, t].
        clips = torch.stack(list(columns.values()), 1).flatten(0, 1)
        samples = sample_format.to_samples(clips).numpy()
        return Preview(make_rows(shown), (_in_a_row(samples, rate), rate))
    return preview(sample_format, columns["output"])


def _in_a_row(clips: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Concatenate clips [n, C, t] with pauses: [C, …]."""
    paused = np.pad(clips, ((0, 0), (0, 0), (0, int(_PAUSE_S * rate))))
    # [n, C, t] → [C, n, t] → [C, n·t]
    return np.ascontiguousarray(paused.transpose(1, 0, 2).reshape(clips.shape[1], -1))


def _spectrograms(clips: Tensor, rate: int) -> Pixels:
    return make_grid(_levels(clips, rate), math.ceil(math.sqrt(len(clips) / 2)))


def _levels(clips: Tensor, rate: int) -> Pixels:
    """Return log-mel spectrograms of clips as images, [n, bands, frames, 1]."""
    front = LogMel.for_rate(rate)
    with torch.no_grad():
        levels = front(clips.float().mean(dim=1, keepdim=True)).clamp(-1, 1)  # [n, 1, b, f]
    pixels = ((levels + 1) * 127.5).round().to(torch.uint8).flip(2).permute(0, 2, 3, 1)
    return pixels.numpy()

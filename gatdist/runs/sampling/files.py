"""Samples as files: one each, or all in one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gatdist.common.errors import ConfigError
from gatdist.monitor.previews import preview
from gatdist.runs import TrainedRun
from gatdist.runs.sampling.request import SampleRequest, all_samples_of, class_numbers, samples_of
from gatdist.storage import Store, at_file

_ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
_FRAME_MS = 40


def write_samples(run: TrainedRun, requested: SampleRequest, *, out: str, grid: bool) -> list[str]:
    """Write samples, each in a file of its own, or all in one.

    They are called ``000000.png`` and so on; ``.wav`` for sounds, ``.txt`` for texts, ``.npy`` for
    points and tokens.

    Args:
        run: trained.
        requested: which samples.
        out: URL of a folder, of one file with ``grid``, or of an animation (``.gif``, ``.webp``).
        grid: all in one file, by the ending of ``out``: ``.png`` shows pictures side by side (a row
            for each way between two), points or spectrograms, ``.wav`` plays sounds one after the
            other, ``.txt`` holds a text a line.

    Returns:
        The URLs written.

    Raises:
        ConfigError: there are no such samples.
        StorageError: ``out`` can't be written.
    """
    labels = class_numbers(run, requested.labels)
    animation = next((kind for ending, kind in _ANIMATIONS.items() if out.endswith(ending)), None)
    if animation or grid:
        seen = all_samples_of(run, requested, labels)
        if animation:
            content = _animated(run, seen, animation)
        else:
            files = preview(run.sample_format, seen, columns=requested.interpolate or None).files()
            ending = next((e for e in files if out.endswith(e)), "")
            if not ending:
                ending = next(iter(files))
                out += ending
            content = files[ending]()
        store, name = at_file(out)
        store.publish(name, content)
        return [out]
    store, sample_format = Store(out), run.sample_format
    written = []
    for start, seen in samples_of(run, requested, labels):
        for i, sample in enumerate(sample_format.to_samples(seen).numpy(), start=start):
            file = f"{i:06d}{sample_format.ending}"
            store.publish(file, sample_format.encode(sample))
            written.append(f"{out.rstrip('/')}/{file}")
    return written


def _animated(run: TrainedRun, seen: Tensor, kind: str) -> bytes:
    """Pictures one after the other, for ever."""
    if run.sample_format.modality != "image":
        raise ConfigError(
            "--out",
            f"an animation shows pictures, and the run makes {run.sample_format.modality}",
            value=kind.lower(),
            hint="Name a folder",
        )
    from PIL import Image

    frames = [Image.fromarray(_rgb(upscaled)) for upscaled in _upscaled(run, seen)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0)
    return file.getvalue()


def _upscaled(run: TrainedRun, seen: Tensor) -> Iterator[NDArray[np.uint8]]:
    for i in range(len(seen)):
        image = preview(run.sample_format, seen[i : i + 1]).image
        assert image is not None
        yield image


def _rgb(image: NDArray[np.uint8]) -> NDArray[Any]:
    return image[..., 0] if image.shape[2] == 1 else image

"""Samples as files: one each, or all in one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gatdist.errors import ConfigError
from gatdist.exhibits import exhibit
from gatdist.runs import TrainedRun
from gatdist.sampling.wanted import Wanted, all_samples_of, class_numbers, samples_of
from gatdist.storage import Store, at_file

_ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
_FRAME_MS = 40


def write_samples(run: TrainedRun, wanted: Wanted, *, out: str, grid: bool) -> list[str]:
    """Write samples, each in a file of its own, or all in one.

    They are called ``000000.png`` and so on; ``.wav`` for sounds, ``.txt`` for texts, ``.npy`` for
    points and tokens.

    Args:
        run: trained.
        wanted: which samples.
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
    labels = class_numbers(run, wanted.labels)
    animation = next((kind for ending, kind in _ANIMATIONS.items() if out.endswith(ending)), None)
    if animation or grid:
        seen = all_samples_of(run, wanted, labels)
        if animation:
            content = _animated(run, seen, animation)
        else:
            files = exhibit(run.space, seen, columns=wanted.interpolate or None).files()
            ending = next((e for e in files if out.endswith(e)), "")
            if not ending:
                ending = next(iter(files))
                out += ending
            content = files[ending]()
        store, name = at_file(out)
        store.publish(name, content)
        return [out]
    store, space = Store(out), run.space
    written = []
    for start, seen in samples_of(run, wanted, labels):
        for i, sample in enumerate(space.to_samples(seen).numpy(), start=start):
            file = f"{i:06d}{space.ending}"
            store.publish(file, space.encode(sample))
            written.append(f"{out.rstrip('/')}/{file}")
    return written


def _animated(run: TrainedRun, seen: Tensor, kind: str) -> bytes:
    """Pictures one after the other, for ever."""
    if run.space.modality != "image":
        raise ConfigError(
            "--out",
            f"an animation shows pictures, and the run makes {run.space.modality}",
            value=kind.lower(),
            hint="Name a folder",
        )
    from PIL import Image

    frames = [Image.fromarray(_rgb(enlarged)) for enlarged in _enlarged(run, seen)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0)
    return file.getvalue()


def _enlarged(run: TrainedRun, seen: Tensor) -> Iterator[NDArray[np.uint8]]:
    for i in range(len(seen)):
        picture = exhibit(run.space, seen[i : i + 1]).picture
        assert picture is not None
        yield picture


def _rgb(picture: NDArray[np.uint8]) -> NDArray[Any]:
    return picture[..., 0] if picture.shape[2] == 1 else picture

"""Clips of recordings, and resampling.

Resampling is polyphase, with a Kaiser window of β = 5 (``scipy.signal.resample_poly``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gatdist.data.codecs.audio import Clip, Recording


def clip_starts(length: int, size: int, overlap: int) -> Sequence[int]:
    """Return the first sample of each clip of a recording, so that clips overlap.

    Every window of up to ``overlap`` samples lies within a clip. The last clip ends where the
    recording ends; a recording that is shorter than a clip has one. In samples.
    """
    last = max(0, length - size)
    return [*range(0, last, size - overlap), last]


def window(recording: Recording, first: int, end: int, rate: int, *, mono: bool) -> Clip:
    """Return samples ``first`` to ``end`` (exclusive) of a recording at ``rate``, [C, n].

    They are those of the recording resampled as a whole, and fewer at its end.
    """
    factor = math.gcd(recording.header.sample_rate, rate)
    up, down = rate // factor, recording.header.sample_rate // factor
    if up == down:
        return _mixed(recording.read(first, end), mono=mono)
    from scipy.signal import resample_poly  # takes long to import

    # What only affects samples outside of the window is not resampled: a low rate would unfold
    # into gigabytes. The filter reaches this far to each side, in steps of the common rate.
    reach = 10 * max(up, down)
    start = max(0, first * down - reach) // up // down * down  # at which the filter has phase 0
    stop = ((end - 1) * down + reach) // up + 2
    source = _mixed(recording.read(start, stop), mono=mono)
    part = resample_poly(source, up, down, axis=1, window=_low_pass(max(up, down)))
    begin = first - start // down * up
    clip: Clip = part[:, begin : begin + end - first]
    return clip


@lru_cache(maxsize=8)
def _low_pass(steps: int) -> Any:
    """The filter that ``resample_poly`` would compute at each call."""
    from scipy.signal import firwin

    return firwin(20 * steps + 1, 1 / steps, window=("kaiser", 5.0)).astype(np.float32)


def _mixed(clip: Clip, *, mono: bool) -> Clip:
    return clip.mean(axis=0, keepdims=True) if mono else clip

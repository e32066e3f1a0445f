"""Pitch, periodicity and voicing of audio by YIN (de Cheveigné & Kawahara 2002).

Legend: n clips, t samples in time, f frames, k lags.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LOWEST_HERTZ, HIGHEST_HERTZ = 50.0, 550.0
HOP_S = 0.01
WINDOW_S = 0.025
THRESHOLD = 0.1  # of the normalized difference of a period
_SILENCE = 1e-8  # mean square difference below which a frame has no period


class Pitch(NamedTuple):
    """Of each frame, [n, f]: hertz, whether it is voiced, and periodicity from 0 to 1."""

    hertz: Tensor
    is_voiced: Tensor
    periodicity: Tensor


def longest_frame(sample_rate: int) -> int:
    """Return the samples that one frame takes, the least length of a clip."""
    return round(WINDOW_S * sample_rate) + _longest_lag(sample_rate) + 2


def track(clips: Tensor, sample_rate: int) -> Pitch:
    """Estimate the pitch of clips [n, t], from 50 to 550 Hz in frames every 10 ms.

    The period is the first lag at whose minimum the cumulative mean normalized difference is below
    0.1, refined by a parabola; a frame without such a lag is unvoiced. Periodicity is 1 minus the
    least normalized difference.
    """
    difference = _normalized_difference(clips.double(), sample_rate)  # [n, f, k], lags from 0
    shortest = max(1, int(sample_rate / HIGHEST_HERTZ))
    found = difference[..., shortest:-1]
    is_below = found < THRESHOLD
    is_rising = difference[..., shortest + 1 :] >= found
    is_rising[..., -1] = True
    is_candidate = (is_below.cumsum(-1) > 0) & is_rising
    is_voiced = is_below.any(-1)
    first = torch.where(is_voiced, is_candidate.double().argmax(-1), found.argmin(-1))
    lag = (first + shortest).clamp(max=difference.shape[-1] - 2)
    before, at, after = (
        difference.gather(-1, (lag + shift)[..., None])[..., 0] for shift in (-1, 0, 1)
    )
    curvature = before - 2 * at + after
    offset = torch.where(curvature > 0, (before - after) / (2 * curvature), 0.0).clamp(-0.5, 0.5)
    return Pitch(sample_rate / (lag + offset), is_voiced, 1 - found.amin(-1).clamp(0, 1))


def _longest_lag(sample_rate: int) -> int:
    return int(sample_rate / LOWEST_HERTZ) + 1


def _normalized_difference(clips: Tensor, sample_rate: int) -> Tensor:
    """Return the cumulative mean normalized difference of each frame at lags 0 to the longest."""
    window, longest = round(WINDOW_S * sample_rate), _longest_lag(sample_rate) + 1
    frames = clips.unfold(1, window + longest, max(1, round(HOP_S * sample_rate)))
    size = 2 ** (window + longest - 1).bit_length()
    spectrum = torch.fft.rfft(frames, size)
    windows = torch.fft.rfft(frames[..., :window], size)
    correlation = torch.fft.irfft(windows.conj() * spectrum, size)
    energies = functional.pad(frames.square().cumsum(-1), (1, 0))
    shifted = energies[..., window:] - energies[..., : longest + 1]  # of the window at each lag
    difference = shifted[..., :1] + shifted - 2 * correlation[..., : longest + 1]
    difference = difference.clamp_min(0)
    lags = torch.arange(1, longest + 1, device=clips.device)
    means = difference[..., 1:].cumsum(-1) / lags
    normalized = torch.where(
        means > window * _SILENCE, difference[..., 1:] / means.clamp_min(window * _SILENCE), 1.0
    )
    return functional.pad(normalized, (1, 0), value=1.0)

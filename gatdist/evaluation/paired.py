"""Metrics of pairs: each generated sample against the target of the same inputs.

Every metric is a function of one pair, averaged over the samples. Pairs for which it is not defined
are skipped, but an output that is not finite makes the mean NaN. Of audio with several channels,
their mean is compared.

Legend: n samples; images [n, C, H, W] and audio [n, C, t] as networks see them.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gatdist.common.errors import ConfigError
from gatdist.common.heartbeat import beat
from gatdist.data.sample_format import AudioFormat, SampleFormat
from gatdist.evaluation import pitch as pitches
from gatdist.evaluation.metrics import Metric, Need, SampleSet, metrics
from gatdist.models.spectrograms import LogMelSpectrogram

_PART = 16  # pairs that are compared at once
_RANGE = 2.0  # of images and audio, from −1 to 1
_LARGEST_PSNR = 100.0  # decibels, of equal images
_SSIM_SIDE, _SSIM_DEVIATION, _SSIM_K = 11, 1.5, (0.01, 0.03)
# FFT, hop and window of Yamamoto et al. 2020, at this rate.
_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
_RESOLUTIONS_RATE = 24_000
_LEAST_POWER = 1e-7
# Window and hop of log-mel spectrograms at this rate, and their bands.
_MEL_WINDOW, _MEL_HOP, _MEL_RATE, _MEL_BANDS = 1024, 256, 22_050, 80
_PESQ_MODES = {8000: "nb", 16000: "wb"}
_LEAST_PESQ = 1.0
_PESQ_S, _STOI_S = 0.25, 0.4  # that a clip must take


@dataclass(frozen=True)
class Pairs:
    """Generated samples and their targets, rounded as in files; ``sample_rate`` in hertz, or 0."""

    output: Tensor
    target: Tensor
    sample_rate: int

    def part(self, start: int) -> Pairs:
        rows = slice(start, start + _PART)
        return Pairs(self.output[rows], self.target[rows], self.sample_rate)

    @property
    def mono(self) -> tuple[Tensor, Tensor]:
        """Audio as clips [n, t]."""
        return self.output.mean(1), self.target.mean(1)


# Values of each pair, [n, number of values]; NaN where one is not defined.
Compare = Callable[[Pairs], Tensor]
# What of the samples' format does not suit the metric, or "".
Unsuitable = Callable[[SampleFormat], str]


@dataclass(frozen=True)
class PairedMetric(Metric):
    """A metric of pairs, with the names of its values."""

    compare: Compare | None = None
    values: tuple[str, ...] = ()

    def of(self, pairs: Pairs) -> Tensor:
        """Return the values of each pair, float64 [n, number of values]."""
        assert self.compare is not None
        found = []
        for start in range(0, len(pairs.output), _PART):
            found.append(self.compare(pairs.part(start)).double())
            beat()
        is_finite = pairs.output.isfinite().flatten(1).all(1, keepdim=True)
        return torch.where(is_finite, torch.cat(found), math.inf)


def _paired(
    name: str,
    *modalities: str,
    values: Sequence[str] = (),
    higher: bool = False,
    unsuitable: Unsuitable = lambda sample_format: "",
    **protocol: str,
) -> Callable[[Compare], Compare]:
    names = tuple(values) or (name,)

    def measure(real: SampleSet, fake: SampleSet) -> dict[str, float]:
        return {each: _mean(fake.pairs[each]) for each in names}

    def add(compare: Compare) -> Compare:
        needs: frozenset[Need] = frozenset({"pairs", "real_samples"})
        measure.__doc__ = compare.__doc__
        metrics.register(name)(
            PairedMetric(
                measure,
                needs,
                protocol,
                higher_is_better=higher,
                modalities=modalities,
                unsuitable=unsuitable,
                compare=compare,
                values=names,
            )
        )
        return compare

    return add


def _mean(values: Tensor) -> float:
    """Return the mean of what is defined; NaN if an output was not finite."""
    return math.nan if values.isinf().any() else float(values.nanmean())


@_paired("l1", "image", "audio", "points", l1="of values from −1 to 1")
def l1(pairs: Pairs) -> Tensor:
    """Mean absolute difference of each output and its target; values are from −1 to 1."""
    return (pairs.output - pairs.target).double().abs().flatten(1).mean(1, keepdim=True)


@_paired("psnr", "image", higher=True, psnr="dB, mean over images, at most 100")
def psnr(pairs: Pairs) -> Tensor:
    """Peak signal-to-noise ratio in dB; 100 of equal images. Higher is better."""
    error = (pairs.output - pairs.target).double().square().flatten(1).mean(1, keepdim=True)
    return (10 * (_RANGE**2 / error).log10()).clamp(max=_LARGEST_PSNR)


def _too_small(sample_format: SampleFormat) -> str:
    if min(sample_format.shape[1:]) >= _SSIM_SIDE:
        return ""
    return f"needs images of at least {_SSIM_SIDE} × {_SSIM_SIDE} pixels"


@_paired(
    "ssim",
    "image",
    higher=True,
    unsuitable=_too_small,
    ssim="Gaussian 11 × 11, σ 1.5, K 0.01 and 0.03, mean over channels, no padding",
)
def ssim(pairs: Pairs) -> Tensor:
    """Structural similarity (Wang et al. 2004), 1 of equal images. Higher is better."""
    x, y = pairs.output.double(), pairs.target.double()
    n, channels = x.shape[:2]
    places = torch.arange(_SSIM_SIDE, device=x.device, dtype=x.dtype) - _SSIM_SIDE // 2
    weights = (-(places**2) / (2 * _SSIM_DEVIATION**2)).exp()
    weights = weights / weights.sum()

    def blurred(maps: Tensor) -> Tensor:
        flat = maps.flatten(0, 1)[:, None]
        rows = functional.conv2d(flat, weights[None, None, :, None])
        return functional.conv2d(rows, weights[None, None, None, :])

    mean_x, mean_y = blurred(x), blurred(y)
    first, second = ((k * _RANGE) ** 2 for k in _SSIM_K)
    covariance = blurred(x * y) - mean_x * mean_y
    variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    found = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    found = found / ((mean_x**2 + mean_y**2 + first) * (variances + second))
    return found.view(n, channels, -1).mean((1, 2))[:, None]


def _shorter_than(samples: Callable[[int], int]) -> Unsuitable:
    def unsuitable(sample_format: SampleFormat) -> str:
        assert isinstance(sample_format, AudioFormat)
        least = samples(sample_format.sample_rate)
        short = sample_format.shape[1] < least
        return f"needs clips of at least {least:,} samples" if short else ""

    return unsuitable


@lru_cache(maxsize=4)
def _log_mel(sample_rate: int) -> LogMelSpectrogram:
    window, hop = (round(n * sample_rate / _MEL_RATE) for n in (_MEL_WINDOW, _MEL_HOP))
    return LogMelSpectrogram(sample_rate, bands=_MEL_BANDS, window=window, hop=hop)


def _without_mel(sample_format: SampleFormat) -> str:
    assert isinstance(sample_format, AudioFormat)
    try:
        spectrogram = _log_mel(sample_format.sample_rate)
    except ConfigError:
        return f"needs a higher sample rate, at which none of its {_MEL_BANDS} bands is empty"
    return _shorter_than(lambda rate: spectrogram.window)(sample_format)


@_paired(
    "log_mel",
    "audio",
    unsuitable=_without_mel,
    log_mel=f"{_MEL_BANDS} bands to half the rate, window 46.4 ms, hop 11.6 ms, natural logarithm",
)
def log_mel(pairs: Pairs) -> Tensor:
    """Mean absolute difference of log-mel spectrograms, in nepers (Kong et al. 2020)."""
    spectrogram = _log_mel(pairs.sample_rate)
    output, target = (spectrogram(clips.double()[:, None]) for clips in pairs.mono)
    return (output - target).abs().mean((1, 2))[:, None]


def resolutions(sample_rate: int) -> list[tuple[int, int, int]]:
    """Return FFT size (a power of two), hop and window of Yamamoto et al. 2020 at a rate."""
    scale = sample_rate / _RESOLUTIONS_RATE
    found = []
    for size, hop, window in _RESOLUTIONS:
        length = max(2, round(window * scale))
        fft = 2 ** max(round(math.log2(size * scale)), math.ceil(math.log2(length)))
        found.append((fft, max(1, round(hop * scale)), length))
    return found


@_paired(
    "stft",
    "audio",
    values=("stft", "stft_convergence", "stft_log_magnitude"),
    unsuitable=_shorter_than(lambda rate: max(fft for fft, _, _ in resolutions(rate)) // 2 + 1),
    stft="3 resolutions of Yamamoto et al. 2020, scaled from 24 kHz",
)
def stft(pairs: Pairs) -> Tensor:
    """Multi-resolution STFT distance (Yamamoto et al. 2020), a mean over 3 resolutions.

    The sum of ``stft_convergence``, the relative error of magnitudes in the Frobenius norm, and
    ``stft_log_magnitude``, the mean absolute difference of their natural logarithms.
    """
    found = []
    for fft, hop, window in resolutions(pairs.sample_rate):
        output, target = (_magnitudes(clips, fft, hop, window) for clips in pairs.mono)
        convergence = (target - output).norm(dim=(1, 2)) / target.norm(dim=(1, 2))
        found.append(torch.stack([convergence, (target.log() - output.log()).abs().mean((1, 2))]))
    parts = torch.stack(found).mean(0)  # [2, n]
    return torch.stack([parts.sum(0), *parts], 1)


def _magnitudes(clips: Tensor, fft: int, hop: int, window: int) -> Tensor:
    hann = torch.hann_window(window, dtype=torch.float64, device=clips.device)
    found = torch.stft(clips.double(), fft, hop, window, hann, return_complex=True)
    return found.abs().square().clamp_min(_LEAST_POWER).sqrt()


@_paired(
    "pitch",
    "audio",
    values=("pitch", "pitch_voicing", "pitch_periodicity"),
    unsuitable=_shorter_than(pitches.longest_frame),
    pitch="YIN, 50 to 550 Hz, threshold 0.1, window 25 ms, hop 10 ms",
)
def pitch(pairs: Pairs) -> Tensor:
    """Errors of pitch by YIN (de Cheveigné & Kawahara 2002; as in Morrison et al. 2022).

    ``pitch`` is the root mean square error in cents over the frames that are voiced in both,
    ``pitch_voicing`` the share of frames that are voiced in one only, and ``pitch_periodicity`` the
    root mean square error of periodicity (0 to 1) over all frames.
    """
    output, target = (pitches.track(clips, pairs.sample_rate) for clips in pairs.mono)
    both = output.is_voiced & target.is_voiced
    cents = torch.where(both, 1200 * (output.hertz / target.hertz).log2(), 0.0)
    error = (cents.square().sum(1) / both.sum(1)).sqrt()  # NaN without such frames
    voicing = (output.is_voiced != target.is_voiced).double().mean(1)
    periodicity = (output.periodicity - target.periodicity).square().mean(1).sqrt()
    return torch.stack([error, voicing, periodicity], 1)


def _without_package(name: str) -> str:
    """Return what is wrong if a package is not installed."""
    missing = importlib.util.find_spec(name) is None
    return f"needs the package {name}: pip install {name}" if missing else ""


def _without_pesq(sample_format: SampleFormat) -> str:
    rate = sample_format.metadata["sample_rate"]
    if rate not in _PESQ_MODES:
        return f"is defined at {' and '.join(f'{r:,}' for r in _PESQ_MODES)} Hz, not at {rate:,} Hz"
    too_short = _shorter_than(lambda rate: math.ceil(_PESQ_S * rate))
    return too_short(sample_format) or _without_package("pesq")


def _without_stoi(sample_format: SampleFormat) -> str:
    too_short = _shorter_than(lambda rate: math.ceil(_STOI_S * rate))
    return too_short(sample_format) or _without_package("pystoi")


@_paired(
    "pesq",
    "audio",
    higher=True,
    unsuitable=_without_pesq,
    pesq="ITU-T P.862.1 at 8 kHz, P.862.2 at 16 kHz",
)
def pesq(pairs: Pairs) -> Tensor:
    """Perceptual quality of speech, mean opinion score of about 1 to 4.6. Higher is better.

    ITU-T P.862.1 (narrow band) at 8 kHz, P.862.2 (wide band) at 16 kHz, by the package pesq; 1 of
    silence, and not defined if the target is without speech.
    """
    from pesq import PesqError
    from pesq import pesq as score

    def one(target: Any, output: Any) -> float:
        if not output.any():
            return _LEAST_PESQ
        mode = _PESQ_MODES[pairs.sample_rate]
        found = score(pairs.sample_rate, target, output, mode, on_error=PesqError.RETURN_VALUES)
        return math.nan if found < 0 else float(found)

    return _each(one, pairs)


@_paired(
    "stoi",
    "audio",
    higher=True,
    unsuitable=_without_stoi,
    stoi="pystoi, not extended",
)
def stoi(pairs: Pairs) -> Tensor:
    """Short-time objective intelligibility (Taal et al. 2011), up to 1. Higher is better.

    By the package pystoi; not defined of silence, nor of less than about 0.4 s of speech.
    """
    from pystoi import stoi as score

    def one(target: Any, output: Any) -> float:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            found = float(score(target, output, pairs.sample_rate))
        return math.nan if caught else found

    return _each(one, pairs)


def _each(score: Callable[[Any, Any], float], pairs: Pairs) -> Tensor:
    """Return (target, output) → score of each pair of clips [t], [n, 1]."""
    output, target = (clips.float().cpu().numpy() for clips in pairs.mono)
    found = []
    for wanted, made in zip(target, output, strict=True):
        is_defined = wanted.any() and np.isfinite(made).all()
        found.append(score(wanted, made) if is_defined else math.nan)
        beat()
    return torch.tensor(found, dtype=torch.float64, device=pairs.output.device)[:, None]

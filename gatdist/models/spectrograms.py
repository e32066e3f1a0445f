"""Log-mel spectrograms as vocoders use them.

Legend: n clips, t samples in time, b bands, f frames.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import torch
from torch import Tensor

from gatdist.common.errors import ConfigError

_FLOOR = 1e-5  # of magnitudes
_POWER_FLOOR = 1e-9  # added to each bin's power
_ROUNDING = 1e-6  # of edges, in bins
# Of the mel scale by Slaney (1998, Auditory Toolbox): linear up to 1 kHz, then logarithmic.
_HERTZ_PER_MEL, _BREAK_HERTZ, _STEP = 200 / 3, 1000.0, math.log(6.4) / 27


class LogMelSpectrogram:
    """Clips [n, 1, t] → log-mel spectrograms [n, b, t / hop], as in Kong et al. 2020 (HiFi-GAN).

    Hann windows of ``window`` samples every ``hop``, which divides t; the clip is reflected at its
    ends. Magnitudes are summed in ``bands`` triangular bands of equal area up to ``highest`` hertz,
    by default half of the rate. Natural logarithms of at least 1e-5. ``subject`` is the
    configuration key of the options, for messages.

    Raises:
        ConfigError: An option, or clips in a call, do not fit.

    Attributes:
        parameters: All that is needed to compute the same elsewhere, as JSON values.
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        bands: int = 80,
        window: int = 1024,
        hop: int = 256,
        highest: float | None = None,
        subject: str = "game.task",
    ) -> None:
        if window < hop:
            raise ConfigError(f"{subject}.window", f"must be at least the hop, {hop}", value=window)
        if highest is not None and highest > sample_rate / 2:
            rule = f"must be at most half of the sample rate, {sample_rate / 2:g}"
            raise ConfigError(f"{subject}.highest", rule, value=highest)
        self._subject = subject
        self.window, self.hop = window, hop
        self.parameters = {
            "sample_rate": sample_rate,
            "bands": bands,
            "window": window,
            "hop": hop,
            "lowest": 0.0,
            "highest": highest or sample_rate / 2,
            "scale": "slaney",
            "norm": "slaney",
            "padding": {"mode": "reflect", "samples": (window - hop) // 2},
            "window_function": "hann, periodic",
            "added_to_power": _POWER_FLOOR,
            "smallest_magnitude": _FLOOR,
            "logarithm": "natural",
        }
        _require_bins(sample_rate, bands, window, highest or sample_rate / 2, f"{subject}.bands")
        self._hann = torch.hann_window(window, dtype=torch.float64)
        self._bands = slaney_bands(sample_rate, bands, window, highest or sample_rate / 2)
        self._on_devices: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, clips: Tensor) -> Tensor:
        padding = (self.window - self.hop) // 2
        if clips.dim() != 3 or clips.shape[1] != 1:
            rule = f"needs clips of one channel, [1, length]; found {list(clips.shape[1:])}"
            raise ConfigError(self._subject, rule, hint="Set data.channels to 1 for other audio")
        if padding >= clips.shape[2]:
            rule = f"needs clips longer than {padding} samples; found {clips.shape[2]}"
            hint = "Show more samples of each clip, or use a smaller window"
            raise ConfigError(self._subject, rule, hint=hint)
        place = clips.device, clips.dtype
        if place not in self._on_devices:  # a copy to a device makes the host wait
            self._on_devices[place] = self._hann.to(clips), self._bands.to(clips)
        hann, bands = self._on_devices[place]
        padded = reflected(clips, padding)[:, 0]
        frames = padded.unfold(1, self.window, self.hop) * hann  # [n, f, window]
        real, imaginary = torch.view_as_real(torch.fft.rfft(frames)).unbind(-1)
        # As published: the derivative of a root at 0 is not finite.
        magnitude = (real.square() + imaginary.square() + _POWER_FLOOR).sqrt()
        return (magnitude @ bands.mT).clamp_min(_FLOOR).log().mT


def reflected(clips: Tensor, padding: int) -> Tensor:
    """Return clips [n, c, t > padding], reflected at both ends, [n, c, t + 2 · padding].

    The backward of torch's reflection is not deterministic on GPUs.
    """
    before, after = clips[:, :, 1 : padding + 1], clips[:, :, -padding - 1 : -1]
    return torch.cat([before.flip(2), clips, after.flip(2)], 2) if padding else clips


def slaney_bands(sample_rate: int, count: int, window: int, highest: float) -> Tensor:
    """Return triangular bands of area 1 on Slaney's mel scale, [count, window/2 + 1]."""
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    edges = torch.tensor(_edges(count, highest), dtype=torch.float64)
    lower, peak, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - lower) / (peak - lower), (upper - frequencies) / (upper - peak)
    found: Tensor = torch.minimum(rising, falling).clamp_min(0) * 2 / (upper - lower)
    return found


def _require_bins(sample_rate: int, count: int, window: int, highest: float, subject: str) -> None:
    """Raise ConfigError unless each band contains a bin of the Fourier transform."""
    bins = window // 2  # above 0 Hz

    def have_bins(count: int) -> bool:
        edges = [2 * bins / sample_rate * edge for edge in _edges(count, highest)]
        pairs = zip(edges, edges[2:], strict=False)
        return all(math.floor(low + _ROUNDING) + 1 + _ROUNDING < high for low, high in pairs)

    # Each bin is in two bands at most.
    if count > 2 * bins or not have_bins(count):
        fewer = range(1, min(count, 2 * bins + 1))
        most = bisect_left(fewer, True, key=lambda count: not have_bins(count))
        rule = f"some bands contain no frequency of a window of {window} samples"
        hint = f"Use at most {most}, or a longer window" if most else "Use a longer window"
        raise ConfigError(subject, rule, value=count, hint=hint)


def _edges(count: int, highest: float) -> list[float]:
    """Return where bands begin, peak and end, in hertz: band i from edge i to edge i + 2."""
    step = _mel(highest) / (count + 1)
    return [_hertz(i * step) for i in range(count + 2)]


def _hertz(mel: float) -> float:
    break_mel = _BREAK_HERTZ / _HERTZ_PER_MEL
    if mel < break_mel:
        return mel * _HERTZ_PER_MEL
    return _BREAK_HERTZ * math.exp(_STEP * (mel - break_mel))


def _mel(hertz: float) -> float:
    if hertz < _BREAK_HERTZ:
        return hertz / _HERTZ_PER_MEL
    return _BREAK_HERTZ / _HERTZ_PER_MEL + math.log(hertz / _BREAK_HERTZ) / _STEP

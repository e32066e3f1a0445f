"""Audio: WAV, FLAC and OGG files, read with libsndfile."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs import CodecError
from gatdist.data.codecs.containers import repaired

AUDIO_EXTENSIONS = ("wav", "flac", "ogg")

Clip = NDArray[np.float32]

# Accepted formats: libsndfile also knows headerless ones, which match any file.
_CONTAINERS = {
    **dict.fromkeys(("WAV", "WAVEX", "RF64", "W64"), "wav"),
    **{"FLAC": "flac", "OGG": "ogg"},
}
_MAX_NUMBERS = 2**28
_PART = 2**16  # samples that are decoded at a time to skip them
_MAX_HERTZ = 1_000_000  # a resampling filter grows with the rates divided by their common factor


class AudioHeader(NamedTuple):
    """Header of an audio file."""

    component: str  # one of ``AUDIO_EXTENSIONS``
    channels: int  # number of channels
    length: int  # samples per channel
    sample_rate: int  # in hertz


def read_audio_header(content: bytes) -> AudioHeader:
    """Read the header, with its number of samples corrected. Raises CodecError if not audio."""
    with _opened(repaired(content)) as file:
        header = _header(file)
        if header.component == "ogg" and header.length:  # the length comes from the last page
            file.seek(header.length - 1)
            if not len(file.read(1)):
                raise CodecError(f"ends before the last of {header.length:,} samples")
        return header


def read_audio(content: bytes) -> Clip:
    """Decode a whole file to float32 [C, n]. Raises CodecError."""
    with _opened(repaired(content)) as file:
        return np.ascontiguousarray(_frames(file, _header(file).length).T)


class Recording:
    """An audio file that is decoded once, window by window, in the memory of one window.

    Attributes:
        header: Of the file.
    """

    def __init__(self, file: Any) -> None:
        self.header = _header(file)
        self._file = file
        self._begin = 0
        self._kept = np.empty((self.header.channels, 0), dtype=np.float32)

    def read(self, start: int, stop: int) -> Clip:
        """Return samples ``start`` to ``stop`` (exclusive) or the end, float32 [C, n].

        No window may begin before the last one. Raises CodecError.
        """
        assert start >= self._begin
        stop = min(stop, self.header.length)
        end = self._begin + self._kept.shape[1]
        while end < stop:  # also skips what lies between windows
            self._kept = self._kept[:, max(0, start - self._begin) :]
            self._begin = end - self._kept.shape[1]
            part = _frames(self._file, min(stop - end, max(_PART, stop - start))).T
            self._kept = np.concatenate([self._kept, part], axis=1)
            end += part.shape[1]
        return np.ascontiguousarray(self._kept[:, start - self._begin : stop - self._begin])


@contextmanager
def open_recording(content: bytes) -> Iterator[Recording]:
    """Open an audio file to decode windows of it. Raises CodecError."""
    with _opened(repaired(content)) as file:
        yield Recording(file)


def decode_audio_into(content: bytes | memoryview, out: Clip, sample_rate: int) -> None:
    """Decode the beginning of a clip into ``out``, float32 [C, n]. Raises CodecError.

    One channel is the mean of the file's channels; a file with one channel is copied to all.
    """
    channels, length = out.shape
    with _opened(repaired(bytes(content), whole=False)) as file:
        found = _header(file)
        if found.sample_rate != sample_rate:
            rule = f"has a sample rate of {found.sample_rate:,} Hz, expected {sample_rate:,} Hz"
            raise CodecError(rule, hint=f"Pack again with --sample-rate {sample_rate}")
        if found.length < length:
            raise CodecError(
                f"has {found.length:,} samples, expected {length:,} or more",
                hint=f"Pack again with --length {length}, or lower data.length to {found.length}",
            )
        if channels not in (1, found.channels) and found.channels != 1:
            rule = f"has {found.channels} channels, expected {channels}"
            raise CodecError(rule, hint=f"Set data.channels to 1 or {found.channels}")
        if channels == found.channels == 1 and out.flags.c_contiguous:
            _frames(file, length, out.reshape(length, 1))
            return
        frames = _frames(file, length)
    out[...] = frames.mean(axis=1) if channels == 1 else frames.T


def encode_wav(clip: Clip, sample_rate: int) -> bytes:
    """Return a clip, float32 [C, n] clipped to −1 to 1, as a 16-bit WAV file."""
    import soundfile

    file = io.BytesIO()
    levels = np.clip(np.rint(np.float64(clip.T) * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(file, levels, sample_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


@contextmanager
def _opened(content: bytes | memoryview) -> Iterator[Any]:
    import soundfile  # loads libsndfile, needed for audio only

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            yield file
    except CodecError:
        raise
    except Exception as error:  # libsndfile's, and others for a damaged header
        reason = " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
        raise CodecError(f"is not readable audio ({reason})") from error


def _header(file: Any) -> AudioHeader:
    if file.format not in _CONTAINERS:
        raise CodecError(f"is {file.format}, expected WAV, FLAC or OGG")
    if not 0 < file.samplerate <= _MAX_HERTZ:
        rule = f"has a sample rate of {file.samplerate:,} Hz, the limit is {_MAX_HERTZ:,} Hz"
        raise CodecError(rule, hint="Correct its header, or remove it")
    if file.channels * file.frames > _MAX_NUMBERS:
        size = f"{file.frames:,} samples of {file.channels} channels"
        raise CodecError(f"has {size}, the limit is {_MAX_NUMBERS:,} in all", hint="Cut it")
    return AudioHeader(_CONTAINERS[file.format], file.channels, file.frames, file.samplerate)


def _frames(file: Any, length: int, out: Clip | None = None) -> Clip:
    """Read [n, C], into ``out`` if it is given."""
    frames: Clip = file.read(length, dtype="float32", always_2d=True, out=out)
    if len(frames) != length:  # a truncated file
        raise CodecError(f"ends after {file.tell():,} of {file.frames:,} samples")
    holds_floats = not file.subtype.startswith("PCM")
    if holds_floats and not np.isfinite(frames).all():
        raise CodecError("holds non-finite numbers", hint="Remove the sample and pack again")
    return frames

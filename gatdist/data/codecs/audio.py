"""Sounds: WAV, FLAC and OGG files, by libsndfile."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs.containers import honest
from gatdist.data.codecs.errors import CodecError

AUDIO_EXTENSIONS = ("wav", "flac", "ogg")

Clip = NDArray[np.float32]

# What libsndfile may take a file for. Its own choice has headerless formats that fit anything.
_CONTAINERS = {
    "WAV": "wav",
    "WAVEX": "wav",
    "RF64": "wav",
    "W64": "wav",
    "FLAC": "flac",
    "OGG": "ogg",
}
_MOST_NUMBERS = 2**28
_MOST_HERTZ = 1_000_000  # the filter of a resampler is as long as the rates have no common factor


class AudioHeader(NamedTuple):
    """What a file's header says.

    Attributes:
        component: one of ``AUDIO_EXTENSIONS``.
        channels: of the sound.
        length: samples of each.
        sample_rate: in hertz.
    """

    component: str
    channels: int
    length: int
    sample_rate: int


def read_audio_header(content: bytes) -> AudioHeader:
    """What a file's header says, or CodecError if it is no sound.

    A wrong number of samples in it is put right, from what the file holds.
    """
    with _opened(honest(content)) as file:
        header = _header(file)
        if header.component == "ogg" and header.length:  # whose length is that of its last page
            file.seek(header.length - 1)
            if not len(file.read(1)):
                raise CodecError(f"ends before the last of {header.length:,} samples")
        return header


def read_audio(content: bytes) -> Clip:
    """All of a sound, float32 [C, n]. Raises CodecError if it is none, damaged, or endless."""
    with _opened(honest(content)) as file:
        found = _header(file)
        return np.ascontiguousarray(_frames(file, found.length).T)


def decode_audio(content: bytes | memoryview, shape: tuple[int, int], sample_rate: int) -> Clip:
    """Decode the beginning of a sound.

    Args:
        content: a whole file.
        shape: (C, n): channels and samples of each. One channel is the mean of those of the file;
            of a file with one, every channel is a copy.
        sample_rate: in hertz, of the file.

    Returns:
        float32 [C, n]; full scale is −1 to 1.

    Raises:
        CodecError: it is no such file, damaged, of another sample rate, shorter, or has other
            channels.
    """
    clip = np.empty(shape, dtype=np.float32)
    decode_audio_into(content, clip, sample_rate)
    return clip


def decode_audio_into(content: bytes | memoryview, out: Clip, sample_rate: int) -> None:
    """Decode a sound into ``out``, float32 [C, n]. See :func:`decode_audio`."""
    channels, length = out.shape
    with _opened(honest(bytes(content), whole=False)) as file:
        _require_fitting(_header(file), channels, length, sample_rate)
        frames = _frames(file, length)
    out[...] = frames.mean(axis=1) if channels == 1 else frames.T


def encode_wav(clip: Clip, sample_rate: int) -> bytes:
    """A WAV file of 16 bits a sample.

    Args:
        clip: float32 [C, n]; what is outside −1 to 1 is clipped.
        sample_rate: in hertz.
    """
    import soundfile

    file = io.BytesIO()
    levels = np.clip(np.rint(np.float64(clip.T) * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(file, levels, sample_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


@contextmanager
def _opened(content: bytes | memoryview) -> Iterator[Any]:
    import soundfile  # loads libsndfile, which only those who have sounds need

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            yield file
    except CodecError:
        raise
    except Exception as error:  # libsndfile's errors, and those of a header that makes no sense
        reason = " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
        raise CodecError(f"is no readable sound ({reason})") from error


def _header(file: Any) -> AudioHeader:
    if file.format not in _CONTAINERS:
        raise CodecError(f"is {file.format}, expected WAV, FLAC or OGG")
    if not 0 < file.samplerate <= _MOST_HERTZ:
        rule = f"has {file.samplerate:,} samples a second, the most is {_MOST_HERTZ:,}"
        raise CodecError(rule, hint="Correct its header, or take it out")
    if file.channels * file.frames > _MOST_NUMBERS:
        raise CodecError(
            f"has {file.frames:,} samples of {file.channels} channels, the most is "
            f"{_MOST_NUMBERS:,} in all",
            hint="Cut it",
        )
    return AudioHeader(_CONTAINERS[file.format], file.channels, file.frames, file.samplerate)


def _frames(file: Any, length: int) -> Clip:
    """The first ``length`` samples, float32 [length, C]."""
    frames: Clip = file.read(length, dtype="float32", always_2d=True)
    if len(frames) != length:  # a torn file tells more than it has
        raise CodecError(f"ends after {len(frames):,} of {file.frames:,} samples")
    if not np.isfinite(frames).all():  # WAV may hold floats of any kind
        raise CodecError(
            "holds numbers that are not finite", hint="Take the sample out and pack again"
        )
    return frames


def _require_fitting(found: AudioHeader, channels: int, length: int, sample_rate: int) -> None:
    if found.sample_rate != sample_rate:
        raise CodecError(
            f"has {found.sample_rate:,} samples a second, expected {sample_rate:,}",
            hint=f"Pack again with --sample-rate {sample_rate}",
        )
    if found.length < length:
        raise CodecError(
            f"has {found.length:,} samples, expected {length:,} or more",
            hint=f"Pack again with --length {length}, or set data.length = {found.length} or less",
        )
    if channels not in (1, found.channels) and found.channels != 1:
        raise CodecError(
            f"has {found.channels} channels, expected {channels}",
            hint=f"Set data.channels to 1 or {found.channels}",
        )

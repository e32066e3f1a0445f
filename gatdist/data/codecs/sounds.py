"""Sounds: WAV, FLAC and OGG files, by libsndfile."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.data.codecs.errors import CodecError

SOUND_COMPONENTS = ("wav", "flac", "ogg")

Clip = NDArray[np.float32]

# What libsndfile may take a file for. Its own choice has headerless formats that fit anything.
_CONTAINERS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG")


def decode_sound(content: bytes | memoryview, shape: tuple[int, int], sample_rate: int) -> Clip:
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
    decode_sound_into(content, clip, sample_rate)
    return clip


def decode_sound_into(content: bytes | memoryview, out: Clip, sample_rate: int) -> None:
    """Decode a sound into ``out``, float32 [C, n]. See :func:`decode_sound`."""
    import soundfile  # loads libsndfile, which only those who have sounds need

    channels, length = out.shape
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:  # its header
            if file.format not in _CONTAINERS:
                raise CodecError(f"is {file.format}, expected WAV, FLAC or OGG")
            _require_fitting(file, channels, length, sample_rate)
            frames: Any = file.read(length, dtype="float32", always_2d=True)
    except CodecError:
        raise
    except Exception as error:  # libsndfile's errors, and those of a header that makes no sense
        reason = " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
        raise CodecError(f"is no readable sound ({reason})") from error
    if len(frames) != length:  # a torn file tells more than it has
        raise CodecError(f"ends after {len(frames):,} of {file.frames:,} samples")
    if not np.isfinite(frames).all():  # WAV may hold floats of any kind
        raise CodecError(
            "holds numbers that are not finite", mend="Take the sample out and pack again"
        )
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


def _require_fitting(file: Any, channels: int, length: int, sample_rate: int) -> None:
    if file.samplerate != sample_rate:
        raise CodecError(
            f"has {file.samplerate:,} samples a second, expected {sample_rate:,}",
            mend=f"Resample it to {sample_rate} Hz and pack again",
        )
    if file.frames < length:
        raise CodecError(
            f"has {file.frames:,} samples, expected {length:,} or more",
            mend=f"Take it out, or set data.length = {file.frames} or less",
        )
    if channels not in (1, file.channels) and file.channels != 1:
        raise CodecError(
            f"has {file.channels} channels, expected {channels}",
            mend=f"Set data.channels to 1 or {file.channels}",
        )

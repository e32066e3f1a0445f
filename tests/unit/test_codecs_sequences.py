"""Codecs of audio, text and tokens."""

from __future__ import annotations

import io
import struct
import wave
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from decoding import decode_audio, decode_text, decode_tokens
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.arrays import encode_array
from gatdist.data.codecs.audio import encode_wav

RATE = 16_000
TIME = np.arange(800) / RATE
SINE = np.float32([0.5 * np.sin(2 * np.pi * 440 * TIME), 0.25 * np.cos(2 * np.pi * 220 * TIME)])


def written(kind: str, clip: np.ndarray = SINE, rate: int = RATE, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip.T, rate, format=kind, **options)
    return file.getvalue()


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    return file.getvalue()


@given(arrays(np.int16, st.tuples(st.integers(1, 3), st.integers(1, 60))))
def test_wav_round_trip_agrees_with_pythons_reader(levels: np.ndarray) -> None:
    content = encode_wav(np.float32(levels) / 32768, RATE)
    assert (decode_audio(content, levels.shape, RATE) * 32768 == levels).all()
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getnchannels(), file.getframerate()) == (len(levels), RATE)
        assert file.readframes(60) == levels.T.astype("<i2").tobytes()


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-24),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("WAV", "ULAW", 0.02),
        ("WAVEX", "PCM_16", 2**-15),
        ("RF64", "PCM_16", 2**-15),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
    ],
)
def test_every_audio_format_within_its_precision(kind: str, subtype: str, error: float) -> None:
    clip = decode_audio(written(kind, subtype=subtype), (2, 800), RATE)
    assert np.abs(clip - SINE)[:, 200:].max() <= error


def test_channels_are_averaged_to_one_or_copied_to_more() -> None:
    mono = decode_audio(written("WAV", subtype="FLOAT"), (1, 800), RATE)
    assert np.allclose(mono[0], SINE.mean(axis=0), atol=1e-7)
    copies = decode_audio(written("WAV", SINE[:1], subtype="FLOAT"), (2, 800), RATE)
    assert (copies == SINE[0]).all()


@given(st.integers(1, 800))
def test_longer_audio_is_cut(length: int) -> None:
    clip = decode_audio(written("WAV", subtype="FLOAT"), (2, length), RATE)
    assert (clip == SINE[:, :length]).all()


@pytest.mark.parametrize(
    ("content", "shape", "rate", "fact"),
    [
        (written("WAV"), (2, 801), RATE, "801"),
        (written("WAV"), (2, 800), 8_000, "8,000"),
        (written("WAV"), (3, 800), RATE, "3"),
        (written("AIFF"), (2, 800), RATE, "AIFF"),
        (b"", (2, 800), RATE, ""),
        (b"no sound at all" * 100, (2, 800), RATE, ""),
        (written("FLAC")[:400], (2, 800), RATE, ""),
        (written("OGG", subtype="VORBIS")[:2000], (2, 800), RATE, ""),
        (written("WAV", np.full((1, 9), np.nan, np.float32), subtype="FLOAT"), (1, 9), RATE, ""),
    ],
)
def test_mismatched_audio_is_rejected(
    content: bytes, shape: tuple[int, int], rate: int, fact: str
) -> None:
    with pytest.raises(CodecError) as caught:
        decode_audio(content, shape, rate)
    assert fact in str(caught.value)


def test_wav_file_whose_header_claims_more_than_it_has_is_rejected() -> None:
    """A header of four gigabytes before a hundred bytes allocates no memory."""
    content = bytearray(written("WAV", SINE[:1], subtype="PCM_16"))
    data = content.index(b"data")
    content[data + 4 : data + 8] = struct.pack("<I", 2**32 - 64)
    with pytest.raises(CodecError):
        decode_audio(bytes(content[: data + 100]), (1, 800), RATE)


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1))
def test_text_round_trip(text: str) -> None:
    content = text.encode()
    assert bytes(decode_text(content, len(content))) == content
    padded = decode_text(memoryview(content), len(content) + 3)
    assert bytes(padded) == content + b"\0\0\0"


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), st.data())
def test_longer_text_is_cut_between_characters(text: str, data: st.DataObject) -> None:
    content = text.encode()
    length = data.draw(st.integers(1, len(content)))
    kept = bytes(decode_text(content, length)).rstrip(b"\0").decode()
    assert text.startswith(kept)
    following = text[len(kept) : len(kept) + 1].encode()
    assert len(kept.encode()) <= length
    assert not following or len(kept.encode()) + len(following) > length


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", ""),
        (b"a\0b", "1"),
        (b"caf\xe9 au lait", "0xe9 at 3"),
        ("…".encode()[:2], "UTF-8"),
        ("text".encode("utf-16"), "UTF-8"),
    ],
)
def test_invalid_text_is_rejected(content: bytes, fact: str) -> None:
    with pytest.raises(CodecError) as caught:
        decode_text(content, 9)
    assert fact in str(caught.value)


@given(
    arrays(
        st.sampled_from([np.uint8, np.int16, np.int64, np.dtype(">i4")]),
        8,
        elements=st.integers(0, 99),
    ),
    st.integers(1, 8),
)
def test_tokens_round_trip(ids: np.ndarray, length: int) -> None:
    tokens = decode_tokens(saved(ids), length, 100)
    assert tokens.dtype == np.int32
    assert (tokens == ids[:length]).all()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (saved([1, 2, 100]), "100 at 2"),
        (saved([1, -2, 3]), "-2 at 1"),
        (saved(np.uint64([2**63, 2, 3])), "9223372036854775808 at 0"),
        (saved([1, 2]), "3"),
        (saved([[1, 2, 3]]), "(1, 3)"),
        (encode_array(np.float32([1, 2, 3])), "float32"),
        (b"text", ".npy"),
        (b"", ".npy"),
    ],
)
def test_invalid_tokens_are_rejected(content: bytes, fact: str) -> None:
    with pytest.raises(CodecError) as caught:
        decode_tokens(content, 3, 100)
    assert fact in str(caught.value)

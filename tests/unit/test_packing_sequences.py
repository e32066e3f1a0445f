"""Packing of audio and text: a common length, and unchanged bytes where possible."""

from __future__ import annotations

import io
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import resample_poly

from decoding import decode_audio
from gatdist.common.errors import DataError
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.audio import encode_wav, read_audio
from gatdist.packing.convert import Audio, Texts
from gatdist.packing.recipe import Recipe
from support import refused

RATE = 8_000


def tone(hertz: float, length: int, rate: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(length) / rate)
    return np.float32([wave] * channels)


def flac(clip: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip.T, rate, format="FLAC")
    return file.getvalue()


def clips(**options: Any) -> Audio:
    recipe = Recipe(**{"sample_rate": RATE} | options)
    return Audio(recipe, (1, options.get("length", 400)))


@pytest.mark.parametrize("encode", [encode_wav, flac])
def test_matching_audio_is_unchanged(encode: Any) -> None:
    content = encode(tone(440, 400), RATE)
    packed = clips()(content)
    assert packed.content == content
    assert packed.component == ("wav" if encode is encode_wav else "flac")
    assert packed.remarks == {}


@given(st.integers(1, 900))
def test_audio_is_cut_or_padded_with_silence(found: int) -> None:
    clip = tone(440, found)
    packed = clips()(encode_wav(clip, RATE))
    result = decode_audio(packed.content, (1, 400), RATE)
    kept = min(found, 400)
    assert np.abs(result[:, :kept] - clip[:, :kept]).max() <= 2**-15
    assert not result[:, kept:].any()
    assert packed.remarks == ({"upscaled": f"{found} samples"} if found < 400 else {})


@pytest.mark.parametrize("rate", [4_000, 11_025, 16_000, 44_100])
def test_tone_is_preserved_at_another_rate(rate: int) -> None:
    packed = clips(length=4_000)(encode_wav(tone(440, rate // 2, rate), rate))
    result = decode_audio(packed.content, (1, 4_000), RATE)
    inside = slice(200, -200)  # the filter rings at the start and end of the tone
    assert np.abs(result - tone(440, 4_000))[0, inside].max() < 0.01


def test_frequencies_above_the_new_nyquist_rate_are_removed() -> None:
    packed = clips(length=4_000)(encode_wav(tone(6_000, 16_000, 32_000), 32_000))
    assert np.abs(decode_audio(packed.content, (1, 4_000), RATE))[0, 200:-200].max() < 0.01


def test_rate_channels_and_length_default_to_the_most_frequent() -> None:
    contents = [
        *[flac(tone(440, 300, channels=2))] * 3,
        flac(tone(440, 900), 16_000),
        b"no sound",
    ]
    convert = Audio.like(Recipe(), contents)
    assert convert is not None
    assert (convert.recipe.sample_rate, convert.sample_shape) == (RATE, (2, 300))
    assert convert(contents[3]).content  # one channel becomes two


def test_values_of_the_recipe_take_precedence() -> None:
    convert = Audio.like(Recipe(sample_rate=16_000, length=100), [flac(tone(440, 300))])
    assert convert is not None
    assert (convert.recipe.sample_rate, convert.sample_shape) == (16_000, (1, 100))


def test_audio_of_different_lengths_requires_a_length() -> None:
    contents = [flac(tone(440, length)) for length in (800, 1_600, 4_000)]
    with refused(DataError, "--length"):
        Audio.like(Recipe(), contents)


def test_invalid_audio_is_rejected() -> None:
    assert Audio.like(Recipe(), [b"", b"text"]) is None
    with pytest.raises(CodecError):
        clips()(b"text")
    with pytest.raises(CodecError):
        Audio(Recipe(sample_rate=RATE), (2, 400))(flac(tone(440, 400, channels=3)))


def test_texts_are_unchanged() -> None:
    convert = Texts.like(Recipe(length=3), [b"short", "größer".encode()])
    assert convert is not None
    assert convert.sample_shape == (3,)
    assert convert("größer".encode()).content == "größer".encode()


def test_texts_of_different_lengths_require_a_length() -> None:
    with refused(DataError, "--length"):
        Texts.like(Recipe(), [b"short", "größer".encode()])
    convert = Texts.like(Recipe(), [b"alike", b"right"])
    assert convert is not None
    assert convert.sample_shape == (5,)


def test_invalid_text_is_rejected() -> None:
    assert Texts.like(Recipe(), [b"\xff", b""]) is None
    with pytest.raises(CodecError):
        Texts(Recipe(), (9,))(b"\xff")


@given(st.integers(1, 3), st.sampled_from([1_000, 3_001, 11_025, 44_100]))
def test_long_audio_is_resampled_as_if_in_one_piece(times: int, rate: int) -> None:
    noise = np.float32(np.random.default_rng(times).uniform(-1, 1, (1, times * rate // 2)))
    clip = read_audio(encode_wav(noise, rate))
    factor = math.gcd(rate, RATE)
    whole = resample_poly(clip, RATE // factor, rate // factor, axis=1)[:, :400]
    packed = clips()(encode_wav(noise, rate))
    result = decode_audio(packed.content, (1, 400), RATE)
    assert np.abs(result - np.clip(whole, -1, 1)).max() <= 2**-14


@pytest.mark.parametrize("rate", [477_104_581, 2**31 - 1])
def test_invalid_rate_is_rejected(rate: int) -> None:
    content = bytearray(encode_wav(tone(440, 400), RATE))
    content[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(CodecError):
        clips()(bytes(content))


def test_low_rate_allocates_no_more_than_is_kept() -> None:
    content = encode_wav(tone(0.1, 2_000_000, 1), 1)
    tracemalloc.start()
    try:
        assert clips()(content).remarks == {}
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()

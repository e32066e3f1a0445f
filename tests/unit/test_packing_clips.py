"""Clips of recordings: every window lies within a clip, and clips are those of the whole."""

from __future__ import annotations

import io
import math
import tarfile
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import resample_poly

import gatdist
from gatdist.common.errors import ConfigError, DataError
from gatdist.config import DataConfig
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.audio import encode_wav, read_audio
from gatdist.data.dataset import open_dataset
from gatdist.packing.clips import clip_starts
from gatdist.packing.convert import Audio
from gatdist.packing.recipe import Recipe
from packing import content, image, pack, samples, write
from support import refused

RATE = 8_000
CLIP, OVERLAP = 100, 30


def noise(length: int, seed: int = 0, channels: int = 1) -> NDArray[np.float32]:
    levels = np.random.default_rng(seed).integers(-32768, 32768, (channels, length))
    return (levels / 32768).astype(np.float32)


def encoded(clip: NDArray[np.float32], form: str, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip.T, rate, format=form)
    return file.getvalue()


def cut(content: bytes, rate: int = RATE, channels: int = 1, **options: int) -> NDArray[Any]:
    recipe = Recipe(sample_rate=rate, **{"clip_length": CLIP, "clip_overlap": OVERLAP} | options)
    convert = Audio(recipe, (channels, recipe.clip_length or 0))
    found = [read_audio(each.content) for each in convert.samples(content, None)]
    assert len(found) == convert.count(content)
    return np.stack(found)


@given(st.integers(1, 500), st.integers(1, 80), st.data())
def test_every_window_lies_within_a_clip(length: int, size: int, data: Any) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    starts = clip_starts(length, size, overlap)
    assert starts[0] == 0
    assert all(0 < b - a <= size - overlap for a, b in pairwise(starts))
    if length >= size:
        assert starts[-1] + size == length
    for begin in range(max(1, length - overlap + 1)):
        end = min(begin + overlap, length)
        assert any(start <= begin and end <= start + size for start in starts)


@given(st.integers(1, 450), st.sampled_from(["WAV", "FLAC"]))
def test_clips_hold_every_window_of_a_recording(length: int, form: str) -> None:
    whole = noise(length)
    clips = cut(encoded(whole, form))
    padded = np.pad(whole, ((0, 0), (0, max(0, CLIP - length))))
    for clip, start in zip(clips, clip_starts(length, CLIP, OVERLAP), strict=True):
        assert np.array_equal(clip, padded[:, start : start + CLIP])


@given(st.integers(1, 700), st.sampled_from([4_000, 5_000, 11_025, 22_050, 48_000]))
def test_clips_are_resampled_as_if_in_one_piece(length: int, rate: int) -> None:
    recording = np.trunc(noise(length) * 16384) / np.float32(32768)
    factor = math.gcd(rate, RATE)
    whole = resample_poly(recording, RATE // factor, rate // factor, axis=1)
    clips = cut(encoded(recording, "WAV", rate))
    padded = np.pad(whole, ((0, 0), (0, max(0, CLIP - whole.shape[1]))))
    for clip, start in zip(clips, clip_starts(whole.shape[1], CLIP, OVERLAP), strict=True):
        assert np.array_equal(clip, read_audio(encode_wav(padded[:, start : start + CLIP], RATE)))


def test_channels_are_mixed() -> None:
    whole = noise(250, channels=2)
    clips = cut(encoded(whole, "WAV"))
    assert np.abs(clips[0] - whole.mean(0)[:CLIP]).max() <= 2**-15
    assert cut(encoded(whole, "WAV"), channels=2).shape == (4, 2, CLIP)
    assert cut(encoded(whole[:1], "WAV"), channels=2).shape == (4, 2, CLIP)


def test_long_recordings_take_the_memory_of_a_clip() -> None:
    recording = encoded(noise(60 * RATE), "FLAC")
    recipe = Recipe(sample_rate=RATE, clip_length=1_000)
    convert = Audio(recipe, (1, 1_000))
    tracemalloc.start()
    count = sum(1 for _ in convert.samples(recording, None))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 480
    assert peak < 60 * RATE / 2  # the recording has 4 bytes per sample


def test_an_empty_recording_is_refused() -> None:
    with pytest.raises(CodecError):
        cut(encoded(noise(0), "WAV"))


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    files = {f"{i}.wav": encoded(noise(80 + 90 * i, i), "WAV") for i in range(5)}
    return write(tmp_path / "recordings", files | {"empty.wav": encoded(noise(0), "WAV")})


def test_recordings_become_a_data_set(recordings: Path, tmp_path: Path) -> None:
    options = {"clip_length": CLIP, "clip_overlap": OVERLAP, "shard_bytes": 3_000}
    planned = pack(recordings, tmp_path / "packed", dry_run=True, **options)
    assert (planned["samples"], planned["sample_shape"]) == (6, [1, CLIP])
    outcome = pack(recordings, tmp_path / "packed", **options)
    wanted = [len(clip_starts(80 + 90 * i, CLIP, OVERLAP)) for i in range(5)]
    assert outcome["samples"] == sum(wanted)
    assert outcome["shards"] > 1
    assert (outcome["upscaled"], outcome["upscaled_example"]) == (1, "0.wav (80 samples)")
    assert outcome["skipped_examples"] == [["empty.wav", "has no samples"]]
    dataset = open_dataset(DataConfig(url=str(tmp_path / "packed")))
    found, _ = dataset.read(np.arange(dataset.num_samples))
    for i in range(5):
        whole = np.pad(noise(80 + 90 * i, i), ((0, 0), (0, max(0, 20 - 90 * i))))
        for start in clip_starts(whole.shape[1], CLIP, OVERLAP):
            part = whole[:, start : start + CLIP]
            assert any(np.array_equal(part, clip) for clip in found)
    assert gatdist.verify(str(tmp_path / "packed"), decode=True, workers=1)["whole"]
    wanted_files = content(tmp_path / "packed")
    pack(recordings, tmp_path / "again", workers=2, **options)
    assert content(tmp_path / "again") == wanted_files


def test_keys_of_clips_follow_from_the_recording(recordings: Path, tmp_path: Path) -> None:
    pack(recordings, tmp_path / "packed", clip_length=CLIP, clip_overlap=OVERLAP)
    keys: dict[str, list[str]] = {}
    for tar in sorted((tmp_path / "packed").glob("*.tar")):
        with tarfile.open(tar) as file:
            for name in file.getnames():
                recording, _, clip = name.partition(".")[0].rpartition("-")
                keys.setdefault(recording, []).append(clip)
    assert len(keys) == 5
    for clips in keys.values():
        assert clips == [f"{i:05d}" for i in range(len(clips))]


def test_recordings_of_several_fields_are_cut_alike(tmp_path: Path) -> None:
    files = {f"clean/{i}.wav": encoded(noise(300, i), "WAV") for i in range(3)}
    # A sample shorter, as after a codec: the clips must still show the same time.
    files |= {f"noisy/{i}.wav": encoded(noise(300, i)[:, : 300 - i % 2], "WAV") for i in range(3)}
    source, fields = write(tmp_path / "source", files), {"wave": "clean", "noisy": "noisy"}
    pack(source, tmp_path / "packed", fields=fields, clip_length=CLIP, clip_overlap=OVERLAP)
    found = samples(tmp_path / "packed")
    assert len(found) == 3 * 4
    for sample in found:
        assert sample["wave.wav"] == sample["noisy.wav"]


def test_a_damaged_part_ends_a_recording(tmp_path: Path) -> None:
    clip = noise(300)
    clip[0, 250] = np.nan
    file = io.BytesIO()
    soundfile.write(file, clip.T, RATE, format="WAV", subtype="FLOAT")
    files = {"0.wav": file.getvalue(), "1.wav": encode_wav(noise(300), RATE)}
    source = write(tmp_path / "source", files)
    outcome = pack(source, tmp_path / "packed", clip_length=CLIP)
    assert outcome["samples"] == 2 + 3
    assert "2 clips" in outcome["skipped_examples"][0][1]
    with refused(DataError, "0.wav"):
        pack(source, tmp_path / "strict", clip_length=CLIP, strict=True)


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        ({"clip_length": CLIP, "clip_overlap": CLIP}, "--clip-length"),
        ({"clip_length": CLIP, "clip_overlap": -1}, "--clip-overlap"),
        ({"clip_overlap": 5}, "--clip-overlap"),
        ({"clip_length": CLIP, "length": 5}, "--length"),
        ({"clip_length": 0}, "--clip-length"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, int], subject: str, recordings: Path, tmp_path: Path
) -> None:
    with refused(ConfigError, subject):
        pack(recordings, tmp_path / "packed", **options)


def test_images_have_no_clips(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"0.png": image(0)})
    with refused(DataError, "--clip-length"):
        pack(source, tmp_path / "packed", clip_length=CLIP)

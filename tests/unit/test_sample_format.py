"""The format of samples for networks, and its conversion to and from files."""

import io

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gatdist.data.codecs import CodecError
from gatdist.data.codecs.text import Vocabulary
from gatdist.data.modalities import ReadSpec
from gatdist.data.sample_format import sample_format_of
from gatdist.monitor.previews import preview


def sample_format(modality, shape, **metadata):
    return sample_format_of(ReadSpec(modality=modality, sample_shape=list(shape), **metadata))


def image_format(*shape):
    return sample_format("image", shape)


class TestImages:
    def test_pixels_round_trip(self):
        pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
        images = image_format(3, 16, 16)
        seen = images.to_network(pixels)
        assert seen.shape == (2, 3, 16, 16)
        assert seen.dtype == torch.float32
        assert (float(seen.min()), float(seen.max())) == (-1.0, 1.0)
        assert images.to_samples(seen).equal(pixels)
        assert images.to_samples(seen.double()).equal(pixels)

    def test_levels_are_rounded_and_clamped(self):
        levels = torch.tensor([-7.0, -0.51, 0.49, 0.51, 100.5, 254.6, 400.0])
        seen = (levels / 127.5 - 1).double().reshape(1, 1, 1, -1)
        samples = image_format(1, 1, 7).to_samples(seen)
        assert samples.flatten().tolist() == [0, 0, 0, 1, 101, 255, 255]

    @pytest.mark.parametrize("channels", [1, 3])
    def test_file_contains_the_pixels(self, channels):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        content = image_format(channels, 5, 7).encode(pixels)
        found = np.asarray(Image.open(io.BytesIO(content))).reshape(5, 7, channels)
        assert (found == pixels).all()


class TestPointsAndTokens:
    def test_points_are_passed_to_the_network_unchanged(self):
        points = torch.randn(5, 2)
        assert sample_format("points", (2,)).to_network(points) is points

    def test_tokens_become_one_hot_and_round_trip(self):
        tokens = sample_format("tokens", (4,), num_tokens=9)
        ids = torch.tensor([[0, 8, 3, 3]], dtype=torch.int32)
        seen = tokens.to_network(ids)
        assert seen.shape == (1, *tokens.shape) == (1, 9, 4)
        assert seen.sum(dim=1).equal(torch.ones(1, 4))
        assert tokens.to_samples(seen).equal(ids)
        assert (np.load(io.BytesIO(tokens.encode(ids[0].numpy()))) == ids[0].numpy()).all()


class TestAudio:
    clips = sample_format("audio", (1, 100), sample_rate=8000)

    def test_fakes_are_rounded_like_a_file(self):
        seen = torch.linspace(-1.2, 1.2, 100).view(1, 1, 100)
        samples = self.clips.to_samples(seen)
        content = self.clips.encode(samples[0].numpy())
        found, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        assert rate == 8000
        assert (samples[0].numpy() == found.T).all()
        assert (samples - seen.clamp(-1, 1)).abs().max() <= 1 / 32768
        assert self.clips.to_network(self.clips.to_samples(samples)).equal(samples)

    def test_networks_get_the_sample_rate(self):
        assert self.clips.metadata == {"modality": "audio", "sample_rate": 8000}


class TestTexts:
    @given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
    def test_any_text_round_trips_as_bytes(self, text):
        vocabulary = Vocabulary()
        ids = vocabulary.encode(text, len(text.encode()) + 3)
        assert vocabulary.decode(ids) == text
        assert vocabulary.decode(vocabulary.encode(text)) == text

    @given(st.text("abcä€😀", min_size=1, max_size=9))
    def test_any_text_round_trips_as_characters(self, text):
        vocabulary = Vocabulary("😀€äcba")
        ids = vocabulary.encode(text, 9)
        assert ids.max() <= 6
        assert vocabulary.decode(ids) == text

    @given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
    def test_text_is_cut_between_characters(self, text):
        cut = Vocabulary().decode(Vocabulary().encode(text, 5))
        assert text.startswith(cut)
        assert len(cut.encode()) <= 5
        assert len(cut) == len(text) or len(text[: len(cut) + 1].encode()) > 5

    def test_unknown_character_is_named(self):
        with pytest.raises(CodecError):
            Vocabulary("abcfpel").encode("cafés")

    def test_one_hot_round_trip_ignores_what_follows_the_end(self):
        texts = sample_format("text", (5,), vocabulary="ab")
        assert texts.shape == (3, 5)
        ids = torch.tensor([[1, 2, 0, 0, 0], [2, 2, 2, 1, 1]], dtype=torch.uint8)
        assert texts.to_samples(texts.to_network(ids)).equal(ids)
        after_the_end = torch.tensor([[1, 0, 2, 0, 1]], dtype=torch.uint8)
        found = texts.to_samples(texts.to_network(after_the_end))
        assert found.tolist() == [[1, 0, 0, 0, 0]]
        assert texts.encode(ids[0].numpy()) == b"ab"


class TestPreviews:
    def test_images_and_points_are_shown_as_one_image(self):
        for kind in (image_format(1, 8, 8), sample_format("points", (2,))):
            shown = preview(kind, torch.randn(9, *kind.shape))
            assert list(shown.files()) == [".png"]
            assert Image.open(io.BytesIO(shown.files()[".png"]())).size

    def test_audio_clips_are_joined_and_shown_as_spectrograms(self):
        clips = sample_format("audio", (2, 4000), sample_rate=8000)
        tone = torch.sin(torch.arange(4000) * 2 * torch.pi * 440 / 8000).expand(3, 2, -1) * 0.5
        shown = preview(clips, tone)
        assert list(shown.files()) == [".wav", ".png"]
        heard, rate = soundfile.read(io.BytesIO(shown.files()[".wav"]()))
        assert (rate, heard.shape) == (8000, (3 * (4000 + 2000), 2))
        assert abs(heard[6000:10000] - tone[1].T.numpy()).max() < 1e-4
        assert (heard[4000:6000] == 0).all()

    def test_each_text_is_a_line(self):
        texts = sample_format("text", (4,), vocabulary="a\nb")
        ids = torch.tensor([[1, 3, 0, 0], [3, 2, 1, 0]], dtype=torch.uint8)
        shown = preview(texts, texts.to_network(ids))
        assert shown.text == "ab\nb⏎a"
        assert shown.files()[".txt"]() == "ab\nb⏎a\n".encode()

    def test_tokens_are_shown_as_numbers(self):
        tokens = sample_format("tokens", (2,), num_tokens=12)
        assert preview(tokens, tokens.to_network(torch.tensor([[3, 11]]))).text == "3 11"

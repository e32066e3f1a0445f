"""Loading and exporting generators with inputs; tiles and receptive fields."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gatdist
from conditional_runs import HOP, LENGTH, RATE, SIDE, clip, image, train_translation, train_vocoder
from gatdist.common.errors import CheckpointError, ConfigError
from gatdist.models import hifigan
from gatdist.models.image.translation import UNetGenerator
from gatdist.models.spectrograms import slaney_bands
from gatdist.models.tiling import Axis, in_tiles, measure
from gatdist.models.vocos import Vocos
from gatdist.runs import load_run
from gatdist.runs.generator import Generator, folded
from gatdist.storage import Store
from support import refused


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory):
    return train_vocoder(tmp_path_factory.mktemp("vocoder") / "run")


@pytest.fixture(scope="module")
def vocos_vocoder(tmp_path_factory):
    small = 'model.generator={name="vocos", width=8, hidden=16, blocks=2}'
    return train_vocoder(tmp_path_factory.mktemp("vocos") / "run", small)


@pytest.fixture(scope="module")
def translation(tmp_path_factory):
    return train_translation(tmp_path_factory.mktemp("translation") / "run")


def trained(run):
    return load_run(Store(str(run)), torch.device("cpu"))


def hifigan_generator():
    return hifigan.HiFiGANGenerator(
        input_shapes=((12, 32),),
        sample_shape=(1, 512),
        num_classes=0,
        version="v3",
        upsampling=[4, 4],
        width=8,
    )


def vocos_generator():
    return Vocos(
        input_shapes=((12, 32),), sample_shape=(1, 512), num_classes=0, width=8, hidden=12, blocks=2
    )


def unet(norm="batch"):
    return UNetGenerator(
        input_shapes=((1, SIDE, SIDE),),
        sample_shape=(3, SIDE, SIDE),
        num_classes=0,
        width=4,
        norm=norm,
    )


def unet_with_dropout():
    """With the same masks for all tiles, as for one file."""
    network = UNetGenerator(
        input_shapes=((1, 64, 64),), sample_shape=(3, 64, 64), num_classes=0, width=2
    )
    noise = torch.randn(1, network.noise_size, dtype=torch.float64)
    network.register_forward_pre_hook(
        lambda _, given: (*given, None, noise.expand(len(given[0]), -1))
    )
    return network


def convolutions():
    """With a stride, a dilation, reflected borders, and twice the size."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 7, padding=3, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 1, 3, padding=1),
    )


CASES = {  # network, shape in training, larger shape, tile
    "hifigan": (hifigan_generator, (12, 32), (300,), (90,)),
    "vocos": (vocos_generator, (12, 32), (300,), (90,)),
    "unet": (unet, (1, SIDE, SIDE), (208, 160), (144, 160)),
    "unet with dropout": (unet_with_dropout, (1, 64, 64), (640, 576), (512, 576)),
    "convolutions": (convolutions, (1, 16, 24), (122, 150), (50, 58)),
}


class TestTiles:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("case", CASES)
    def test_tiles_give_what_the_whole_gives(self, case, batch):
        build, shape, larger, tiles = CASES[case]
        torch.manual_seed(0)
        network = build().double().eval().requires_grad_(False)
        counted = []

        def call(x):
            counted.append(tuple(x.shape))
            return network(x)

        axes = measure(network, shape)
        whole = torch.randn(1, shape[0], *larger, dtype=torch.float64)
        expected = network(whole)
        found = in_tiles(call, whole, axes, tiles, batch=batch)
        assert len(counted) > 1 or batch > 1
        assert {sizes[0] for sizes in counted} == {batch}
        assert max(sizes[2] for sizes in counted) <= tiles[0] < larger[0]
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12

    def test_receptive_fields_are_those_of_the_convolutions(self):
        assert measure(nn.Conv1d(1, 1, 9, padding=4).double(), (1, 16)) == (Axis(1, 1, 4, 4),)
        two = nn.Sequential(nn.Conv1d(1, 1, 5, padding=2), nn.Conv1d(1, 1, 3, padding=1))
        assert measure(two.double(), (1, 16)) == (Axis(1, 1, 3, 3),)
        causal = nn.Conv1d(1, 1, 4).double()
        found = measure(lambda x: causal(functional.pad(x, (3, 0))), (1, 16))
        assert found == (Axis(1, 1, 3, 0),)

    def test_a_margin_that_is_too_small_shows(self):
        torch.manual_seed(0)
        network = convolutions().double().eval().requires_grad_(False)
        axes = measure(network, (1, 16, 24))
        whole = torch.randn(1, 1, 122, 150, dtype=torch.float64)
        short = [Axis(a.scale, a.period, a.left - a.period, a.right) for a in axes]
        difference = in_tiles(network, whole, short, (50, 58)) - network(whole)
        assert float(difference.abs().max()) > 1e-6

    @pytest.mark.parametrize(
        "function",
        [
            unet("instance").double(),
            lambda x: x / x.std(),
            lambda x: functional.pad(x, (1, 1, 0, 0), "circular").unfold(3, 3, 1).sum(-1),
            lambda x: x * torch.arange(x.shape[3]),
            lambda x: x[..., ::3],
            lambda x: functional.conv2d(x, x.new_ones(1, 1, 1, 5)[..., : SIDE - x.shape[3] + 5]),
        ],
        ids=["instance", "scale", "circular", "position", "no whole number", "one size"],
    )
    def test_what_tiles_would_change_has_none(self, function):
        assert measure(function, (1, SIDE, SIDE)) is None


class TestLoaded:
    def test_recordings_and_their_spectrograms_give_the_same(self, vocoder):
        generator = gatdist.load(vocoder)
        waves = np.stack([clip(0), clip(1)])
        made = generator(wave=waves)
        assert made.shape == (2, 1, LENGTH)
        mel = generator.task.mel(torch.from_numpy(waves))
        assert torch.equal(generator(mel=mel), made)
        assert not torch.equal(made[0], made[1])

    def test_images_are_levels_or_as_networks_see_them(self, translation):
        generator = gatdist.load(translation)
        images = np.stack([image(0), image(1)])
        made = generator(input=images)
        assert (made.shape, made.dtype) == ((2, SIDE, SIDE, 3), torch.uint8)
        as_seen = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        seen = generator(input=as_seen)
        assert seen.shape == (2, 3, SIDE, SIDE)
        levels = ((seen + 1) * 127.5 + 0.5).floor().permute(0, 2, 3, 1)
        assert torch.equal(levels.to(torch.uint8), made)

    def test_folded_weights_give_the_same(self, vocoder):
        network = trained(vocoder).generator.double()
        mel = torch.randn(2, 12, 30, dtype=torch.float64)
        expected = network(mel)
        assert len(list(network.parameters())) > len(list(folded(network).parameters()))
        assert not any("parametrizations" in name for name in network.state_dict())
        assert float((network(mel) - expected).abs().max()) < 1e-12
        assert not any(p.requires_grad for p in gatdist.load(vocoder).parameters())

    def test_the_network_of_the_run_stays_as_it_was(self, vocoder):
        run = trained(vocoder)
        before = {name: tensor.clone() for name, tensor in run.generator.state_dict().items()}
        mel = torch.randn(2, 12, 30)
        made = [generator(mel=mel) for generator in (Generator.of(run), Generator.of(run))]
        assert torch.equal(*made)
        assert torch.equal(run.generator(mel), made[0])
        after = run.generator.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_a_checkpoint_is_chosen_by_its_samples(self, vocoder):
        mel = torch.zeros(1, 12, 8)
        first, last = (gatdist.load(vocoder, checkpoint=n) for n in (16, 24))
        assert (first.samples_seen, last.samples_seen) == (16, 24)
        assert torch.equal(gatdist.load(vocoder)(mel=mel), last(mel=mel))
        assert not torch.equal(first(mel=mel), last(mel=mel))
        with refused(CheckpointError, "--checkpoint"):
            gatdist.load(vocoder, checkpoint=17)

    def test_an_export_loads_like_its_run(self, translation, tmp_path):
        path = gatdist.export(translation, "safetensors", out=tmp_path / "g")
        images = np.stack([image(0)])
        expected = gatdist.load(translation)(input=images)
        assert torch.equal(gatdist.load(path)(input=images), expected)

    @pytest.mark.parametrize(
        ("fields", "subject"),
        [
            ({}, "generator"),
            ({"inputs": torch.zeros(1, 1, 16, 16)}, "fields"),
            ({"target": torch.zeros(1, 3, 16, 16)}, "fields"),
            ({"input": torch.zeros(1, 3, 16, 16)}, "input"),
            ({"input": torch.zeros(1, 16, 16, dtype=torch.uint8)}, "input"),
            ({"latents": torch.zeros(1, 8)}, "generator"),
            ({"wave": torch.zeros(1, 1, 256)}, "fields"),
        ],
    )
    def test_fields_that_do_not_fit_are_refused(self, translation, fields, subject):
        with refused(ConfigError, subject):
            gatdist.load(translation)(**fields)

    def test_a_device_that_is_absent_is_refused(self, vocoder):
        for device in ("cuda:99", "gpu"):
            with refused(ConfigError, "--device"):
                gatdist.load(vocoder, device=device)


class TestExported:
    @pytest.mark.parametrize(
        ("run", "shape", "multiples"),
        [
            ("vocoder", (12, 37), {"length": 1}),
            ("vocos_vocoder", (12, 37), {"length": 1}),
            ("translation", (1, 48, 32), {"height": SIDE, "width": SIDE}),
        ],
    )
    def test_both_formats_take_named_inputs_of_other_sizes(
        self, run, shape, multiples, request, tmp_path
    ):
        onnxruntime = pytest.importorskip("onnxruntime")
        run = request.getfixturevalue(run)
        generator = gatdist.load(run)
        (name,) = generator.shapes.names
        value = torch.randn(3, *shape)
        expected = generator(**{name: value}).numpy()

        path = gatdist.export(run, "onnx", out=tmp_path / "g")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        [samples] = session.run(["samples"], {name: value.numpy()})
        assert abs(samples - expected).max() < 1e-4
        about = json.loads(session.get_modelmeta().custom_metadata_map["gatdist"])
        assert about["inputs"][name]["multiples_of"] == multiples

        files = {"description.json": ""}
        path = gatdist.export(run, "torch", out=tmp_path / "g")
        program = torch.export.load(path, extra_files=files).module()
        assert abs(program(**{name: value}).numpy() - expected).max() < 1e-5
        assert json.loads(files["description.json"]) == about

    def test_the_description_suffices_to_compute_the_spectrogram(self, vocoder, tmp_path):
        files = {"description.json": ""}
        path = gatdist.export(vocoder, "torch", out=tmp_path / "g")
        torch.export.load(path, extra_files=files)
        about = json.loads(files["description.json"])["parameters"]["mel"]
        assert (about["sample_rate"], about["hop"]) == (RATE, HOP)
        window, hop, wave = about["window"], about["hop"], clip(3)[0].astype(np.float64)
        padded = np.pad(wave, about["padding"]["samples"], about["padding"]["mode"])
        frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        power = np.abs(np.fft.rfft(frames * hann)) ** 2
        magnitude = np.sqrt(power + about["added_to_power"])
        bands = slaney_bands(about["sample_rate"], about["bands"], window, about["highest"])
        mel = np.log(np.maximum(magnitude @ bands.numpy().T, about["smallest_magnitude"])).T
        expected = gatdist.load(vocoder).task.mel(torch.from_numpy(clip(3)).double()[None])[0]
        np.testing.assert_allclose(mel, expected.numpy(), rtol=1e-9)

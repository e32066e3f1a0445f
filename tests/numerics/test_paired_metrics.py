"""Metrics of pairs: closed forms, published code as reference, and equality over workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arrays import ALONE, Arrays
from gatdist.common.errors import ConfigError
from gatdist.config import EvaluateConfig
from gatdist.evaluation import Evaluator, metrics, pitch
from gatdist.evaluation.paired import PairedMetric, Pairs, _log_mel, resolutions
from gatdist.models.spectrograms import LogMelSpectrogram, slaney_bands
from support import refused, spawn

RATE = 8000
IMAGE_METRICS = ["l1", "psnr", "ssim"]
AUDIO_METRICS = ["l1", "log_mel", "stft", "pitch"]


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) * 2 - 1


def tone(hertz, rate=RATE, seconds=0.5, amplitude=0.5):
    """Return harmonics of a pitch, [t]."""
    times = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    waves = [(2 * torch.pi * hertz * k * times).sin() / k for k in (1, 2, 3)]
    return (amplitude * torch.stack(waves).sum(0) / 2).float()


def values(name, output, target, rate=RATE):
    """Return the values of each pair by name, [n] each."""
    metric = metrics[name]
    assert isinstance(metric, PairedMetric)
    found = metric.of(Pairs(output, target, rate))
    assert found.shape == (len(output), len(metric.values))
    return dict(zip(metric.values, found.unbind(1), strict=True))


# Images


def test_psnr_of_a_known_difference():
    target = noise(3, 3, 8, 8) * 0.9
    expected = 10 * np.log10(2**2 / 0.05**2)
    found = values("psnr", target + 0.05, target)["psnr"]
    assert found.tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_equal_images():
    images = noise(2, 3, 16, 16)
    assert values("psnr", images, images)["psnr"].tolist() == [100, 100]
    assert values("ssim", images, images)["ssim"].tolist() == pytest.approx([1, 1], abs=1e-12)
    assert values("l1", images, images)["l1"].tolist() == [0, 0]


def test_ssim_of_constant_images():
    # Without variance and covariance only the term of luminance is left.
    x, y, k = 0.3, -0.1, (0.01 * 2) ** 2
    expected = (2 * x * y + k) / (x**2 + y**2 + k)
    found = values("ssim", torch.full((1, 1, 12, 15), x), torch.full((1, 1, 12, 15), y))["ssim"]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_ssim_equals_that_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    target = noise(3, 3, 24, 20)
    output = (target + 0.3 * noise(3, 3, 24, 20, seed=1)).clamp(-1, 1)
    # It reflects the images at their borders, which the published code does not.
    _, maps = structural_similarity_index_measure(
        output.double(), target.double(), data_range=2.0, reduction="none", return_full_image=True
    )
    expected = maps[..., 5:-5, 5:-5].mean((1, 2, 3))
    found = values("ssim", output, target)["ssim"]
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_ssim_equals_that_of_scikit_image():
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    target = noise(1, 3, 24, 20)
    output = (target + 0.3 * noise(1, 3, 24, 20, seed=1)).clamp(-1, 1)
    expected = similarity(
        output[0].double().numpy(),
        target[0].double().numpy(),
        data_range=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=0,
    )
    assert float(values("ssim", output, target)["ssim"]) == pytest.approx(expected, rel=1e-9)


# Audio


@pytest.mark.parametrize("rate", [8000, 16000, 22050])
@pytest.mark.parametrize("hertz", [70.0, 131.3, 220.0, 440.0, 520.0])
def test_pitch_of_a_tone_of_known_frequency(hertz, rate):
    found = pitch.track(tone(hertz, rate)[None], rate)
    assert found.is_voiced.all()
    cents = 1200 * (found.hertz / hertz).log2()
    assert float(cents.abs().max()) < 5
    assert float(found.periodicity.min()) > 0.95


def test_noise_and_silence_are_unvoiced():
    found = pitch.track(torch.stack([noise(4000, seed=3), torch.zeros(4000)]), RATE)
    assert float(found.is_voiced.double().mean()) < 0.02
    assert float(found.periodicity[1].max()) == 0


def test_the_difference_function_is_that_of_its_definition():
    clip = noise(1, 600)
    found = pitch._normalized_difference(clip.double(), RATE)[0, 0]
    window, x = round(pitch.WINDOW_S * RATE), clip[0].double()
    d = torch.stack([(x[:window] - x[k : k + window]).square().sum() for k in range(len(found))])
    expected = torch.ones_like(d)
    for k in range(1, len(d)):
        expected[k] = d[k] / (d[1 : k + 1].sum() / k)
    torch.testing.assert_close(found, expected)


def test_pitch_error_of_a_shifted_tone_is_its_interval():
    target = torch.stack([tone(200.0), tone(150.0)])[:, None]
    output = torch.stack([tone(200.0 * 2 ** (50 / 1200)), tone(150.0)])[:, None]
    found = values("pitch", output, target)
    assert found["pitch"].tolist() == pytest.approx([50, 0], abs=1)
    assert found["pitch_voicing"].tolist() == [0, 0]


def test_pitch_of_silence_is_not_defined_and_its_voicing_is_wrong():
    found = values("pitch", torch.zeros(1, 1, 4000), tone(200.0)[None, None])
    assert np.isnan(float(found["pitch"]))
    assert float(found["pitch_voicing"]) == 1
    assert float(found["pitch_periodicity"]) > 0.95


def test_equal_clips_have_no_distance():
    clips = noise(2, 1, 4000)
    for name in ("log_mel", "stft"):
        for found in values(name, clips, clips).values():
            assert found.tolist() == [0, 0]


def test_spectral_distances_of_a_gain():
    # All magnitudes are multiplied by the gain; full-band noise keeps them above the floor.
    target = noise(2, 1, 8000) * 0.5
    found = values("stft", 1.25 * target, target)
    assert found["stft_convergence"].tolist() == pytest.approx([0.25] * 2, rel=1e-6)
    assert found["stft_log_magnitude"].tolist() == pytest.approx([np.log(1.25)] * 2, rel=1e-3)
    both = found["stft_convergence"] + found["stft_log_magnitude"]
    assert found["stft"].tolist() == pytest.approx(both.tolist(), rel=1e-12)
    mel = values("log_mel", 1.25 * target, target)["log_mel"]
    assert mel.tolist() == pytest.approx([np.log(1.25)] * 2, rel=1e-2)


def test_resolutions_are_the_published_ones_at_the_published_rate():
    assert resolutions(24_000) == [(1024, 120, 600), (2048, 240, 1200), (512, 50, 240)]
    for fft, _, window in resolutions(8000):
        assert fft >= window


def test_channels_are_averaged():
    target = noise(1, 2, 4000)
    swapped = target.flip(1)
    for name in ("log_mel", "stft", "pitch"):
        assert float(values(name, swapped, target)[name].nan_to_num()) == 0


def speech():
    """Return tones that are cut into syllables, [1, 1, t], so that they count as speech."""
    clip = tone(150.0, seconds=2.0)
    return (clip * (torch.arange(len(clip)) % 3000 < 2200))[None, None]


@pytest.mark.parametrize("name", ["pesq", "stoi"])
def test_scores_of_speech_fall_with_noise_and_skip_silence(name):
    pytest.importorskip({"stoi": "pystoi"}.get(name, name))
    target = torch.cat([speech()] * 4)
    output = target.clone()
    output[1] += 0.3 * noise(1, 16000)
    target[2] = 0
    output[3] = 0
    found = values(name, output, target)[name]
    assert found[0] > found[1] > 0
    assert metrics[name].higher_is_better
    assert np.isnan(float(found[2]))
    assert found[3] < found[1]


# In an evaluation


class Translated:
    """Outputs for inputs that are not stored: targets with keyed noise."""

    def __init__(self, data):
        self.data = data

    def targets(self, positions):
        samples, _ = self.data.read(positions.numpy())
        return self.data.sample_format.to_network(torch.from_numpy(samples))

    def __call__(self, positions):
        targets = self.targets(positions)
        shift = (positions.float() / 1000).view(-1, *[1] * (targets.ndim - 1))
        return targets * (1 - shift) + 0.01

    def pairs(self, positions):
        return self(positions), self.targets(positions)


def data_of(modality, count=530):
    rng = np.random.default_rng(0)
    if modality == "image":
        return Arrays(rng.integers(0, 256, (count, 12, 13, 3), dtype=np.uint8))
    clips = torch.stack([tone(100.0 + i % 7 * 30, seconds=0.1) for i in range(count)])
    return Arrays((clips[:, None] + 0.01 * noise(count, 1, 800)).numpy())


def evaluator_of(data, comm=ALONE, *, has_pairs=True, exact=False, **config):
    return Evaluator(
        EvaluateConfig(**config), data, comm, comm.device, has_pairs=has_pairs, exact=exact
    )


def evaluate_on(comm, modality, names):
    data = data_of(modality)
    found = evaluator_of(data, comm, metrics=names)(Translated(data))
    return found.metrics, found.protocol


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_any_number_of_workers_gives_the_same_bits(modality):
    names = {"image": IMAGE_METRICS, "audio": AUDIO_METRICS}[modality]
    alone, protocol = evaluate_on(ALONE, modality, names)
    assert all(np.isfinite(value) for value in alone.values())
    assert set(names) <= alone.keys()
    assert protocol["split"] == "all real"
    assert protocol["num_generated"] == 530
    for workers in (2, 3):
        for found, _ in spawn(workers, evaluate_on, modality, names):
            assert found == alone


def test_the_mean_is_over_samples():
    data = data_of("image", 300)
    found = evaluator_of(data, metrics=["l1"])(Translated(data)).metrics["l1"]
    outputs, targets = Translated(data).pairs(torch.arange(300))
    rounded = data.sample_format.rounded(outputs)
    assert found == pytest.approx(float((rounded - targets).double().abs().mean()), rel=1e-9)


def test_an_output_that_is_not_finite_makes_the_mean_nan():
    data = data_of("audio", 20)

    class Diverged(Translated):
        def __call__(self, positions):
            made = super().__call__(positions)
            made[positions == 7] = torch.nan
            return made

    found = evaluator_of(data, metrics=AUDIO_METRICS)(Diverged(data)).metrics
    assert np.isnan([found[name] for name in AUDIO_METRICS]).all()


@pytest.mark.parametrize(
    ("modality", "name", "has_pairs"),
    [
        ("image", "psnr", False),
        ("audio", "psnr", True),
        ("image", "log_mel", True),
        ("image", "pesq", True),
        ("points", "ssim", True),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_by_name(modality, name, has_pairs):
    data = Arrays(np.zeros((9, 2), np.float32)) if modality == "points" else data_of(modality, 9)
    with pytest.raises(ConfigError) as caught:
        evaluator_of(data, metrics=[name], has_pairs=has_pairs)
    assert caught.value.subject == "evaluate.metrics"
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "name"),
    [
        (np.zeros((9, 10, 40, 3), np.uint8), "ssim"),
        (np.zeros((9, 1, 200), np.float32), "pitch"),
        (np.zeros((9, 1, 200), np.float32), "log_mel"),
        (np.zeros((9, 1, 100), np.float32), "stft"),
        (np.zeros((9, 1, 1999), np.float32), "pesq"),
        (np.zeros((9, 1, 3199), np.float32), "stoi"),
    ],
)
def test_samples_that_are_too_small_are_refused(samples, name):
    with pytest.raises(ConfigError) as caught:
        evaluator_of(Arrays(samples), metrics=[name])
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["pesq", "stoi"])
def test_a_missing_package_is_named(name, monkeypatch):
    package = {"stoi": "pystoi"}.get(name, name)
    clips = Arrays(np.zeros((9, 1, 3200), np.float32))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        evaluator_of(clips, metrics=[name])
    assert package in str(caught.value)


def test_more_samples_than_inputs_are_refused():
    with pytest.raises(ConfigError) as caught:
        evaluator_of(data_of("image", 9), metrics=["l1"], num_samples=10)
    assert caught.value.subject == "evaluate.num_samples"


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_log_mel_is_defined_at_any_sample_rate(rate):
    assert _log_mel(rate)(torch.zeros(1, 1, rate)).isfinite().all()


@pytest.mark.parametrize(
    ("rate", "window", "highest", "published"),
    [
        (22_050, 1024, 8000.0, 80),
        (22_050, 1024, None, 80),
        (8000, 512, None, 64),
        (8000, 371, None, 40),
        (8000, 64, 3000.0, 12),
        (500, 46, None, 1),
    ],
)
def test_as_many_mel_bands_are_accepted_as_have_bins(rate, window, highest, published):
    def has_empty(count):
        bands = slaney_bands(rate, count, window, highest or rate / 2)
        return bool((bands.amax(1) < 1e-9).any())

    most = max(count for count in range(1, 500) if not has_empty(count))
    assert most >= published
    given = {"window": window, "hop": 8, "highest": highest}
    spectrogram = LogMelSpectrogram(rate, bands=most, **given)
    assert spectrogram(noise(1, 1, 4096)).std(2).min() > 0.01
    for count in (most + 1, 10 * most, 10**9):
        with refused(ConfigError, "game.task.bands") as caught:
            LogMelSpectrogram(rate, bands=count, **given)
        assert f"at most {most}," in str(caught.value)


def test_log_mel_is_refused_where_bands_are_empty():
    data = Arrays(np.zeros((9, 1, 4096), np.float32), sample_rate=1000)
    with refused(ConfigError, "evaluate.metrics"):
        evaluator_of(data, metrics=["log_mel"])

"""Presets named after a paper have its networks and hyperparameters."""

import pytest
import torch

from gatdist.bench.presets import PRESETS
from gatdist.config import load_config, preset_names
from gatdist.models import build_networks
from gatdist.models.hifigan import HiFiGANDiscriminator
from gatdist.models.image.translation import PatchGANDiscriminator

# Sample shape, classes, and the parameters of the generator and the discriminator.
NETWORKS = {
    "biggan-128": ((3, 128, 128), 1000, (70_433_988, 87_982_370)),
    "r3gan-256": ((3, 256, 256), 0, (23_057_952, 23_009_568)),
    "r3gan-64": ((3, 64, 64), 0, (22_429_824, 22_381_440)),
    "r3gan-cifar10": ((3, 32, 32), 10, (20_781_952, 21_280_512)),
    "r3gan-imagenet-32": ((3, 32, 32), 1000, (82_914_304, 86_548_992)),
    "r3gan-imagenet-64": ((3, 64, 64), 1000, (103_570_432, 107_205_120)),
    "r3gan-stacked-mnist": ((3, 32, 32), 0, (20_732_160, 20_683_776)),
    "sngan-128": ((3, 128, 128), 1000, (41_996_931, 30_041_857)),
    "sngan-32": ((3, 32, 32), 10, (4_304_387, 1_055_104)),
    "sngan-64": ((3, 64, 64), 1000, (17_974_915, 11_165_441)),
    "stylegan2-256": ((3, 256, 256), 0, (24_767_458, 24_001_089)),
    "stylegan2-auto-256": ((3, 256, 256), 0, (23_191_522, 24_001_089)),
    "wavegan-16384": ((1, 16384), 0, (19_065_345, 17_427_969)),
}
# Presets with a task. Published numbers do not count the scales of weight normalization.
_DISCRIMINATORS = 41_092_165 + 29_610_627  # of periods, of scales
CONDITIONAL = {
    "hifigan-v1": (13_926_017, _DISCRIMINATORS),
    "hifigan-v2": (925_985, _DISCRIMINATORS),
    "hifigan-v3": (1_462_273, _DISCRIMINATORS),
    "pix2pix-256": (54_413_955, 2_768_705),
}
OURS = {"digits", "digits-conditional", "glyphs", "glyphs-r3gan", "glyphs-stylegan2", "ring"}
OURS |= {"speech", "words", "emoji-pix2pix", "prompts-vocos"}


def test_presets_are_published_or_ours():
    assert set(preset_names()) == NETWORKS.keys() | CONDITIONAL.keys() | OURS


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_published_number_of_parameters(name):
    shape, classes, expected = NETWORKS[name]
    with torch.device("meta"):
        networks = build_networks(load_config(name), shape, classes)
    assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == expected


@pytest.mark.parametrize("name", CONDITIONAL)
def test_networks_of_tasks_have_the_published_number_of_parameters(name):
    case = PRESETS[name]
    with torch.device("meta"):
        networks = case.networks(case.config())
    counts = (
        sum(p.numel() for key, p in network.named_parameters() if not key.endswith("original0"))
        for network in networks
    )
    assert tuple(counts) == CONDITIONAL[name]


def test_discriminators_of_other_families_have_the_published_number_of_parameters():
    """Of HiFi-GAN by kind, and the PatchGAN of VQGAN (three channels)."""
    with torch.device("meta"):
        kinds = (
            HiFiGANDiscriminator(sample_shape=(1, 8192), num_classes=0, scales=0),
            HiFiGANDiscriminator(sample_shape=(1, 8192), num_classes=0, periods=[]),
            PatchGANDiscriminator(sample_shape=(3, 256, 256), num_classes=0),
        )
    counts = [
        sum(p.numel() for key, p in kind.named_parameters() if not key.endswith("original0"))
        for kind in kinds
    ]
    assert counts == [41_092_165, 29_610_627, 2_765_633]


def cosine(start, end, samples):
    return {
        "start": start,
        "end": end,
        "samples": samples,
        "shape": "cosine",
        "delay": 0,
        "warmup": 0,
    }


def linear(start, end, samples, delay=0):
    return cosine(start, end, samples) | {"shape": "linear", "delay": delay}


def r3gan(batch, samples, gamma, ema, p, conditional=False):
    """train.py and README of the authors' code."""
    both = {
        "name": "adam",
        "learning_rate": cosine(2e-4, 5e-5, samples),
        "betas": [0.0, cosine(0.9, 0.99, samples)],
        "eps": 1e-8,
        "weight_decay": 0.0,
    }
    penalty = {"strength": cosine(*gamma, samples), "every_steps": 1}
    augmentation = {
        "name": "ada",
        "p": {"start": 0, "end": p, "samples": samples},
        "policy": {"blit": 1.0, "geometry": 1.0, "color": 0.5, "cutout": 1.0},
    }
    return {
        "run": {"global_batch": batch},
        "data": {"x_flip": True},
        "model": {"latent_size": 64, "latent_distribution": "normal", "conditional": conditional},
        "game": {
            "loss": "relativistic",
            "update_rule": "alternating",
            "order": "discriminator_first",
            "latents": "fresh",
            "num_discriminator_steps": 1,
            "generator_batch": None,
            "penalties": {"r1": penalty, "r2": penalty},
            "ema_half_life_samples": cosine(0.0, ema, samples),
            "augmentation": augmentation,
        },
        "optim": {"generator": both, "discriminator": both},
        "precision": {"dtype": "bfloat16"},
    }


def stylegan2(r1, ema, deviation, mapping):
    """train.py, training/loss.py and training/training_loop.py of stylegan2-ada-pytorch."""
    both = {"name": "adam", "learning_rate": 2.5e-3, "betas": [0.0, 0.99], "eps": 1e-8}
    return {
        "run": {"total_samples": 25_000_000, "global_batch": 64},
        "model": {
            "latent_size": 512,
            "generator": {"style_mixing": 0.9, "mapping_layers": mapping, "style_size": 512},
            "discriminator": {"minibatch_deviation": deviation},
        },
        "game": {
            "loss": "nonsaturating",
            "lazy_penalties": "separate",
            "penalties": {
                "r1": {"strength": r1, "every_steps": 16},
                "path_length": {"strength": 2.0, "every_steps": 4},
            },
            "ema_half_life_samples": ema,
            "augmentation": {"name": "ada", "target": 0.6},
        },
        "optim": {"generator": both, "discriminator": both},
    }


def sngan(batch, generator_batch, iterations, decay_from):
    """configs/ and updater.py of sngan_projection."""
    samples = 5 * batch
    rate = linear(2e-4, 0.0, (iterations - decay_from) * samples, decay_from * samples)
    both = {"name": "adam", "learning_rate": rate, "betas": [0.0, 0.9], "eps": 1e-8}
    return {
        "run": {"total_samples": iterations * samples, "global_batch": batch},
        "data": {"dequantize": True},
        "model": {"latent_size": 128, "conditional": True, "spectral_norm": ["discriminator"]},
        "game": {
            "loss": "hinge",
            "order": "generator_first",
            "num_discriminator_steps": 5,
            "generator_batch": generator_batch,
            "penalties": {},
            "ema_half_life_samples": 0.0,
        },
        "optim": {"generator": both, "discriminator": both},
    }


def hifigan():
    """config_v1.json to config_v3.json and train.py of hifi-gan."""
    rate = linear(2e-4, 9.1e-6, 40_000_000) | {"shape": "exponential"}
    both = {"name": "adam", "learning_rate": rate, "betas": [0.8, 0.99], "weight_decay": 0.01}
    mel = {"bands": 80, "window": 1024, "hop": 256}
    return {
        "run": {"total_samples": 40_000_000, "global_batch": 16},
        "game": {
            "task": {"name": "vocoder", "crop": 8192, "highest": 8000.0, **mel},
            "loss": "least_squares",
            "update_rule": "alternating",
            "order": "discriminator_first",
            "reuse_fakes": True,
            "terms": {
                "log_mel": {"weight": 45.0, **mel},
                "features": {"weight": 2.0, "logits": True},
            },
            "penalties": {},
            "ema_half_life_samples": 0.0,
        },
        "optim": {"generator": both, "discriminator": both},
    }


def pix2pix():
    """Options of pytorch-CycleGAN-and-pix2pix for facades."""
    rate = linear(2e-4, 0.0, 40_000, 40_000)
    both = {"name": "adam", "learning_rate": rate, "betas": [0.5, 0.999]}
    return {
        "run": {"total_samples": 80_000, "global_batch": 1},
        "game": {
            "task": {"name": "translation", "crop": 256, "flip": True},
            "loss": "nonsaturating",
            "update_rule": "alternating",
            "order": "discriminator_first",
            "terms": {"l1": {"weight": 100.0}},
            "ema_half_life_samples": 0.0,
        },
        "optim": {"generator": both, "discriminator": both},
    }


PUBLISHED = {
    "hifigan-v1": hifigan(),
    "hifigan-v2": hifigan(),
    "hifigan-v3": hifigan(),
    "pix2pix-256": pix2pix(),
    "r3gan-cifar10": r3gan(512, 20_000_000, (0.05, 0.005), 5_000_000.0, 0.55, conditional=True),
    "r3gan-64": r3gan(256, 20_000_000, (2.0, 0.2), 500_000.0, 0.3),
    "r3gan-256": r3gan(256, 20_000_000, (150.0, 15.0), 500_000.0, 0.3),
    "r3gan-imagenet-32": r3gan(4096, 200_000_000, (0.5, 0.05), 50_000_000.0, 0.5, conditional=True),
    "r3gan-imagenet-64": r3gan(4096, 200_000_000, (1.0, 0.1), 50_000_000.0, 0.4, conditional=True),
    "stylegan2-256": stylegan2(1.0, 20_000.0, 8, 8),
    # γ = 0.0002 · 256² / 64; half-life 64 · 10/32 thousand, ramped up at 0.05 per image.
    "stylegan2-auto-256": stylegan2(0.2048, linear(0.0, 20_000.0, 400_000), 4, 2),
    "sngan-32": sngan(64, 128, 50_000, 0),
    "sngan-64": sngan(64, 64, 250_000, 200_000),
    "sngan-128": sngan(16, 32, 450_000, 400_000),
    # Brock et al. 2019, appendix C; BigGAN-PyTorch.
    "biggan-128": {
        "run": {"total_samples": 150_000 * 4096, "global_batch": 2048},
        "model": {
            "latent_size": 120,
            "conditional": True,
            "spectral_norm": ["generator", "discriminator"],
            "generator": {"width": 96, "label_size": 128, "attention_side": 64},
        },
        "game": {
            "loss": "hinge",
            "num_discriminator_steps": 2,
            "ema_batch_norm": "averaged",
            "penalties": {},
        },
        "optim": {
            "generator": {"learning_rate": 5e-5, "betas": [0.0, 0.999], "eps": 1e-6},
            "discriminator": {"learning_rate": 2e-4, "betas": [0.0, 0.999], "eps": 1e-6},
        },
    },
    # train_wavegan.py of wavegan.
    "wavegan-16384": {
        "run": {"global_batch": 64},
        "model": {"latent_size": 100, "latent_distribution": "uniform"},
        "game": {
            "loss": "wasserstein",
            "num_discriminator_steps": 5,
            "penalties": {"wgan_gp": {"strength": 10.0, "every_steps": 1}},
            "ema_half_life_samples": 0.0,
        },
        "optim": {
            player: {"name": "adam", "learning_rate": 1e-4, "betas": [0.5, 0.9]}
            for player in ("generator", "discriminator")
        },
    },
}


def differences(found, expected, path=""):
    """Yield the keys whose values differ, of those in ``expected``."""
    for key, value in expected.items():
        here = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            if key == "penalties" and found[key].keys() != value.keys():
                yield here, found[key], value
            yield from differences(found[key], value, here)
        elif key not in found or found[key] != value:
            yield here, found.get(key), value


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyperparameters_are_the_published_ones(name):
    resolved = load_config(name).model_dump(mode="json")
    assert list(differences(resolved, PUBLISHED[name])) == []


def test_biggan_averages_from_step_20000_with_decay_0_9999():
    half_life = load_config("biggan-128").game.ema_half_life_samples
    assert half_life.at(20_000 * 4096 - 1) == 0
    assert 0.5 ** (4096 / half_life.at(20_000 * 4096)) == pytest.approx(0.9999, abs=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_preset_names_its_source_and_says_that_it_was_not_run(name):
    from importlib.resources import files

    text = (files("gatdist.config") / "presets" / f"{name}.toml").read_text()
    head = " ".join(line.removeprefix("#").strip() for line in text.split("[run]")[0].splitlines())
    assert "et al. (20" in head
    assert "Not run here." in head

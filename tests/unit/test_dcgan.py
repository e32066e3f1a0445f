"""The DCGAN pair: sizes, errors, and gradients."""

import itertools

import pytest
import torch

from gatdist.common.errors import ConfigError
from gatdist.config import parse_config
from gatdist.models import build_networks
from support import refused


def pair(shape, num_classes=0, **options):
    network = {"name": "dcgan", **options}
    config = parse_config(
        {
            "run": {"total_samples": 64},
            "data": {"url": "builtin:digits"},
            "model": {
                "conditional": bool(num_classes),
                "generator": network,
                "discriminator": network,
            },
        }
    )
    return build_networks(config, shape, num_classes)


@pytest.mark.parametrize(
    ("side", "channels", "num_classes", "normalization"),
    [
        (side, channels, num_classes, normalization)
        for (side, channels), (num_classes, normalization) in itertools.product(
            [(16, 1), (32, 3), (64, 3), (128, 1)], [(0, "none"), (5, "batch")]
        )
    ],
)
def test_shapes_and_range(side, channels, num_classes, normalization):
    generator, discriminator = pair(
        (channels, side, side), num_classes, width=2, normalization=normalization
    )
    labels = torch.arange(4) % num_classes if num_classes else None
    fakes = generator(torch.randn(4, 64), labels)
    assert fakes.shape == (4, channels, side, side)
    assert fakes.abs().max() <= 1
    assert discriminator(fakes, labels).shape == (4,)


def test_widths_double_from_the_image_up_to_eight_times():
    generator, discriminator = pair((3, 128, 128), width=4)
    assert [c.out_channels for c in discriminator.convolutions] == [4, 8, 16, 32, 32]
    assert [c.in_channels for c in generator.convolutions] == [32, 32, 16, 8]
    assert generator.finish.in_channels == 4


def test_papers_networks_have_its_number_of_parameters():
    """At 64 × 64 with 5 × 5 kernels the paper's generator projects 100 numbers to 4 × 4 × 1024.

    With kernels of 4 × 4 and half that width, counted by hand.
    """
    generator, discriminator = pair((3, 64, 64), width=64, normalization="batch")
    kernel = 16
    project = 64 * 512 * 16
    up = kernel * (512 * 256 + 256 * 128 + 128 * 64 + 64 * 3) + 3
    norms = 2 * (512 + 256 + 128 + 64)
    assert sum(p.numel() for p in generator.parameters()) == project + up + norms
    down = kernel * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 64
    norms = 2 * (128 + 256 + 512)
    finish = 512 * 16 + 1
    assert sum(p.numel() for p in discriminator.parameters()) == down + norms + finish


@pytest.mark.parametrize("side", [16, 128])
def test_without_normalization_signals_have_the_same_size_at_start(side):
    torch.manual_seed(0)
    generator, discriminator = pair((3, side, side), width=16)
    with torch.no_grad():
        assert 0.2 < generator(torch.randn(64, 64)).std() < 0.9
        assert 0.1 < discriminator(torch.randn(64, 3, side, side)).std() < 3


def test_without_normalization_samples_are_independent():
    generator, discriminator = (network.double() for network in pair((1, 16, 16), width=4))
    latents = torch.randn(6, 64, dtype=torch.float64)
    fakes = generator(latents)
    torch.testing.assert_close(fakes[2:4], generator(latents[2:4]))
    torch.testing.assert_close(discriminator(fakes)[2:4], discriminator(fakes[2:4]))


def test_labels_change_the_output_of_both_networks():
    generator, discriminator = pair((1, 16, 16), 10, width=4)
    latents = torch.randn(1, 64).expand(2, 64)
    fakes = generator(latents, torch.tensor([0, 1]))
    assert not torch.allclose(fakes[0], fakes[1])
    logits = discriminator(fakes[:1].expand(2, 1, 16, 16), torch.tensor([0, 1]))
    assert logits[0] != logits[1]


@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_every_parameter_gets_a_gradient(normalization):
    generator, discriminator = pair((1, 16, 16), width=4, normalization=normalization)
    discriminator(generator(torch.randn(8, 64))).square().mean().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("shape", "options", "field", "fact"),
    [
        ((3, 48, 48), {}, "data.resolution", "to 64"),
        ((1, 8, 8), {}, "data.resolution", "to 16"),
        ((3, 32, 64), {}, "data.resolution", "'residual'"),
        ((2,), {}, "model", "(2,)"),
        ((1, 16, 16), {"normalization": "layer"}, "model.generator.normalization", "'layer'"),
        ((1, 16, 16), {"depth": 3}, "model.generator.depth", "width"),
    ],
)
def test_invalid_options_are_rejected_by_name(shape, options, field, fact):
    with refused(ConfigError, field) as caught:
        pair(shape, **options)
    assert fact in str(caught.value)

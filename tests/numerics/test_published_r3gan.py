"""R3GAN against its paper (Huang et al. 2024): operators, sizes and initial weights."""

import math

import pytest
import torch
from torch.nn import functional

from gatdist.models.image.r3gan import R3GANDiscriminator, R3GANGenerator
from published_resampling import downsampled, upsampled

# widths from coarse to fine; group_width; classes; parameters of generator and discriminator.
PUBLISHED = {
    "cifar10": (32, {"width": 768}, [768] * 4, 16, 10, (20_781_952, 21_280_512)),
    "stacked-mnist": (32, {"width": 768}, [768] * 4, 16, 0, (20_732_160, 20_683_776)),
    "ffhq-64": (64, {"width": 384}, [768] * 4 + [384], 16, 0, (22_429_824, 22_381_440)),
    "ffhq-256": (
        256,
        {},
        [768] * 4 + [384, 192, 96],
        16,
        0,
        (23_057_952, 23_009_568),
    ),
    "imagenet-32": (
        32,
        {"width": 1536, "max_width": 1536, "group_width": 32},
        [1536] * 4,
        32,
        1000,
        (82_914_304, 86_548_992),
    ),
    "imagenet-64": (
        64,
        {"width": 1536, "max_width": 1536, "group_width": 32},
        [1536] * 5,
        32,
        1000,
        (103_570_432, 107_205_120),
    ),
}
# Channels of the widened blocks over the published numbers of groups, 96 per 768 or 1536 channels.
CARDINALITY = {768: 96, 384: 48, 192: 24, 96: 12, 1536: 96}


def networks(side=16, num_classes=0, dtype=torch.float64, latent_size=8, **options):
    torch.manual_seed(1)
    common = {"sample_shape": (3, side, side), "num_classes": num_classes, **options}
    generator = R3GANGenerator(latent_size=latent_size, **common)
    discriminator = R3GANDiscriminator(**common)
    return generator.to(dtype), discriminator.to(dtype)


SMALL = {"width": 8, "max_width": 16, "group_width": 4, "blocks": 2}


def perturbed(network):
    """Weights without zeros, so that every operator shows."""
    generator = torch.Generator().manual_seed(2)
    for p in network.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return network


def pointwise(x, weight):
    return torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x)


def residual(x, weights, prefix, group_width):
    """One block: each group of channels is convolved by itself."""

    def weight(name):
        return weights[f"{prefix}.{name}"]

    def activated(y, bias):
        y = y + bias[None, :, None, None]
        return torch.maximum(y, 0.2 * y)

    y = activated(pointwise(x, weight("widen.weight")), weight("widen.bias"))
    groups = zip(y.split(group_width, 1), weight("grouped.weight").split(group_width), strict=True)
    y = torch.cat([functional.conv2d(part, kernel, padding=1) for part, kernel in groups], 1)
    y = activated(y, weight("grouped.bias"))
    return x + pointwise(y, weight("narrow.weight"))


def stage(x, weights, i, group_width=4):
    for block in range(2):
        x = residual(x, weights, f"stages.{i}.{block}", group_width)
    return x


def transition(x, weights, i):
    name = f"transitions.{i}.weight"
    return pointwise(x, weights[name]) if name in weights else x


@pytest.mark.parametrize("num_classes", [0, 5])
def test_the_generator_is_the_published_function(num_classes):
    generator = perturbed(networks(32, num_classes, **SMALL)[0])
    weights = dict(generator.named_parameters())
    z = torch.randn(3, 8, dtype=torch.float64)
    labels = torch.tensor([4, 0, 4]) if num_classes else None
    inputs = z
    if num_classes:
        one_hot = torch.eye(5, dtype=torch.float64)[labels]
        inputs = torch.cat([z, one_hot @ weights["embedding.weight"].T], 1)
    x = torch.einsum("chw,nc->nchw", weights["basis"], inputs @ weights["start.weight"].T)
    x = stage(x, weights, 0)
    for i in range(3):  # the 1×1 convolution at the coarse side
        x = stage(upsampled(transition(x, weights, i)), weights, i + 1)
    expected = pointwise(x, weights["finish.weight"])
    torch.testing.assert_close(generator(z, labels), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_the_discriminator_is_the_published_function(num_classes):
    discriminator = perturbed(networks(32, num_classes, **SMALL)[1])
    weights = dict(discriminator.named_parameters())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([4, 0, 4]) if num_classes else None
    x = stage(pointwise(images, weights["start.weight"]), weights, 3)
    for i in (2, 1, 0):  # the 1×1 convolution at the coarse side
        x = stage(transition(downsampled(x), weights, i), weights, i)
    outputs = torch.einsum("nchw,chw->nc", x, weights["basis"]) @ weights["finish.weight"].T
    if num_classes:
        assert outputs.shape == (3, 16)
        one_hot = torch.eye(5, dtype=torch.float64)[labels]
        expected = (outputs * (one_hot @ weights["embedding.weight"].T)).sum(1)
    else:
        expected = outputs[:, 0]
    found = discriminator(images, labels)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # The penalty r1, and its gradient.
    squares = [
        torch.autograd.grad(y.sum(), images, create_graph=True)[0].square().sum()
        for y in (found, expected)
    ]
    torch.testing.assert_close(*squares, rtol=1e-10, atol=1e-10)
    parameter = discriminator.stages[0][0].grouped.weight
    gradients = [torch.autograd.grad(s, parameter)[0] for s in squares]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configurations_have_the_published_sizes(name):
    side, options, widths, group_width, num_classes, counts = PUBLISHED[name]
    with torch.device("meta"):
        both = networks(side, num_classes, torch.float32, 64, **options)
    assert tuple(sum(p.numel() for p in n.parameters()) for n in both) == counts
    for network in both:
        assert [len(stage) for stage in network.stages] == [2] * len(widths)
        for blocks, width in zip(network.stages, widths, strict=True):
            grouped = blocks[0].grouped
            assert grouped.weight.shape == (2 * width, group_width, 3, 3)
            assert grouped.groups == CARDINALITY[width]


def deviation(weight):
    return weight.std().item(), weight.mean().item()


def test_initial_weights_have_the_published_deviations():
    options = {"width": 64, "max_width": 128, "group_width": 16}
    generator, discriminator = networks(32, 20, torch.float32, 32, **options)
    gain = math.sqrt(2 / (1 + 0.2**2)) * 8**-0.25  # four stages of two blocks
    expected = {
        "stages.0.0.widen.weight": gain / 128**0.5,
        "stages.3.1.grouped.weight": gain / (16 * 9) ** 0.5,
        "stages.2.1.narrow.weight": 0.0,
        "basis": {"generator": 1.0, "discriminator": 1 / 4},
        "start.weight": {"generator": 1 / 64**0.5, "discriminator": 1 / 3**0.5},
        "finish.weight": {"generator": 1 / 64**0.5, "discriminator": 1 / 128**0.5},
        "embedding.weight": {"generator": 1 / 20**0.5, "discriminator": 1 / (20 * 128) ** 0.5},
    }
    for player, network in (("generator", generator), ("discriminator", discriminator)):
        weights = dict(network.named_parameters())
        for name, std in expected.items():
            std = std[player] if isinstance(std, dict) else std
            found, mean = deviation(weights[name])
            relative = 4 / math.sqrt(2 * weights[name].numel())  # four standard errors
            assert found == pytest.approx(std, rel=relative), (player, name)
            assert abs(mean) <= 5 * std / math.sqrt(weights[name].numel()), (player, name)
        assert all(not p.any() for name, p in weights.items() if name.endswith("bias"))


@pytest.mark.parametrize("full", [0, 1, 3])
def test_stages_but_the_coarsest_are_computed_in_bfloat16_under_autocast(full):
    both = networks(32, 0, torch.float32, full_precision_stages=full, **SMALL)
    inputs = torch.randn(2, 8), torch.randn(2, 3, 32, 32)
    for network, x in zip(both, inputs, strict=True):
        perturbed(network).float()
        found = {}
        for i, stage in enumerate(network.stages):
            stage.register_forward_hook(
                lambda _, given, out, i=i, found=found: found.update({i: out.dtype})
            )
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(x)
        expected = [torch.float32] * full + [torch.bfloat16] * (4 - full)
        assert [found[i] for i in range(4)] == expected
        exact = network(x)
        assert (outputs - exact).norm() < 0.1 * exact.norm()


def test_features_of_a_conditional_discriminator_are_the_inputs_of_its_last_layer():
    from gatdist.models.layers import DiscriminatorFeatures

    _, discriminator = networks(16, 5, **SMALL)
    features = DiscriminatorFeatures(discriminator)(torch.randn(2, 3, 16, 16).double())
    assert features.shape == (2, 16)

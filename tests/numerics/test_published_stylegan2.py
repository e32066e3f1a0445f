"""StyleGAN2 against its papers (Karras et al. 2020): operators, path lengths, conditional forms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from games import batch_of
from gatdist.common.errors import ConfigError
from gatdist.config import Schedule
from gatdist.game import Game
from gatdist.game.adaptive_state import Averages
from gatdist.game.losses import losses
from gatdist.game.penalties import ScheduledPenalty, penalties
from gatdist.models.image.stylegan2 import (
    MinibatchDeviation,
    StyledConv2d,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
)
from gatdist.parallel import draws
from published_resampling import blurred, downsampled, stuffing, upsampled
from support import refused

F64 = torch.float64
SMALL = {"capacity": 64, "max_width": 8}
STYLES = {"style_size": 6, "mapping_layers": 3}
CLASSES = 5


def perturbed(network):
    """Weights without zeros, so that every operator shows."""
    generator = torch.Generator().manual_seed(2)
    network.double()
    for p in network.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return network


def generator_of(num_classes=0, **options):
    torch.manual_seed(1)
    options = SMALL | STYLES | options
    shape = {"latent_size": 4, "sample_shape": (3, 16, 16), "num_classes": num_classes}
    return perturbed(StyleGAN2Generator(**shape, **options))


def discriminator_of(num_classes=0, **options):
    torch.manual_seed(1)
    shape = {"sample_shape": (3, 16, 16), "num_classes": num_classes}
    return perturbed(StyleGAN2Discriminator(**shape, **SMALL | options))


def activated(x):
    return torch.where(x > 0, x, 0.2 * x) * 2**0.5


def normalized(x):
    return torch.stack([row / (row.square().mean() + 1e-8).sqrt() for row in x])


def linear(x, weights, prefix, rate=1.0):
    weight, bias = weights[f"{prefix}.weight"], weights[f"{prefix}.bias"]
    return x @ (weight * rate / math.sqrt(weight.shape[1])).T + bias * rate


def mapped(z, labels, weights, prefix, layers):
    """The mapping network: latents and embedded one-hot labels, each normalized."""
    inputs = [] if z is None else [normalized(z)]
    if labels is not None:
        one_hot = torch.eye(CLASSES, dtype=F64)[labels]
        inputs.append(normalized(linear(one_hot, weights, f"{prefix}.embedding")))
    x = torch.cat(inputs, 1)
    for i in range(layers):
        x = activated(linear(x, weights, f"{prefix}.layers.{i}", rate=0.01))
    return x


def modulated(x, w, weights, prefix, up):
    """The paper's convolution: weights per sample, scaled by styles and demodulated."""
    outs = []
    for image, style in zip(x, linear(w, weights, f"{prefix}.style"), strict=True):
        weight = weights[f"{prefix}.weight"] * style[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        image = image[None]
        if up:  # convolved where zeros stand between the pixels, then filtered
            rows, columns = (stuffing(size)[:-1] for size in image.shape[2:])
            image = torch.einsum("ih,jw,nchw->ncij", rows, columns, image)
            image = functional.conv2d(functional.pad(image, [2] * 4), weight.flip((2, 3)))
            outs.append(4 * blurred(image, 1))
        else:
            outs.append(functional.conv2d(functional.pad(image, [1] * 4), weight))
    return torch.cat(outs)


def styled(x, w, noise, weights, i, up):
    x = modulated(x, w, weights, f"layers.{i}", up)
    x = x + weights[f"layers.{i}.noise_strength"] * noise
    return activated(x + weights[f"layers.{i}.bias"][:, None, None])


def image_of(x, w, weights, i):
    style = linear(w, weights, f"to_image.{i}.style")
    weight = weights[f"to_image.{i}.weight"][:, :, 0, 0] / math.sqrt(x.shape[1])
    image = torch.einsum("oi,ni,nihw->nohw", weight, style, x)
    return image + weights[f"to_image.{i}.bias"][:, None, None]


@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_the_generator_is_the_published_function(num_classes):
    generator = generator_of(num_classes)
    weights = dict(generator.named_parameters())
    z = torch.randn(3, 4, dtype=F64)
    labels = torch.tensor([4, 0, 4]) if num_classes else None
    noise = torch.randn(3, generator.noise_size, dtype=F64)
    sides = [4, 8, 8, 16, 16]
    parts = noise.split([side**2 for side in sides], 1)
    pixels = [part.view(3, 1, side, side) for part, side in zip(parts, sides, strict=True)]
    w = mapped(z, labels, weights, "mapping", 3)
    x = weights["constant"].expand(3, -1, -1, -1)
    x = styled(x, w, pixels[0], weights, 0, up=False)
    image = image_of(x, w, weights, 0)
    for level in (1, 2):
        x = styled(x, w, pixels[2 * level - 1], weights, 2 * level - 1, up=True)
        x = styled(x, w, pixels[2 * level], weights, 2 * level, up=False)
        image = upsampled(image) + image_of(x, w, weights, level)
    torch.testing.assert_close(generator(z, labels, noise), image, rtol=1e-10, atol=1e-10)


def convolved(x, weights, prefix, down=False):
    weight = weights[f"{prefix}.weight"]
    weight = weight / math.sqrt(weight[0].numel())
    size = weight.shape[2]
    if down and size == 1:
        x = functional.conv2d(downsampled(x), weight)
    elif down:
        x = functional.conv2d(blurred(x, 2), weight)[:, :, ::2, ::2]
    else:
        x = functional.conv2d(functional.pad(x, [size // 2] * 4), weight)
    bias = weights.get(f"{prefix}.bias")
    return x if bias is None else x + bias[:, None, None]


def with_deviation(x, group):
    """A map per sample: the deviation over its group by feature, averaged over features."""
    n = len(x)
    maps = torch.empty(n, 1, *x.shape[2:], dtype=x.dtype)
    num_groups = n // group
    for first in range(num_groups):
        members = [first + k * num_groups for k in range(group)]
        total, count = 0.0, 0
        for c in range(x.shape[1]):
            for h in range(x.shape[2]):
                for w in range(x.shape[3]):
                    values = [x[i, c, h, w] for i in members]
                    mean = sum(values) / group
                    variance = sum((v - mean) ** 2 for v in values) / group
                    total, count = total + (variance + 1e-8) ** 0.5, count + 1
        for i in members:
            maps[i] = total / count
    return torch.cat([x, maps], 1)


@pytest.mark.parametrize("num_classes", [0, CLASSES])
@pytest.mark.parametrize("group", [0, 2, 4])
def test_the_discriminator_is_the_published_function(num_classes, group):
    discriminator = discriminator_of(num_classes, minibatch_deviation=group)
    weights = dict(discriminator.named_parameters())
    images = torch.randn(8, 3, 16, 16, dtype=F64)
    labels = torch.arange(8) % CLASSES if num_classes else None
    with torch.no_grad():
        x = activated(convolved(images, weights, "start"))
        for i in (1, 0):  # numbered from the coarsest
            y = activated(convolved(x, weights, f"blocks.{i}.first"))
            y = activated(convolved(y, weights, f"blocks.{i}.second", down=True))
            x = (convolved(x, weights, f"blocks.{i}.skip", down=True) + y) * 0.5**0.5
        x = with_deviation(x, group) if group else x
        x = activated(convolved(x, weights, "mix"))
        x = linear(activated(linear(x.flatten(1), weights, "gather")), weights, "finish")
        if num_classes:
            embedded = mapped(None, labels, weights, "embedding", 8)
            expected = torch.stack([a @ b for a, b in zip(x, embedded, strict=True)]) / 8**0.5
        else:
            expected = x[:, 0]
        found = discriminator(images, labels)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_incomplete_group_is_a_separate_group():
    layer, x = MinibatchDeviation(4), torch.randn(11, 2, 3, 3, dtype=F64)
    expected = torch.cat([with_deviation(x[:8], 4), with_deviation(x[8:], 3)])
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    alone = layer(x[:1])[0, -1]  # no deviation but the small number below the root
    torch.testing.assert_close(alone, torch.full_like(alone, 1e-4))


def test_minibatch_deviation_has_second_derivatives_where_samples_are_equal():
    x = torch.randn(1, 2, 3, 3, dtype=F64).expand(4, -1, -1, -1).clone().requires_grad_()
    layer = MinibatchDeviation(4)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert gradient.isfinite().all()
    assert second.isfinite().all()


def test_demodulated_convolutions_have_outputs_of_unit_variance():
    torch.manual_seed(0)
    layer = StyledConv2d(64, 64, 16, up=False).double()
    x, w = torch.randn(4, 64, 32, 32, dtype=F64), torch.randn(4, 16, dtype=F64)
    y = layer(x, w, None) / 2**0.5
    inner = torch.where(y > 0, y, y / 0.2)[:, :, 1:-1, 1:-1]
    assert inner.std().item() == pytest.approx(1, rel=0.05)


class Given(nn.Module):
    """Replaces a generator's module ``styles``: the styles are these."""

    def __init__(self, styles):
        super().__init__()
        self.given = styles

    def forward(self, styles):
        return self.given


class Noted(nn.Module):
    """Replaces a generator's module ``styles``, and keeps what passes through it."""

    def forward(self, styles):
        self.seen = styles.detach()
        return styles


def path_length_game(generator):
    scheduled = ScheduledPenalty("path_length", penalties["path_length"], Schedule.constant(2.0))
    discriminator = discriminator_of()
    averages = Averages({"path_length": 0.99}, dtype=F64)
    averages.tensors["path_length"].fill_(0.1)
    return scheduled, Game(
        generator,
        discriminator,
        losses["nonsaturating"],
        3,
        4,
        (scheduled,),
        averages=averages,
    )


@pytest.mark.parametrize("mixing", [0.0, 0.9])
def test_path_lengths_are_those_of_the_styles_of_each_layer_after_mixing(mixing):
    """√(mean over layers of ‖∂⟨G, y⟩/∂w_l‖²) / √pixels, one layer at a time."""
    generator = generator_of(style_mixing=mixing).train()
    scheduled, game = path_length_game(generator)
    batch = batch_of(torch.randn(6, 3, 16, 16, dtype=F64))
    _, found = game.penalty_loss(batch, [scheduled])

    latents = game.latents(batch)
    (noise,) = draws.of_network(generator, 3, "generator", batch.positions, F64)
    y = draws.normal(3, "projections", batch.positions, (3, 16, 16), F64)
    original, generator.styles = generator.styles, Noted()
    generator(latents, None, noise)
    styles = generator.styles.seen  # [n, layers, s]
    assert styles.shape == (6, 6, 6)
    is_mixed = (styles != styles[:, :1]).any(2).any(1)
    assert is_mixed.any() == bool(mixing)

    squares = torch.zeros(6, dtype=F64)
    for layer in range(6):
        leaf = styles[:, layer].clone().requires_grad_()
        generator.styles = Given(
            torch.cat([styles[:, :layer], leaf[:, None], styles[:, layer + 1 :]], 1)
        )
        scalars = (generator(latents, None, noise) * y).sum((1, 2, 3)) / math.sqrt(16 * 16)
        squares += torch.autograd.grad(scalars.sum(), leaf)[0].square().sum(1) / 6
    generator.styles = original
    lengths = squares.sqrt()
    torch.testing.assert_close(found["path_length"], lengths, rtol=1e-10, atol=1e-12)
    expected = 2 * (lengths - 0.1).square()
    torch.testing.assert_close(found["penalty/path_length"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("styles", [torch.zeros(3, 6, dtype=F64), None])
def test_styles_that_are_no_tensor_of_as_many_samples_are_refused(styles):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.styles = nn.Linear(4, 3 * 16 * 16).double(), Given(styles)

        def forward(self, latents, labels=None):
            self.styles(latents)
            return self.layer(latents).view(-1, 3, 16, 16)

    scheduled, game = path_length_game(Aside())
    with refused(ConfigError, "model.generator.name"):
        game.penalty_loss(batch_of(torch.randn(4, 3, 16, 16, dtype=F64)), [scheduled])


def test_the_gradient_of_path_lengths_is_that_of_differences():
    generator = generator_of(style_mixing=0.9, pixel_noise=False).train()
    scheduled, game = path_length_game(generator)
    batch = batch_of(torch.randn(4, 3, 16, 16, dtype=F64))
    loss, _ = game.penalty_loss(batch, [scheduled])
    parameters = [*generator.parameters()]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)

    def moved(step):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
        value = game.penalty_loss(batch, [scheduled])[0].item()
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p -= step * d
        return value

    step = 1e-6
    numeric = (moved(step) - moved(-step)) / (2 * step)
    assert slope.item() == pytest.approx(numeric, rel=1e-5)


def test_layers_of_mixed_styles_change_uniformly_for_the_given_share_of_samples():
    generator = generator_of(style_mixing=0.75, pixel_noise=False).train()
    generator.styles = Noted()
    n = 4000
    torch.manual_seed(3)
    noise = torch.randn(n, generator.noise_size, dtype=F64)
    generator(torch.randn(n, 4, dtype=F64), None, noise)
    styles = generator.styles.seen
    changed = (styles != styles[:, :1]).any(2)  # [n, layers]
    first = changed.int().argmax(1)[changed.any(1)]
    assert len(first) / n == pytest.approx(0.75, abs=0.03)
    for layer in range(1, 6):
        share = (first == layer).double().mean().item()
        assert share == pytest.approx(1 / 5, abs=0.03)
    # From that layer on, every style is that of the second latent.
    last = changed.sum(1)[changed.any(1)]
    assert torch.equal(last, 6 - first)


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("side", "num_classes", "capacity", "mapping_layers", "counts"),
    [
        (256, 0, 16384, 8, (24_767_458, 24_001_089)),  # paper256
        (1024, 0, 32768, 8, (30_370_060, 29_012_513)),
        (256, 10, 16384, 2, (23_459_298, 26_370_112)),
    ],
)
def test_the_published_configurations_have_the_published_sizes(
    side, num_classes, capacity, mapping_layers, counts
):
    with torch.device("meta"):
        shape = {"sample_shape": (3, side, side), "num_classes": num_classes}
        generator = StyleGAN2Generator(
            latent_size=512, capacity=capacity, mapping_layers=mapping_layers, **shape
        )
        discriminator = StyleGAN2Discriminator(capacity=capacity, minibatch_deviation=8, **shape)
    assert (count(generator), count(discriminator)) == counts


def test_initial_weights_have_the_published_deviations():
    torch.manual_seed(0)
    shape = {"sample_shape": (3, 32, 32), "num_classes": 20}
    generator = StyleGAN2Generator(latent_size=64, style_size=64, max_width=64, **shape)
    discriminator = StyleGAN2Discriminator(max_width=64, **shape)
    for network in (generator, discriminator):
        for name, p in network.named_parameters():
            key = name.split(".")[-1]
            if key in ("weight", "constant"):
                is_mapping = "mapping.layers" in name or "embedding.layers" in name
                std = 100.0 if is_mapping else 1.0
                assert p.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * p.numel())), name
            else:
                assert torch.equal(p, torch.full_like(p, float("style.bias" in name))), name

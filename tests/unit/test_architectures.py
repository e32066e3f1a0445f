"""Published architectures: parameter counts, supported sizes, and no coupling of samples."""

import pytest
import torch
from torch import nn

from gatdist.common.errors import ConfigError
from gatdist.config import parse_config
from gatdist.models import build_networks
from support import refused

CIFAR, IMAGENET_128, FFHQ_256 = (3, 32, 32), (3, 128, 128), (3, 256, 256)


def config_with(latent_size=64, conditional=False, spectral_norm=(), **networks):
    model = {"latent_size": latent_size, "conditional": conditional, **networks}
    model["spectral_norm"] = list(spectral_norm)
    return parse_config(
        {"run": {"total_samples": 64}, "data": {"url": "builtin:digits"}, "model": model}
    )


def build(name, shape, num_classes=0, latent_size=64, metadata=None, **options):
    config = config_with(
        latent_size,
        bool(num_classes),
        generator={"name": name, **options.get("generator", {})},
        discriminator={"name": name, **options.get("discriminator", {})},
    )
    return build_networks(config, shape, num_classes, metadata or {})


def num_parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "latent_size", "published"),
    [
        # Miyato et al. 2018, conditional: 4.30 M and 1.06 M.
        ("sngan", CIFAR, 10, 128, (4_304_387, 1_055_104)),
        # Brock et al. 2019 with 96 channels: 9.42 M and 2.42 M; 70.43 M and 87.98 M.
        ("biggan", CIFAR, 10, 80, (9_416_196, 2_415_170)),
        ("biggan", IMAGENET_128, 1000, 120, (70_433_988, 87_982_370)),
        # Huang et al. 2024, table 2, configuration E: 23.058 M and 23.010 M.
        ("r3gan", FFHQ_256, 0, 64, (23_057_952, 23_009_568)),
        # The same table, configurations A and B: 24.767 M, and 23.996 M without the deviation.
        ("stylegan2", FFHQ_256, 0, 512, (24_767_458, 23_996_481)),
        # Donahue et al. 2019, appendix D.
        ("wavegan", (1, 16384), 0, 100, (19_065_345, 17_427_969)),
    ],
)
def test_parameter_count_equals_published_count(name, shape, num_classes, latent_size, published):
    with torch.device("meta"):
        networks = build(name, shape, num_classes, latent_size)
    assert tuple(map(num_parameters, networks)) == published


def test_stylegan2_with_the_papers_deviation_has_the_published_discriminator():
    with torch.device("meta"):
        _, discriminator = build(
            "stylegan2", FFHQ_256, latent_size=512, discriminator={"minibatch_deviation": 4}
        )
    assert num_parameters(discriminator) == 24_001_089


SMALL = {
    "sngan": {"width": 8},
    "biggan": {"width": 8},
    "r3gan": {"width": 8, "max_width": 32, "group_width": 4, "blocks": 1},
    "stylegan2": {"capacity": 128, "max_width": 16},
}
STYLES = {"style_size": 16, "mapping_layers": 2, "style_mixing": 0.9}


def small(name, shape, num_classes=0, latent_size=60):
    generator = SMALL[name] | (STYLES if name == "stylegan2" else {})
    return build(
        name,
        shape,
        num_classes,
        latent_size,
        generator=generator,
        discriminator=SMALL[name],
    )


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("sngan", (1, 16, 16)),
        ("sngan", (3, 32, 64)),
        ("sngan", (3, 48, 48)),
        ("sngan", (1, 28, 28)),
        ("biggan", (3, 32, 32)),
        ("biggan", (1, 64, 96)),
        ("r3gan", (1, 8, 8)),
        ("r3gan", (3, 32, 48)),
        ("stylegan2", (1, 8, 8)),
        ("stylegan2", (3, 16, 40)),
    ],
)
def test_both_networks_support_images_whose_sides_can_be_halved(name, shape, num_classes):
    generator, discriminator = small(name, shape, num_classes)
    labels = torch.arange(4) % num_classes if num_classes else None
    noise = torch.randn(4, getattr(generator, "noise_size", 0))
    fakes = generator(torch.randn(4, 60), labels, *([noise] if noise.numel() else []))
    assert fakes.shape == (4, *shape)
    assert fakes.isfinite().all()
    logits = discriminator(fakes, labels)
    assert logits.shape == (4,)
    logits.sum().backward()
    for network in (generator, discriminator):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_no_discriminator_couples_the_samples_of_a_batch(name):
    _, discriminator = (network.double() for network in small(name, (3, 32, 32)))
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(discriminator(images)[2:4], discriminator(images[2:4]))


@pytest.mark.parametrize("name", SMALL)
def test_every_discriminator_has_second_derivatives(name):
    """Compare the derivative of ‖∂D/∂x‖² by the parameters with differences along a random line."""
    _, discriminator = (network.double() for network in small(name, (1, 32, 32)))
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    parameters = list(discriminator.parameters())
    line = [torch.randn_like(p) for p in parameters]

    def penalty():
        logits = discriminator(images)
        (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return slope.square().sum()

    def moved(by):
        with torch.no_grad():
            for p, direction in zip(parameters, line, strict=True):
                p += by * direction
        return float(penalty().detach())

    exact = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    along = sum((g * v).sum() for g, v in zip(exact, line, strict=True) if g is not None)
    step = 1e-7  # so small that hardly any unit crosses its kink
    ahead, behind = moved(step), moved(-2 * step)
    assert float(along) == pytest.approx((ahead - behind) / (2 * step), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "field", "fact"),
    [
        ("sngan", (1, 30, 30), "data.resolution", "[32, 32]"),
        ("biggan", (3, 16, 16), "data.resolution", "[32, 32]"),
        ("biggan", (3, 36, 50), "data.resolution", "[32, 48]"),
        ("stylegan2", (1, 9, 9), "data.resolution", "[8, 8]"),
        ("r3gan", (2,), "model", "(2,)"),
        ("wavegan", (1, 5000), "data.length", "to 4096"),
        ("wavegan", (1, 8, 8), "model", "(1, 8, 8)"),
    ],
)
def test_unsupported_size_is_rejected_with_the_nearest_supported_one(name, shape, field, fact):
    with refused(ConfigError, field) as caught:
        build(name, shape, latent_size=60)
    assert fact in str(caught.value)


def test_biggan_rejects_latents_that_its_blocks_cannot_split():
    with refused(ConfigError, "model.latent_size"):
        build("biggan", CIFAR, latent_size=62)


def test_r3gan_rejects_groups_that_do_not_divide_the_channels():
    with refused(ConfigError, "model"):
        build("r3gan", (1, 8, 8), generator={"width": 4})


def test_networks_for_one_modality_are_rejected_for_another():
    with refused(ConfigError, "model.generator.name"):
        build("wavegan", (27, 64), metadata={"modality": "text"})


class TestStyleGAN2:
    def generator(self, **options):
        network, _ = build(
            "stylegan2",
            (1, 16, 16),
            latent_size=8,
            generator=SMALL["stylegan2"] | STYLES | options,
        )
        return network.double()

    def test_modulation_equals_the_papers_equation(self):
        """Compare with the equation w' = s_i w / √Σ(s_i w)², convolved sample by sample."""
        layer = self.generator().layers[0]
        x, w = torch.randn(3, 16, 4, 4).double(), torch.randn(3, 16).double()
        styles = layer.style(w)
        expected = []
        for image, style in zip(x, styles, strict=True):
            weight = layer.weight * style[:, None, None]
            weight = weight / weight.square().sum(dim=(1, 2, 3), keepdim=True).add(1e-8).sqrt()
            expected.append(nn.functional.conv2d(image[None], weight, padding=1))
        expected = nn.functional.leaky_relu(torch.cat(expected), 0.2) * 2**0.5
        torch.testing.assert_close(layer(x, w, None), expected)

    def test_upsampling_is_a_convolution_of_a_smoothed_image(self):
        """A constant image stays constant inside, as with bilinear interpolation."""
        layer = self.generator().layers[1]
        x, w = torch.ones(1, 16, 6, 6).double(), torch.randn(1, 16).double()
        inside = layer(x, w, None)[:, :, 4:-4, 4:-4]
        torch.testing.assert_close(inside, inside[:, :, :1, :1].expand_as(inside))

    def test_noise_and_mixing_are_keyed_by_sample(self):
        generator = self.generator()
        with torch.no_grad():
            for layer in generator.layers:
                layer.noise_strength.fill_(0.5)
        latents = torch.randn(4, 8).double()
        noise = torch.randn(4, generator.noise_size).double()
        fakes = generator(latents, None, noise)
        torch.testing.assert_close(fakes[1:3], generator(latents[1:3], None, noise[1:3]))
        assert not torch.allclose(fakes, generator(latents, None, torch.randn_like(noise)))
        assert not torch.allclose(fakes, generator(latents))

    def test_no_style_mixing_in_evaluation(self):
        generator = self.generator(pixel_noise=False).eval()
        latents = torch.randn(4, 8).double()
        noise = torch.randn(4, generator.noise_size).double()
        torch.testing.assert_close(generator(latents, None, noise), generator(latents))


class TestWaveGAN:
    def pair(self, length=1024):
        return build(
            "wavegan",
            (1, length),
            latent_size=16,
            generator={"width": 4},
            discriminator={"width": 4},
        )

    @pytest.mark.parametrize("length", [64, 1024, 4096])
    def test_every_supported_length_of_audio(self, length):
        generator, discriminator = self.pair(length)
        fakes = generator(torch.randn(2, 16))
        assert fakes.shape == (2, 1, length)
        assert fakes.abs().max() <= 1
        assert discriminator(fakes).shape == (2,)

    def test_phases_are_shuffled_per_sample(self):
        _, discriminator = self.pair()
        clips, noise = torch.randn(4, 1, 1024), torch.randn(4, discriminator.noise_size)
        logits = discriminator(clips, None, noise)
        torch.testing.assert_close(logits[1:3], discriminator(clips[1:3], None, noise[1:3]))
        middle = torch.zeros_like(noise)  # shift of 0
        torch.testing.assert_close(discriminator(clips, None, middle), discriminator(clips))
        assert not torch.allclose(logits, discriminator(clips))

    def test_shifts_are_uniformly_distributed(self):
        _, discriminator = self.pair()
        places = discriminator._places(torch.special.ndtri((torch.arange(1000) + 0.5) / 1000))
        assert [(places == shift).sum().item() for shift in range(-2, 3)] == [200] * 5

    @pytest.mark.parametrize("places", [-2, -1, 0, 1, 2])
    def test_shift_moves_and_reflects(self, places):
        from gatdist.models.audio import shift

        x = torch.arange(8.0).view(1, 1, 8)
        padded = nn.functional.pad(x, (2, 2), mode="reflect")
        expected = padded[..., 2 - places : 10 - places]
        assert torch.equal(shift(x, torch.tensor([places]), 2), expected)


class TestTexts:
    SHAPE = (5, 7)

    def networks(self, name, **options):
        config = config_with(
            16,
            generator={"name": name, "width": 8, **options},
            discriminator={"name": "text_convolutional", "width": 8, "blocks": 2},
        )
        return build_networks(config, self.SHAPE, 0, {"modality": "text"})

    def test_convolutional_generator_returns_probabilities(self):
        generator, discriminator = self.networks("text_convolutional")
        texts = generator(torch.randn(3, 16))
        assert texts.shape == (3, *self.SHAPE)
        torch.testing.assert_close(texts.sum(dim=1), torch.ones(3, 7))
        assert discriminator(texts).shape == (3,)

    @pytest.mark.parametrize(
        ("name", "options"),
        [("text_convolutional", {"temperature": 0.7}), ("text_recurrent", {"temperature": 0.7})],
    )
    def test_sampled_texts_are_one_hot_and_have_gradients(self, name, options):
        generator, discriminator = self.networks(name, **options)
        noise = torch.randn(3, generator.noise_size)
        texts = generator(torch.randn(3, 16), None, noise)
        assert texts.shape == (3, *self.SHAPE)
        torch.testing.assert_close(texts.max(dim=1).values, torch.ones(3, 7))
        torch.testing.assert_close(texts.sum(dim=1), torch.ones(3, 7))
        discriminator(texts).sum().backward()
        assert all(p.grad is not None for p in generator.parameters())
        assert any(p.grad.any() for p in generator.parameters())

    def test_characters_are_sampled_by_their_probabilities(self):
        """Gumbel trick: the argmax of log p + noise is a sample from p."""
        from gatdist.models.layers import gumbel

        p = torch.tensor([0.1, 0.2, 0.7])
        noise = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
        drawn = (p.log() + gumbel(noise)).argmax(dim=1)
        shares = torch.bincount(drawn, minlength=3) / 20_000
        torch.testing.assert_close(shares, p, atol=0.015, rtol=0)

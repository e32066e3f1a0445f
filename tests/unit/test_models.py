"""Networks of any height × width, with or without labels, that couple no samples."""

import pytest
import torch
from torch import nn

from gatdist import register_generator
from gatdist.common.errors import ConfigError, PluginError
from gatdist.config import parse_config
from gatdist.models import build_networks
from support import refused


def config_with(**model):
    return parse_config(
        {"run": {"total_samples": 64}, "data": {"url": "builtin:digits"}, "model": model}
    )


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 32, 32), (3, 17, 40), (1, 5, 3), (2, 1, 9), (1, 28, 28)]
)
def test_residual_pair_supports_any_height_and_width(shape, num_classes):
    config = config_with(
        conditional=bool(num_classes),
        generator={"name": "residual", "width": 8},
        discriminator={"name": "residual", "width": 8},
    )
    generator, discriminator = build_networks(config, shape, num_classes)
    labels = torch.arange(4) % num_classes if num_classes else None
    fakes = generator(torch.randn(4, 64), labels)
    assert fakes.shape == (4, *shape)
    assert fakes.abs().max() <= 1
    assert discriminator(fakes, labels).shape == (4,)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_no_network_couples_the_samples_of_a_batch(shape):
    kind = "residual" if len(shape) == 3 else "mlp"
    config = config_with(generator={"name": kind}, discriminator={"name": kind})
    generator, discriminator = (network.double() for network in build_networks(config, shape, 0))
    latents = torch.randn(6, 64, dtype=torch.float64)
    fakes = generator(latents, None)
    torch.testing.assert_close(fakes[2:4], generator(latents[2:4], None))
    torch.testing.assert_close(discriminator(fakes, None)[2:4], discriminator(fakes[2:4], None))


def test_labels_change_the_output_of_both_networks():
    config = config_with(conditional=True)
    generator, discriminator = build_networks(config, (1, 8, 8), 10)
    latents = torch.randn(1, 64).expand(2, 64)
    fakes = generator(latents, torch.tensor([0, 1]))
    assert not torch.allclose(fakes[0], fakes[1])
    logits = discriminator(fakes[:1].expand(2, 1, 8, 8), torch.tensor([0, 1]))
    assert logits[0] != logits[1]


def test_seed_gives_the_weights_and_torchs_state_is_unchanged():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_networks(config_with(), (1, 8, 8), 0)[0].state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = build_networks(config_with(), (1, 8, 8), 0)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("model", "field", "fact"),
    [
        ({"generator": {"name": "residul"}}, "model.generator.name", "'residual'"),
        (
            {"generator": {"name": "residual", "widht": 8}},
            "model.generator.widht",
            "'width'",
        ),
        (
            {"generator": {"name": "residual", "width": "wide"}},
            "model.generator.width",
            "'wide'",
        ),
        ({"discriminator": {"name": "mlp"}}, "model", "(1, 8, 8)"),
        ({"conditional": True}, "model.conditional", "True"),
        (
            {"generator": {"name": "residual", "latent_size": 8}},
            "model.generator.latent_size",
            "width",
        ),
    ],
)
def test_invalid_options_are_rejected_by_name(model, field, fact):
    with refused(ConfigError, field) as caught:
        build_networks(config_with(**model), (1, 8, 8), 0)
    assert fact in str(caught.value)


def test_users_network_gets_its_own_options():
    @register_generator("mine-for-this-test")
    def own_network(
        *, latent_size: int, sample_shape: tuple[int, ...], num_classes: int, scale: float = 1.0
    ) -> nn.Module:
        return nn.Linear(latent_size, int(scale))

    generator, _ = build_networks(
        config_with(generator={"name": "mine-for-this-test", "scale": 7.0}), (1, 8, 8), 0
    )
    assert generator.out_features == 7
    with refused(PluginError, "model.generator.name"):
        register_generator("mine-for-this-test")(lambda **_: nn.Identity())

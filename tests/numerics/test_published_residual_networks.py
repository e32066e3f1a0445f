"""SNGAN and BigGAN equal the operators of their papers and code, written independently."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from gatdist.common.errors import ConfigError
from gatdist.config import parse_config
from gatdist.models import build_networks
from gatdist.models.layers import SpectralNorm, add_spectral_norm, normalized_weights
from support import refused

CLASSES = 5


def build(name, shape, num_classes=0, latent_size=60, spectral_norm=(), **options):
    network = {"name": name, **options}
    model = {
        "latent_size": latent_size,
        "conditional": bool(num_classes),
        "spectral_norm": list(spectral_norm),
        "generator": network,
        "discriminator": network,
    }
    config = parse_config(
        {
            "run": {"total_samples": 64},
            "data": {"url": "builtin:digits"},
            "model": model,
            "precision": {"dtype": "float64"},
        }
    )
    return build_networks(config, shape, num_classes)


def perturbed(network):
    """Random weights where networks start with zeros or ones, so that no term vanishes."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in network.buffers():
            if buffer.is_floating_point():  # running variances stay positive
                buffer.add_(0.1 * torch.rand_like(buffer))
    return network


# Operators in NumPy, by definition. Images are [n, c, h, w].


class Weights:
    def __init__(self, network):
        self._state = {name: t.numpy() for name, t in network.state_dict().items()}

    def __getitem__(self, name):
        return self._state[name]

    def __contains__(self, name):
        return name in self._state


def convolution(x, weight, bias=None):
    radius = weight.shape[2] // 2
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (radius, radius), (radius, radius)))
    out = np.zeros((len(x), len(weight), height, width))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            seen = padded[:, :, i : i + height, j : j + width]
            out += np.einsum("oc,nchw->nohw", weight[:, :, i, j], seen)
    return out if bias is None else out + bias[:, None, None]


def relu(x):
    return np.maximum(x, 0)


def doubled(x):
    return x.repeat(2, axis=2).repeat(2, axis=3)


def halved(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def normalized(x, w, name, eps, training):
    """Batch normalization before gain and bias."""
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    else:
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    return (x - mean[:, None, None]) / np.sqrt(var + eps)[:, None, None]


def plain_norm(x, w, name, eps, training):
    gain, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return normalized(x, w, name, eps, training) * gain[:, None, None] + bias[:, None, None]


def up_block(x, w, name, norm):
    """Residual block of both generators: the skip path upsamples, then convolves."""
    change = doubled(relu(norm(x, f"{name}.norms.0")))
    change = convolution(change, w[f"{name}.first.weight"], w[f"{name}.first.bias"])
    change = relu(norm(change, f"{name}.norms.1"))
    change = convolution(change, w[f"{name}.second.weight"], w[f"{name}.second.bias"])
    return change + convolution(doubled(x), w[f"{name}.skip.weight"], w[f"{name}.skip.bias"])


def down_block(x, w, name, *, halves, is_first):
    """Residual block of both discriminators; only the first one pools before its skip path."""
    change = x if is_first else relu(x)
    change = relu(convolution(change, w[f"{name}.first.weight"], w[f"{name}.first.bias"]))
    change = convolution(change, w[f"{name}.second.weight"], w[f"{name}.second.bias"])
    change = halved(change) if halves else change
    if f"{name}.skip.weight" not in w:
        return x + change
    skip = halved(x) if is_first else x
    skip = convolution(skip, w[f"{name}.skip.weight"], w[f"{name}.skip.bias"])
    return (halved(skip) if halves and not is_first else skip) + change


def attention(x, w, name):
    query, key, value = (
        convolution(x, w[f"{name}.{part}.weight"]) for part in ("query", "key", "value")
    )

    def pooled(maps):
        n, c, height, width = maps.shape
        return maps.reshape(n, c, height // 2, 2, width // 2, 2).max((3, 5)).reshape(n, c, -1)

    key, value = pooled(key), pooled(value)
    out = np.zeros((len(x), value.shape[1], *x.shape[2:]))
    for n in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                scores = query[n, :, i, j] @ key[n]
                scores = np.exp(scores - scores.max())
                out[n, :, i, j] = value[n] @ (scores / scores.sum())
    return x + w[f"{name}.strength"] * convolution(out, w[f"{name}.finish.weight"])


def logits(x, w, labels):
    features = relu(x).sum((2, 3))
    out = features @ w["finish.weight"][0]
    if "finish.bias" in w:
        out = out + w["finish.bias"]
    if labels is not None:
        out = out + (w["embedding.weight"][labels] * features).sum(1)
    return out


def compare(network, inputs, labels, expected):
    with torch.no_grad():
        found = network(torch.from_numpy(inputs), None if labels is None else torch.tensor(labels))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-10)


def latents(n, size):
    return np.random.default_rng(0).normal(size=(n, size))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("num_classes", [0, CLASSES])
@pytest.mark.parametrize("side", [32, 64])
def test_sngan_generator_equals_the_published_one(side, num_classes, training):
    network = perturbed(build("sngan", (3, side, side), num_classes, 6, width=2)[0])
    network.train(training)
    z, labels = latents(3, 6), [0, 2, 4] if num_classes else None
    w = Weights(network)

    def norm(x, name):
        if labels is None:
            return plain_norm(x, w, f"{name}.norm", 2e-5, training)
        gain, bias = 1 + w[f"{name}.gain.weight"][labels], w[f"{name}.bias.weight"][labels]
        plain = normalized(x, w, f"{name}.norm", 2e-5, training)
        return plain * gain[:, :, None, None] + bias[:, :, None, None]

    x = (z @ w["start.weight"].T + w["start.bias"]).reshape(3, -1, 4, 4)
    for level in range(side.bit_length() - 3):
        x = up_block(x, w, f"blocks.{level}", norm)
    x = relu(plain_norm(x, w, "norm", 2e-5, training))
    compare(network, z, labels, np.tanh(convolution(x, w["finish.weight"], w["finish.bias"])))


# By side: whether each block halves, in the order of the published code.
SNGAN_HALVES = {
    32: [True, True, False, False],
    48: [True] * 4 + [False],
    64: [True] * 5,
    128: [True] * 5 + [False],
}


@pytest.mark.parametrize("num_classes", [0, CLASSES])
@pytest.mark.parametrize("side", SNGAN_HALVES)
def test_sngan_discriminator_equals_the_published_one(side, num_classes):
    network = perturbed(build("sngan", (3, side, side), num_classes, width=2)[1])
    images = np.random.default_rng(1).normal(size=(2, 3, side, side))
    labels, w = [3, 1] if num_classes else None, Weights(network)
    x = images
    for level, halves in enumerate(SNGAN_HALVES[side]):
        x = down_block(x, w, f"blocks.{level}", halves=halves, is_first=level == 0)
    assert ("finish.bias" in w) == (side > 32)
    compare(network, images, labels, logits(x, w, labels))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_biggan_generator_equals_the_published_one(training):
    network = perturbed(build("biggan", (3, 64, 64), CLASSES, 15, width=8)[0])
    network.train(training)
    z, labels = latents(3, 15), [4, 0, 1]
    w, parts = Weights(network), np.split(z, 5, axis=1)
    # The shared embedding and a part of the latent, for gains and biases of a block.
    conditions = [np.concatenate([w["embedding.weight"][labels], p], axis=1) for p in parts[1:]]
    x = (parts[0] @ w["start.weight"].T + w["start.bias"]).reshape(3, -1, 4, 4)
    for level, condition in enumerate(conditions):

        def norm(x, name, condition=condition):
            gain, bias = (condition @ w[f"{name}.{kind}.weight"].T for kind in ("gain", "bias"))
            plain = normalized(x, w, f"{name}.norm", 1e-5, training)
            return plain * (1 + gain)[:, :, None, None] + bias[:, :, None, None]

        x = up_block(x, w, f"blocks.{level}", norm)
        if level == 2:  # 32 × 32
            x = attention(x, w, "attention.2")
    x = relu(plain_norm(x, w, "norm", 1e-5, training))
    compare(network, z, labels, np.tanh(convolution(x, w["finish.weight"], w["finish.bias"])))


def test_biggan_discriminator_equals_the_published_one():
    network = perturbed(build("biggan", (3, 64, 64), CLASSES, width=8)[1])
    images, labels = np.random.default_rng(1).normal(size=(2, 3, 64, 64)), [3, 0]
    w = Weights(network)
    x = down_block(images, w, "blocks.0", halves=True, is_first=True)
    x = attention(x, w, "blocks.1")  # 32 × 32
    for name in (2, 3, 4):
        x = down_block(x, w, f"blocks.{name}", halves=True, is_first=False)
    x = down_block(x, w, "blocks.5", halves=False, is_first=False)
    compare(network, images, labels, logits(x, w, labels))


# Widths


def widths(network):
    """Inputs and outputs of the residual blocks."""
    blocks = [m for m in network.blocks if hasattr(m, "first")]
    return [(b.first.in_channels, b.second.out_channels) for b in blocks]


def meta(*args, **options):
    with torch.device("meta"):
        return build(*args, **options)


@pytest.mark.parametrize(
    ("side", "generator", "discriminator"),
    [  # gen_models and dis_models of pfnet-research/sngan_projection; 48: Miyato et al. 2018
        (32, [256] * 4, [3, *[128] * 4]),
        (48, [512, 256, 128, 64], [3, 64, 128, 256, 512, 1024]),
        (64, [1024, 512, 256, 128, 64], [3, 64, 128, 256, 512, 1024]),
        (128, [1024, 1024, 512, 256, 128, 64], [3, 64, 128, 256, 512, 1024, 1024]),
        (256, [1024, 1024, 512, 512, 256, 128, 64], [3, 64, 128, 256, 512, 512, 1024, 1024]),
    ],
)
def test_sngan_has_the_published_widths(side, generator, discriminator):
    networks = meta("sngan", (3, side, side), latent_size=128)
    assert [widths(n) for n in networks] == [
        list(pairwise(generator)),
        list(pairwise(discriminator)),
    ]
    assert networks[0].start_shape[1:] == ((6, 6) if side == 48 else (4, 4))


@pytest.mark.parametrize(
    ("side", "generator", "discriminator", "attention_at"),
    [  # Brock et al. 2019, appendix B, and BigGAN.py of ajbrock/BigGAN-PyTorch
        (128, [16, 16, 8, 4, 2, 1], [1, 2, 4, 8, 16, 16], (3, 0)),
        (256, [16, 16, 8, 8, 4, 2, 1], [1, 2, 4, 8, 8, 16, 16], (3, 1)),
        (512, [16, 16, 8, 8, 4, 2, 1, 1], [1, 1, 2, 4, 8, 8, 16, 16], (3, 2)),
    ],
)
def test_biggan_has_the_published_widths(side, generator, discriminator, attention_at):
    networks = meta("biggan", (3, side, side), 10, 20 * len(generator), width=96)
    found = [[(a / 96, b / 96) for a, b in widths(n)] for n in networks]
    assert found == [list(pairwise(generator)), list(pairwise([3 / 96, *discriminator]))]
    assert list(networks[0].attention) == [str(attention_at[0])]
    kinds = [type(block).__name__ for block in networks[1].blocks]
    assert kinds.index("SelfAttention") == attention_at[1] + 1


def num_parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("side", "latent_size", "expected"),
    [  # BigGAN-PyTorch with 96 channels and 1000 classes: its own counts
        (64, 120, (70_377_348, 45_511_970)),
        (128, 120, (70_433_988, 87_982_370)),
        (256, 119, (82_108_548, 99_225_890)),
    ],
)
def test_biggan_has_as_many_parameters_as_published(side, latent_size, expected):
    networks = meta("biggan", (3, side, side), 1000, latent_size, width=96)
    assert tuple(map(num_parameters, networks)) == expected


def test_biggan_rejects_unlisted_sides():
    with refused(ConfigError, "data.resolution"):
        build("biggan", (3, 1024, 1024), width=2)


# Initial weights


@pytest.mark.parametrize("player", [0, 1])
def test_sngan_starts_from_glorot_uniform_weights(player):
    network = build("sngan", (3, 32, 32), 10, 128, width=64)[player]
    for name, module in network.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        weight = module.weight.detach()
        receptive = weight[0, 0].numel()
        gain = 2**0.5 if name.endswith((".first", ".second")) else 1.0
        bound = gain * (6 / (receptive * (weight.shape[0] + weight.shape[1]))) ** 0.5
        assert float(weight.abs().max()) <= bound
        spread = float(weight.std()) / (bound / 3**0.5)
        assert spread == pytest.approx(1, abs=3 / weight.numel() ** 0.5)
        if module.bias is not None:
            assert not module.bias.any()
    for module in network.modules():
        if type(module).__name__ == "ConditionalBatchNorm" and module.is_conditional:
            assert not module.gain.weight.any()  # added to 1
            assert not module.bias.weight.any()
    if player == 1:
        bound = (6 / (10 + 64)) ** 0.5
        assert 0.8 * bound < float(network.embedding.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("player", [0, 1])
def test_biggan_starts_from_orthogonal_weights(player):
    network = build("biggan", (3, 64, 64), CLASSES, 60, width=8)[player]
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            matrix = module.weight.detach().flatten(1)
            matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
            product, unit = matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64)
            torch.testing.assert_close(product, unit, rtol=0, atol=1e-5)  # drawn in float32
            if getattr(module, "bias", None) is not None:
                assert not module.bias.any()
        if type(module).__name__ == "SelfAttention":
            assert float(module.strength.detach()) == 0


# Spectral normalization


def is_normalized(module):
    parametrizations = getattr(module, "parametrizations", None)
    return parametrizations is not None and isinstance(parametrizations.weight[0], SpectralNorm)


def test_biggan_normalizes_all_weights_but_the_generators_class_embedding():
    both = ["generator", "discriminator"]
    generator, discriminator = build("biggan", (3, 64, 64), CLASSES, 60, both, width=8)
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    for network in (generator, discriminator):
        exempt = [
            name
            for name, module in network.named_modules()
            if isinstance(module, kinds) and not is_normalized(module)
        ]
        assert exempt == (["embedding"] if network is generator else [])
    for module in (*generator.modules(), *discriminator.modules()):
        if is_normalized(module):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
            assert float(largest.detach()) == pytest.approx(1, abs=1e-6)


def test_own_module_may_opt_out_of_spectral_normalization():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Embedding(3, 2))
    network[1].spectral_norm = False
    network[2].spectral_norm = False
    before = network[1].weight.detach().clone()
    add_spectral_norm(network)
    assert [is_normalized(module) for module in network] == [True, False, False]
    assert torch.equal(network[1].weight, before)
    assert len(normalized_weights(network)) == 1

"""The Inception network of published FIDs: parameter count, file, and borders."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from arrays import ALONE, fake_images, images
from gatdist.common.errors import ConfigError
from gatdist.config import EvaluateConfig
from gatdist.evaluation.features import build_extractor
from gatdist.evaluation.inception import Inception, enlarge
from support import refused


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    return Inception(10).eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(network.state_dict(), path)
    return path


def asked(path, digest=""):
    return EvaluateConfig(
        features="inception",
        features_file=str(path),
        features_sha256=digest or hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def test_parameter_count_equals_published_count():
    with torch.device("meta"):
        network = Inception(1000)
    assert sum(tensor.numel() for tensor in network.parameters()) == 23_834_568


@pytest.mark.parametrize(
    ("row", "side", "expected"),
    [
        ([1.0, 2.0], 4, [1, 1.5, 2, 2]),  # TensorFlow's documentation of align_corners = False
        ([0.0, 3.0, 6.0], 9, [0, 1, 2, 3, 4, 5, 6, 6, 6]),
        ([0.0, 1.0, 2.0, 3.0], 2, [0, 2]),
        ([5.0], 3, [5, 5, 5]),
    ],
)
def test_images_are_upscaled_from_corners(row, side, expected):
    square = torch.tensor(row).expand(1, 1, len(row), len(row))
    wide, high = enlarge(square, side), enlarge(square.transpose(2, 3), side)
    assert torch.allclose(wide, torch.tensor(expected).float().expand(1, 1, side, side))
    assert torch.equal(high, wide.transpose(2, 3))


def test_averages_exclude_the_border(network):
    block = network.Mixed_5b
    flat = torch.ones(1, 192, 5, 5)
    with torch.no_grad():
        averaged = block(flat)[:, -32:]  # the branch that convolves an average pooling
        assert torch.allclose(averaged, block.branch_pool(flat), atol=1e-6)


def test_features_are_those_of_the_weights_in_the_file(network, file):
    data = images(4, shape=(6, 9, 1))
    extractor = build_extractor("inception", data, ALONE, asked(file))
    samples = fake_images(torch.arange(2))[:, :1]
    pixels = data.sample_format.to_samples(samples)  # [2, 6, 9, 1]
    with torch.no_grad():
        expected = network(torch.as_tensor(pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))
        features = extractor(samples)
        logits = extractor.classify(features)
        assert torch.allclose(features, expected, atol=1e-5)
        assert torch.allclose(logits + network.fc.bias, network.fc(expected), atol=1e-5)
    assert (extractor.num_features, extractor.num_classes) == (2048, 10)
    assert extractor.protocol["features_digest"] == asked(file).features_sha256


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"Mixed_7c.branch1x1.conv.weight": None}, "Mixed_7c.branch1x1.conv.weight"),
        ({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 7, 7)}, "[32, 3, 7, 7]"),
        ({"layer4.weight": torch.zeros(1)}, "layer4.weight"),
        ({"fc.weight": None}, "fc.weight"),
    ],
)
def test_other_weights_are_rejected_by_name(network, change, fact):
    weights = network.state_dict() | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with refused(ConfigError, "evaluate.features_file") as caught:
        Inception.with_weights(weights, "inception.safetensors")
    assert fact in str(caught.value)


def test_weights_that_only_training_uses_are_optional(network):
    weights = network.state_dict() | {"AuxLogits.conv0.weight": torch.zeros(2)}
    del weights["Conv2d_1a_3x3.bn.num_batches_tracked"]
    same = Inception.with_weights(weights, "inception.safetensors").state_dict()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in same.items())


def test_file_that_is_no_safetensors_is_rejected(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no weights")
    with refused(ConfigError, "evaluate.features_file"):
        build_extractor("inception", images(4), ALONE, asked(path))

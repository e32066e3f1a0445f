"""The published file of Inception weights: read as it is, and no other pickle."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch
from safetensors.torch import save_file

from arrays import ALONE, fake_images, images
from gatdist.common.errors import ConfigError
from gatdist.config import EvaluateConfig
from gatdist.evaluation import from_file
from gatdist.evaluation.features import build_extractor
from gatdist.evaluation.inception import Inception
from support import refused

DATA = images(4)


def built(path, digest=None):
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if digest is None else digest
    config = EvaluateConfig(features="inception", features_file=str(path), features_sha256=digest)
    return build_extractor("inception", DATA, ALONE, config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights in the published format, with 1,008 classes, and as safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    weights = Inception(1008).eval().state_dict()
    torch.save(weights, folder / "published.pth")
    save_file(weights, folder / "same.safetensors")
    return folder


def published(path, monkeypatch):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(from_file, "PUBLISHED_SHA256", digest)


def test_the_digest_is_that_of_the_published_name():
    name = "pt_inception-2015-12-05-6726825d.pth"  # as torch.hub names files: the first 8 digits
    assert from_file.PUBLISHED_SHA256.startswith(name.rpartition("-")[2].removesuffix(".pth"))
    assert len(from_file.PUBLISHED_SHA256) == 64


def test_without_a_digest_the_file_must_be_the_published_one(files):
    with refused(ConfigError, "evaluate.features_sha256"):
        built(files / "same.safetensors", digest="")


def test_the_published_file_gives_the_features_of_its_weights(files, monkeypatch):
    published(files / "published.pth", monkeypatch)
    first, second = built(files / "published.pth"), built(files / "same.safetensors")
    samples = fake_images(torch.arange(2))
    with torch.no_grad():
        features = first(samples)
        assert torch.equal(features, second(samples))
        assert first.classify(features).shape == (2, 1008)
    assert first.protocol["features_digest"] == from_file.PUBLISHED_SHA256
    assert first.protocol["resize"].startswith("299 × 299, bilinear")


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(1008, 2048)}, Attack()])
def test_no_other_pickle_is_read(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "other.pth")
    with refused(ConfigError, "evaluate.features_file"):
        built(tmp_path / "other.pth")
    assert not (tmp_path / "attacked").exists()

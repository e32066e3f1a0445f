"""Features of a small classifier, trained on the labelled real data by a fixed recipe.

For data that no published network fits, such as the built-in digits. Training has its own random
generator and, on a CPU, one thread, so that it is reproducible and does not affect the run. Worker
0 trains once and caches the network by the recipe's version and the data's fingerprint.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import DataError
from gatdist.common.heartbeat import beat
from gatdist.common.numerics import torch_threads
from gatdist.data.dataset import Dataset
from gatdist.data.modalities import ReadSpec
from gatdist.data.sample_format import AudioFormat, ImageFormat
from gatdist.evaluation import cache
from gatdist.evaluation.features import Extractor, register_feature_extractor
from gatdist.models.audio import LogMel
from gatdist.parallel.communicator import Communicator

RECIPE_VERSION = 1

_SEED = 20_240_229
_NUM_STEPS = 400
_BATCH = 64
_LEARNING_RATE = 2e-3
_NUM_FEATURES = 64
_SCALE_SAMPLES = 512
_MIN_SAMPLES = 20
_MAX_SAMPLES = 20_000
_MAX_BYTES = 2**28


@register_feature_extractor("classifier")
class Classifier(Extractor):
    """Last hidden layer of a classifier, before its activation; for labelled images and audio.

    Audio is classified by its log-mel spectrograms.
    """

    num_features = _NUM_FEATURES
    is_trained = True

    def __init__(self, dataset: Dataset, comm: Communicator) -> None:
        needs = {
            "images or audio": dataset.modality in ("image", "audio"),
            "class labels": dataset.num_classes > 0,
            f"at least {_MIN_SAMPLES} samples": dataset.num_samples >= _MIN_SAMPLES,
        }
        for need, is_met in needs.items():
            if not is_met:
                rule = f"needs {need}, and the data set does not have that"
                hint = "Choose other evaluate.features or evaluate.metrics"
                raise DataError("evaluate.features", rule, value="classifier", hint=hint)
        self._dataset, self._comm, self.num_classes = dataset, comm, dataset.num_classes
        self._network: ClassifierNetwork

    @property
    def protocol(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for tensor in self._network.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return {
            "recipe": f"classifier-v{RECIPE_VERSION}",
            "features_digest": digest.hexdigest()[:16],
            "held_out_accuracy": round(float(self._network.held_out_accuracy), 4),
        }

    def prepare(self) -> None:
        dataset, device = self._dataset, self._comm.device
        image_shape = as_images(torch.zeros(1, *dataset.sample_format.shape), dataset).shape[1:]
        with torch.device("meta"):  # draws nothing from the global generator
            network = ClassifierNetwork(image_shape, self.num_classes)
        if self._comm.is_main:
            shape = "x".join(map(str, image_shape))
            name = f"classifier-v{RECIPE_VERSION}-{dataset.fingerprint[:16]}-{shape}.safetensors"
            try:
                network.load_state_dict(cache.read(name), assign=True)
            except RuntimeError:  # absent, or of other parameters
                train_classifier(network, dataset, device)
                cache.keep(name, network.state_dict())
            network.to(device)
        else:
            network.to_empty(device=device)
        self._network = network.eval().requires_grad_(False)
        for tensor in self._network.state_dict().values():
            self._comm.broadcast_(tensor)

    def __call__(self, samples: Tensor) -> Tensor:
        """Return [n, 64], of about unit variance on real data."""
        return self._network.body(as_images(samples, self._dataset))

    def classify(self, features: Tensor) -> Tensor:
        return self._network.head(features)


@register_feature_extractor("channel_classifier")
class ChannelClassifier(Extractor):
    """Features of a ``classifier`` of channels, concatenated; for images stacked as channels.

    For data like Stacked MNIST (Metz et al. 2017): each of C channels shows one of K things, and
    the class is their number in base K, the first channel's first. One classifier, trained on all
    channels, classifies each; the logit of a class is the sum of its channels' log-probabilities.
    """

    is_trained = True

    def __init__(self, dataset: Dataset, comm: Communicator) -> None:
        self._channels = dataset.sample_format.shape[0] if dataset.modality == "image" else 1
        kinds = round(dataset.num_classes ** (1 / self._channels))
        if self._channels < 2 or kinds < 2 or kinds**self._channels != dataset.num_classes:
            rule = "needs images with 2 or more channels C and K to the power of C classes, K > 1"
            hint = "Choose other evaluate.features"
            raise DataError("evaluate.features", rule, value="channel_classifier", hint=hint)
        # A classifier takes it for a data set.
        single = cast("Dataset", _SingleChannels(dataset, kinds))
        self._classifier = Classifier(single, comm)
        self.num_classes = dataset.num_classes
        self.num_features = self._channels * _NUM_FEATURES

    @property
    def protocol(self) -> dict[str, Any]:
        return self._classifier.protocol | {"classes": f"{self._channels} channels"}

    def prepare(self) -> None:
        self._classifier.prepare()

    def __call__(self, samples: Tensor) -> Tensor:
        """Return [n, C·64]."""
        return self._classifier(samples.flatten(0, 1)[:, None]).view(len(samples), -1)

    def classify(self, features: Tensor) -> Tensor:
        """Return [n, K to the power of C]."""
        parts = features.view(len(features), self._channels, _NUM_FEATURES)
        found = features.new_zeros(len(features), 1)
        for channel in range(self._channels):
            scores = self._classifier.classify(parts[:, channel]).log_softmax(dim=1)
            found = (found[:, :, None] + scores[:, None]).flatten(1)
        return found


class _SingleChannels:
    """The channels of a data set's images as gray images, with the things that they show."""

    modality = "image"

    def __init__(self, dataset: Dataset, kinds: int) -> None:
        self._dataset, self.num_classes = dataset, kinds
        spec = dataset.sample_format.spec
        self._channels, *size = spec.shape
        self.num_samples = dataset.num_samples * self._channels
        values = spec.model_dump() | {"sample_shape": [1, *size], "num_classes": kinds}
        self.sample_format = ImageFormat(ReadSpec.model_validate(values | {"class_names": None}))
        message = f"{dataset.fingerprint} channels"
        self.fingerprint = hashlib.sha256(message.encode()).hexdigest()

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        samples, labels = self._dataset.read(indices // self._channels)
        assert labels is not None
        channel = indices % self._channels
        place = self.num_classes ** (self._channels - 1 - channel)
        pixels = np.take_along_axis(samples, channel[:, None, None, None], axis=3)
        return pixels, labels // place % self.num_classes


class ClassifierNetwork(nn.Module):
    """Strided convolutions down to about 4 × 4, and two linear layers: [n, C, H, W] → [n, K]."""

    held_out_accuracy: Tensor

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = sample_shape
        side = min(height, width)
        strides = [1 if side <= 16 else 2]
        while side // math.prod(strides) > 4:
            strides.append(2)
        strides.append(1)
        widths = [channels, 32, *[64] * (len(strides) - 1)]
        layers: list[nn.Module] = []
        for (inputs, outputs), stride in zip(itertools.pairwise(widths), strides, strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
        features = nn.Linear(64 * 4 * 4, _NUM_FEATURES)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), features)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(_NUM_FEATURES, num_classes))
        self.register_buffer("held_out_accuracy", torch.zeros(()))

    def forward(self, samples: Tensor) -> Tensor:
        return self.head(self.body(samples))


def as_images(samples: Tensor, dataset: Dataset) -> Tensor:
    """Return images [n, C, H, W]: samples as they are, or log-mel spectrograms of audio."""
    if not isinstance(dataset.sample_format, AudioFormat):
        return samples
    return _front(dataset.sample_format.sample_rate, samples.device)(samples)


@lru_cache(maxsize=4)
def _front(sample_rate: int, device: torch.device) -> LogMel:
    return LogMel.for_rate(sample_rate).to(device)


def train_classifier(network: ClassifierNetwork, dataset: Dataset, device: torch.device) -> None:
    """Train by the recipe: 400 steps of Adam on batches of 64, learning rate from 2e-3 to 0.

    On 90 % of at most 20,000 samples; the rest gives ``held_out_accuracy``. The features are then
    scaled to unit variance, and the head inversely, so that distances are comparable. ``network``
    may be on the meta device.
    """
    generator = torch.Generator().manual_seed(_SEED)
    _initialize(network, device, generator)
    count = min(
        dataset.num_samples,
        _MAX_SAMPLES,
        max(_MIN_SAMPLES, _MAX_BYTES // math.prod(dataset.sample_format.shape)),
    )
    order = torch.randperm(dataset.num_samples, generator=generator)[:count]
    pixels, known = dataset.read(order.numpy())
    assert known is not None
    samples, labels = torch.from_numpy(pixels), torch.from_numpy(known)
    num_held_out = count // 10

    def inputs(at: Tensor | slice) -> Tensor:
        return as_images(dataset.sample_format.to_network(samples[at].to(device)).float(), dataset)

    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _NUM_STEPS)
    with torch.enable_grad(), torch_threads(1):
        for _ in range(_NUM_STEPS):
            batch = torch.randint(num_held_out, count, (_BATCH,), generator=generator)
            loss = functional.cross_entropy(network(inputs(batch)), labels[batch].to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            beat()
    with torch.no_grad(), torch_threads(1):
        _scale_features(network, inputs(slice(-_SCALE_SAMPLES, None)))
        predicted = network(inputs(slice(num_held_out))).argmax(dim=1).cpu()
        network.held_out_accuracy.copy_((predicted == labels[:num_held_out]).float().mean())


def _initialize(network: nn.Module, device: torch.device, generator: torch.Generator) -> None:
    """Draw He-normal weights on the CPU, in a fixed order, then move to ``device``."""
    network.to_empty(device="cpu")
    for name, tensor in network.state_dict().items():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(tensor, nonlinearity="relu", generator=generator)
        else:
            tensor.zero_()
    network.to(device)


def _scale_features(network: ClassifierNetwork, samples: Tensor) -> None:
    """Divide the features by their deviation over ``samples``; multiply the head by it."""
    deviation = network.body(samples).var(dim=0).mean().sqrt()
    last, head = network.body[-1], network.head[-1]
    assert isinstance(last, nn.Linear)
    assert isinstance(head, nn.Linear)
    last.weight.div_(deviation)
    last.bias.div_(deviation)
    head.weight.mul_(deviation)  # the activation between them is homogeneous

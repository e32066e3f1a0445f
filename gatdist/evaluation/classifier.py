"""Features of a small classifier, trained on the labelled real data by a fixed recipe.

For data that no published network knows, such as the embedded digits. The recipe draws from its own
generator and, on a CPU, computes on one thread, so that it gives the same network again and leaves
the run's randomness alone. Worker 0 trains it once; it is kept in the cache folder under the
recipe's version and the data's fingerprint.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import DataError
from gatdist.common.heartbeat import beat
from gatdist.data import Dataset
from gatdist.data.sample_format import AudioFormat
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
    """The classifier's last hidden layer, before its activation. For labelled pictures and sounds.

    Of sounds it sees log-mel spectrograms.

    Raises:
        DataError: the data are no pictures or sounds, or have no labels, or are fewer than 20.
    """

    def __init__(self, dataset: Dataset, comm: Communicator) -> None:
        for holds, rule in (
            (
                dataset.modality in ("image", "audio"),
                "needs pictures or sounds, and the data set has none",
            ),
            (dataset.num_classes > 0, "needs class labels, and the data set has none"),
            (
                dataset.num_samples >= _MIN_SAMPLES,
                f"needs at least {_MIN_SAMPLES} samples to be trained on",
            ),
        ):
            if not holds:
                hint = "Choose other evaluate.features or evaluate.metrics"
                raise DataError("evaluate.features", rule, value="classifier", hint=hint)
        self._dataset, self._comm = dataset, comm
        self._network: ClassifierNetwork

    @property
    def num_features(self) -> int:
        """64."""
        return _NUM_FEATURES

    @property
    def protocol(self) -> dict[str, Any]:
        """The recipe, what came of it on held-out samples, and a digest of the network."""
        digest = hashlib.sha256()
        for tensor in self._network.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return {
            "recipe": f"classifier-v{RECIPE_VERSION}",
            "features_digest": digest.hexdigest()[:16],
            "held_out_accuracy": round(float(self._network.held_out_accuracy), 4),
        }

    def prepare(self) -> None:
        """Load the network from the cache or train it (worker 0), and hand it to all workers."""
        device = self._comm.device
        network = ClassifierNetwork.empty(_image_shape(self._dataset), self._dataset.num_classes)
        if self._comm.is_main:
            _load_or_train(network, self._dataset, device)
        else:
            network.to_empty(device=device)
        self._network = network.eval().requires_grad_(False)
        for tensor in self._network.state_dict().values():
            self._comm.broadcast_(tensor)

    def __call__(self, samples: Tensor) -> Tensor:
        """Samples as networks see them → [n, 64], of about unit variance on real data."""
        features: Tensor = self._network.body(as_images(samples, self._dataset))
        return features

    @property
    def num_classes(self) -> int:
        """Those of the data."""
        return self._dataset.num_classes

    def classify(self, features: Tensor) -> Tensor:
        """Features [n, 64] → logits [n, K]."""
        logits: Tensor = self._network.head(features)
        return logits


class ClassifierNetwork(nn.Module):
    """Strided convolutions down to 4 × 4 or so, and two linear layers. See :class:`Classifier`."""

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

    @classmethod
    def empty(cls, sample_shape: tuple[int, ...], num_classes: int) -> Self:
        """On the meta device: a network without values draws none from the global generator."""
        with torch.device("meta"):
            return cls(sample_shape, num_classes)

    def forward(self, samples: Tensor) -> Tensor:
        """Pictures [n, C, H, W] in [−1, 1] → logits [n, num_classes]."""
        logits: Tensor = self.head(self.body(samples))
        return logits


def as_images(samples: Tensor, dataset: Dataset) -> Tensor:
    """What the classifier sees: pictures [n, C, H, W], of sounds log-mel spectrograms."""
    if not isinstance(dataset.sample_format, AudioFormat):
        return samples
    images: Tensor = _front(dataset.sample_format.sample_rate, samples.device)(samples)
    return images


@lru_cache(maxsize=4)
def _front(sample_rate: int, device: torch.device) -> LogMel:
    """Made once, not for every batch."""
    return LogMel.for_rate(sample_rate).to(device)


def _image_shape(dataset: Dataset) -> tuple[int, ...]:
    return as_images(torch.zeros(1, *dataset.sample_format.shape), dataset).shape[1:]


def _load_or_train(network: ClassifierNetwork, dataset: Dataset, device: torch.device) -> None:
    """Fill ``network``, which stands on the meta device, and move it to ``device``."""
    shape = "x".join(map(str, _image_shape(dataset)))
    name = f"classifier-v{RECIPE_VERSION}-{dataset.fingerprint[:16]}-{shape}.safetensors"
    try:
        network.load_state_dict(cache.read(name), assign=True)
    except RuntimeError:  # not there, or of other parameters
        train_classifier(network, dataset, device)
        cache.keep(name, network.state_dict())
    else:
        network.to(device)


def train_classifier(network: ClassifierNetwork, dataset: Dataset, device: torch.device) -> None:
    """The recipe: 400 steps of Adam on batches of 64, the learning rate falling from 2e-3 to 0.

    Nine tenths of at most 20,000 samples are learned from; the rest tells ``held_out_accuracy``. At
    last the features are scaled, and the head inversely, so that distances do not depend on how
    large they happen to grow.

    Args:
        network: gets trained parameters on ``device``; may stand on the meta device.
        dataset: labelled pictures or sounds.
        device: where to train.
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

    def look(at: Tensor | slice) -> Tensor:
        return as_images(dataset.sample_format.to_network(samples[at].to(device)).float(), dataset)

    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _NUM_STEPS)
    with torch.enable_grad(), _one_thread():
        for _ in range(_NUM_STEPS):
            batch = torch.randint(num_held_out, count, (_BATCH,), generator=generator)
            loss = functional.cross_entropy(network(look(batch)), labels[batch].to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            beat()
    with torch.no_grad(), _one_thread():
        _scale_features(network, look(slice(-_SCALE_SAMPLES, None)))
        predicted = network(look(slice(num_held_out))).argmax(dim=1).cpu()
        network.held_out_accuracy.copy_((predicted == labels[:num_held_out]).float().mean())


def _initialize(network: nn.Module, device: torch.device, generator: torch.Generator) -> None:
    """He's initialization on the CPU, in a fixed order, then to ``device``."""
    network.to_empty(device="cpu")
    for name, tensor in network.state_dict().items():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(tensor, nonlinearity="relu", generator=generator)
        else:
            tensor.zero_()
    network.to(device)


def _scale_features(network: ClassifierNetwork, samples: Tensor) -> None:
    """Divide the features by their deviation over ``samples``, and multiply the head by it."""
    deviation = network.body(samples).var(dim=0).mean().sqrt()
    last, head = network.body[-1], network.head[-1]
    assert isinstance(last, nn.Linear)
    assert isinstance(head, nn.Linear)
    last.weight.div_(deviation)
    last.bias.div_(deviation)
    head.weight.mul_(deviation)  # the activation between them is homogeneous


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums on a CPU depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

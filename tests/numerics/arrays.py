"""Small data sets in memory, evaluators of them, and generators to evaluate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from gatdist.config import EvaluateConfig
from gatdist.data.codecs.text import Vocabulary
from gatdist.data.modalities import ReadSpec
from gatdist.data.sample_format import sample_format_of
from gatdist.evaluation import Evaluator
from gatdist.parallel.communicator import LocalCommunicator

CPU = torch.device("cpu")
ALONE = LocalCommunicator(CPU)


@dataclass
class Arrays:
    """A data set in memory with the interface that an evaluator uses."""

    # uint8 [n, H, W, C], float32 [n, d] or [n, C, t], or ids of texts, uint8 [n, t].
    samples: np.ndarray
    labels: np.ndarray | None = None
    bad_samples: Mapping[int, str] = field(default_factory=dict)
    sample_rate: int = 8000

    @property
    def num_samples(self):
        return len(self.samples)

    @property
    def modality(self):
        if self.samples.dtype == np.uint8:
            return {4: "image", 2: "text"}[self.samples.ndim]
        return {2: "points", 3: "audio"}[self.samples.ndim]

    @property
    def sample_format(self):
        shape = list(self.samples.shape[1:])
        if self.modality == "image":
            shape = [shape[2], *shape[:2]]
        rate = self.sample_rate if self.modality == "audio" else None
        spec = {"modality": self.modality, "sample_shape": shape, "sample_rate": rate}
        return sample_format_of(ReadSpec(**spec, num_classes=self.num_classes))

    @property
    def num_classes(self):
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def fingerprint(self):
        return hashlib.sha256(self.samples.tobytes()).hexdigest()

    resize = None
    part = None

    @property
    def reading(self):
        return self.fingerprint

    def read(self, indices):
        return self.samples[indices], None if self.labels is None else self.labels[indices]


def points(n=400, seed=0):
    return Arrays(np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32))


def images(n=120, shape=(6, 9, 3), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    labels[:classes] = range(classes)
    return Arrays(rng.integers(0, 256, (n, *shape), dtype=np.uint8), labels.astype(np.int64))


def texts(*lines, length=8):
    return Arrays(np.stack([Vocabulary().encode(line, length) for line in lines]))


def evaluator(dataset, comm=ALONE, conditional=False, **config):
    return Evaluator(EvaluateConfig(**config), dataset, comm, CPU, conditional=conditional)


def fake_points(positions):
    angle = positions.double()
    return torch.stack([angle.sin() * 1.5, (angle * 0.7).cos()], dim=1)


def fake_images(positions):
    generator = torch.Generator().manual_seed(5)
    table = torch.rand(1000, 3, 6, 9, generator=generator) * 2 - 1
    return table[positions]

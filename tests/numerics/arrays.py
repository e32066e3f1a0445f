"""Small data sets in memory, evaluators of them, and generators to measure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from gatdist.config import EvaluateConfig
from gatdist.evaluation import Evaluator
from gatdist.parallel.communicator import LocalCommunicator

CPU = torch.device("cpu")
ALONE = LocalCommunicator(CPU)


@dataclass
class Arrays:
    """A data set in memory: what an evaluator asks of one."""

    samples: np.ndarray  # uint8 [n, H, W, C] or float32 [n, d]
    labels: np.ndarray | None = None

    @property
    def num_samples(self):
        return len(self.samples)

    @property
    def is_image(self):
        return self.samples.ndim == 4

    @property
    def sample_shape(self):
        rest = self.samples.shape[1:]
        return (rest[2], rest[0], rest[1]) if self.is_image else tuple(rest)

    @property
    def num_classes(self):
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def fingerprint(self):
        return hashlib.sha256(self.samples.tobytes()).hexdigest()

    def read(self, indices):
        return self.samples[indices], None if self.labels is None else self.labels[indices]


def points(n=400, seed=0):
    return Arrays(np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32))


def pictures(n=120, shape=(6, 9, 3), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    labels[:classes] = range(classes)
    return Arrays(rng.integers(0, 256, (n, *shape), dtype=np.uint8), labels.astype(np.int64))


def evaluator(dataset, comm=ALONE, **config):
    return Evaluator(EvaluateConfig(**config), dataset, comm, CPU)


def fake_points(positions):
    angle = positions.double()
    return torch.stack([angle.sin() * 1.5, (angle * 0.7).cos()], dim=1)


def fake_pictures(positions):
    generator = torch.Generator().manual_seed(5)
    table = torch.rand(1000, 3, 6, 9, generator=generator) * 2 - 1
    return table[positions]

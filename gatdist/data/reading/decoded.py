"""The samples of a small data set, decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatdist.data.order import Indices

# uint8 [n, H, W, C] for images, float32 [n, d] for points.
Samples = NDArray[Any]


class DecodedSamples:
    """All samples of a small data set, filled as they are first read.

    Args:
        samples: memory for all of them, [N, ...].
        labels: memory for their labels, int64 [N]; None without classes.
    """

    def __init__(self, samples: Samples, labels: Indices | None) -> None:
        self._samples, self._labels = samples, labels
        self._known = np.zeros(len(samples), dtype=bool)
        self.is_full = False

    def missing(self, indices: Indices) -> Indices:
        """Those of ``indices`` that are not known yet, sorted, each once."""
        return indices[:0] if self.is_full else np.unique(indices[~self._known[indices]])

    def put(self, indices: Indices, samples: Samples, labels: Indices | None) -> None:
        """Learn samples."""
        self._samples[indices] = samples
        if self._labels is not None and labels is not None:
            self._labels[indices] = labels
        self._known[indices] = True
        self.is_full = bool(self._known.all())

    def get(self, indices: Indices) -> tuple[Samples, Indices | None]:
        """Copies of known samples and their labels."""
        return self._samples[indices], None if self._labels is None else self._labels[indices]

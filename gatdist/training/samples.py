"""Which samples there are networks for."""

from __future__ import annotations

from gatdist.data import Dataset
from gatdist.data.modalities import MODALITIES
from gatdist.errors import DataError


def require_trainable(dataset: Dataset) -> None:
    """Raise DataError unless there are networks for such samples: pictures and points, so far."""
    if dataset.modality not in ("image", "points"):
        noun = MODALITIES[dataset.modality].noun
        rule = f"holds {noun}s, and gatdist trains on pictures and points so far"
        raise DataError(dataset.config.url, rule, mend="Choose another data.url")

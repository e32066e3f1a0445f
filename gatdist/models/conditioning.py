"""How the built-in pairs take labels: by embeddings, None where there are no classes."""

from __future__ import annotations

import math

from torch import Tensor, nn


def embed_labels(latents: Tensor, labels: Tensor | None, embedding: nn.Module | None) -> Tensor:
    """Latents [n, latent_size] with those of their labels int64 [n] added, at the same variance."""
    if embedding is None:
        return latents
    assert labels is not None
    conditioned: Tensor = (latents + embedding(labels)) / math.sqrt(2)
    return conditioned


def project_labels(
    logits: Tensor, features: Tensor, labels: Tensor | None, embedding: nn.Module | None
) -> Tensor:
    """Logits [n] plus the labels' projection of the features [n, k] (Miyato & Koyama 2018)."""
    if embedding is None:
        return logits
    assert labels is not None
    projections: Tensor = (embedding(labels) * features).sum(1) / math.sqrt(features.shape[1])
    return logits + projections

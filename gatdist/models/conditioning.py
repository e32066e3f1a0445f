"""How the built-in pairs take labels: by embeddings, None where there are no classes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def embed_labels(latents: Tensor, labels: Tensor | None, embedding: nn.Module | None) -> Tensor:
    """Latents [n, latent_size] with those of their labels int64 [n] added, at the same variance."""
    if embedding is None:
        return latents
    assert labels is not None
    conditioned: Tensor = (latents + embedding(labels)) / math.sqrt(2)
    return conditioned


def to_logits(
    features: Tensor,
    labels: Tensor | None,
    finish: nn.Module,
    embedding: nn.Module | None,
    scale: float | None = None,
) -> Tensor:
    """The end of a discriminator: logits [n] of features [n, k], with their labels' projection.

    In the dtype of the weights also under autocast: with the eight bits of bfloat16, logits of real
    and fake would differ by more noise than a good generator leaves them apart.

    Args:
        features: [n, k].
        labels: int64 [n], or None.
        finish: [n, k] → [n, 1].
        embedding: labels → [n, k], for the projection of Miyato & Koyama (2018).
        scale: of the projection; None takes 1/√k, which keeps that of unit normal numbers.
    """
    with without_autocast(features.device.type):
        features = features.to(next(finish.parameters()).dtype)
        logits: Tensor = finish(features)[:, 0]
        if embedding is None:
            return logits
        assert labels is not None
        projections: Tensor = (embedding(labels) * features).sum(1)
        return logits + projections * (1 / math.sqrt(features.shape[1]) if scale is None else scale)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Where all is computed in the dtype of what comes in."""
    if not torch.amp.is_autocast_available(device_type):  # such as torch's meta device
        return nullcontext()
    return torch.autocast(device_type, enabled=False)

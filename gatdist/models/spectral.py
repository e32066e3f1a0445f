"""Spectral normalization (Miyato et al. 2018) as a parametrization.

Each weight W, seen as a matrix [outputs, the rest], is used as W/σ with σ = uᵀWv. The vectors u and
v follow W's first singular pair by one power iteration (:meth:`SpectralNorm.advance`) each time
the network has moved, never by a forward: so they depend neither on how many parts a batch went
through in, nor on who looked at the network in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

_FIRST_ITERATIONS = 20
_NORMALIZED = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


class SpectralNorm(nn.Module):
    """W ↦ W/σ.

    Args:
        weight: W, not zero; its first axis is the outputs'.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("v", normalize(torch.randn_like(matrix[0]), dim=0))
        for _ in range(_FIRST_ITERATIONS):
            self.advance(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """W/σ; u and v count as constants in its derivative."""
        sigma = self.u @ weight.flatten(1) @ self.v
        return weight / sigma

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        """One power iteration. A ``weight`` that is not finite leaves u and v as they are."""
        matrix = weight.flatten(1)
        v = normalize(matrix.T @ self.u, dim=0)
        u = normalize(matrix @ v, dim=0)
        finite = u.isfinite().all() & v.isfinite().all()
        self.u.copy_(u.where(finite, self.u))
        self.v.copy_(v.where(finite, self.v))


def add_spectral_norm(network: nn.Module) -> nn.Module:
    """Normalize every linear, embedding and (not transposed) convolution weight, in place.

    A weight that starts at zero has no direction to normalize and gets an orthogonal one.
    """
    for module in normalizable(network):
        if not module.weight.is_meta and not module.weight.any():
            nn.init.orthogonal_(module.weight)
        parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))
    return network


def normalizable(network: nn.Module) -> list[Any]:
    """The modules whose ``weight`` spectral normalization is for."""
    return [
        module
        for module in network.modules()
        if isinstance(module, _NORMALIZED) and not getattr(module, "transposed", False)
    ]


def normalized_weights(network: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """Each of the network's spectral norms, with the W that it is of."""
    return [
        (module[0], module.original)
        for module in network.modules()
        if isinstance(module, parametrize.ParametrizationList)
        and isinstance(module[0], SpectralNorm)
    ]

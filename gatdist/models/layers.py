"""Parts that networks share: initial weights, labels, noise, features, spectral normalization.

Legend: n samples, k features.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from gatdist.common.errors import ConfigError
from gatdist.config import LatentDistribution

Layer = TypeVar("Layer", bound=nn.Linear | nn.modules.conv._ConvNd)

_FIRST_ITERATIONS = 20
_NORMALIZED = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def leaky_gain(slope: float) -> float:
    """Return the gain that keeps the variance behind a leaky ReLU (He et al. 2015)."""
    return math.sqrt(2 / (1 + slope**2))


def initialized(layer: Layer, gain: float = 1.0, fan_in: float | None = None) -> Layer:
    """Draw the weights from N(0, gain²/fan_in) and set the biases to 0 (He et al. 2015).

    The default ``fan_in`` is wrong for transposed convolutions.
    """
    fan_in = fan_in or layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def doubling_widths(width: int, count: int, max_width: float = math.inf) -> list[int]:
    """Return channels of ``count`` levels from fine to coarse: doubling, at most ``max_width``."""
    return [int(min(width * 2**level, max_width)) for level in range(count)]


def label_embedding(num_classes: int, size: int) -> nn.Embedding | None:
    """Return an embedding [num_classes, size], or None without classes."""
    return nn.Embedding(num_classes, size) if num_classes else None


def embed_labels(latents: Tensor, labels: Tensor | None, embedding: nn.Module | None) -> Tensor:
    """Add the embeddings of labels int64 [n] to latents [n, latent_size], keeping the variance."""
    if embedding is None:
        return latents
    assert labels is not None
    return (latents + embedding(labels)) / math.sqrt(2)


def to_logits(
    features: Tensor,
    labels: Tensor | None,
    finish: nn.Module,
    embedding: nn.Module | None,
    scale: float | None = None,
) -> Tensor:
    """Return a discriminator's logits [n], with label projection (Miyato & Koyama 2018).

    Computed in the dtype of the weights, also under autocast: bfloat16 rounds logits more coarsely
    than a good generator's fakes differ from real samples. ``finish`` maps features [n, k] → [n,
    1], ``embedding`` labels int64 [n] → [n, k]. ``scale`` is the factor of the projection; None:
    1/√k, which keeps the variance of unit normals.
    """
    with without_autocast(features.device.type):
        features = features.to(next(finish.parameters()).dtype)
        logits: Tensor = finish(features)[:, 0]
        if embedding is None:
            return logits
        assert labels is not None
        projections: Tensor = (embedding(labels) * features).sum(1)
        return logits + projections * (1 / math.sqrt(features.shape[1]) if scale is None else scale)


def to_conditional_logits(
    features: Tensor, embedded: Tensor | None, finish: nn.Module, scale: float = 1.0
) -> Tensor:
    """Return a discriminator's logits [n]: scale · ⟨finish(features), embedded labels⟩.

    Computed in the dtype of the weights, as in :func:`to_logits`. ``finish`` maps features [n, k] →
    [n, e]; ``embedded`` is [n, e], or None for e = 1.
    """
    with without_autocast(features.device.type):
        outputs: Tensor = finish(features.to(next(finish.parameters()).dtype))
        return outputs[:, 0] if embedded is None else (outputs * embedded).sum(1) * scale


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Disable autocast where the device has it."""
    if not torch.amp.is_autocast_available(device_type):  # such as torch's meta device
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def glorot(layer: Layer, gain: float = 1.0) -> Layer:
    """Draw the weights from U(−a, a), a = gain · √(6 / (fan_in + fan_out)); set the biases to 0.

    Glorot & Bengio 2010. The default initialization of TensorFlow.
    """
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def uniform(normal: Tensor) -> Tensor:
    """Map standard normal numbers to uniform ones in (0, 1), elementwise."""
    smallest = torch.finfo(normal.dtype).eps
    share = 0.5 + 0.5 * torch.erf(normal * math.sqrt(0.5))
    return share.clamp(smallest, 1 - smallest)


def latents_from(normal: Tensor, distribution: LatentDistribution) -> Tensor:
    """Map standard normal numbers to latents of a distribution, elementwise.

    ``uniform`` is U(−1, 1).
    """
    return normal if distribution == "normal" else torch.erf(normal * math.sqrt(0.5))


def gumbel(normal: Tensor) -> Tensor:
    """Map standard normal numbers to Gumbel ones, elementwise."""
    return -torch.log(-torch.log(uniform(normal)))


def one_hot(scores: Tensor, temperature: float) -> Tensor:
    """Return the argmax of scores [n, V, …] as one-hot, with the gradient of softmax(scores/τ)."""
    soft = (scores / temperature).softmax(dim=1)
    classes = torch.arange(soft.shape[1], device=soft.device).view(-1, *[1] * (soft.dim() - 2))
    hard = (soft.argmax(dim=1, keepdim=True) == classes).to(soft.dtype)
    return hard + soft - soft.detach()


class LabelLinear(nn.Linear):
    """A linear layer of one-hot labels, without bias: int64 [n] → [n, size]."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__(num_classes, size, bias=False)

    def forward(self, labels: Tensor) -> Tensor:
        return functional.embedding(labels, self.weight.T)


class DiscriminatorFeatures(nn.Module):
    """Samples [n, …] → features [n, k]: the inputs of the discriminator's layer ``finish``.

    All built-in discriminators have such a last layer; ConfigError without.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        found = [m for name, m in discriminator.named_modules() if name.split(".")[-1] == "finish"]
        if not found:
            raise ConfigError(
                "model.discriminator.name",
                "must have a layer 'finish', whose inputs are the features",
                value=type(discriminator).__name__,
                hint="Name its last layer so",
            )
        self.discriminator = discriminator
        self._seen: list[Tensor] = []
        self._handle = found[0].register_forward_pre_hook(
            lambda module, inputs: self._seen.append(inputs[0])
        )

    def close(self) -> None:
        self._handle.remove()

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Labels int64 [n] are optional; a class-conditional network gets class 0 by default."""
        self._seen.clear()
        if labels is None and getattr(self.discriminator, "embedding", None) is not None:
            labels = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
        self.discriminator(samples, labels)
        return self._seen.pop().flatten(1)


class SpectralNorm(nn.Module):
    """Spectral normalization (Miyato et al. 2018) as a parametrization: W ↦ W/σ with σ = uᵀWv.

    W is seen as a matrix [outputs, rest]. One power iteration (:meth:`advance`) per optimizer step,
    never in a forward, moves u and v towards its first singular pair. They depend neither on how a
    batch is split nor on forwards in between. W is not zero.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("v", normalize(torch.randn_like(matrix[0]), dim=0))
        if not weight.is_meta:  # slow, and without a result
            for _ in range(_FIRST_ITERATIONS):
                self.advance(weight)

    def forward(self, weight: Tensor) -> Tensor:
        sigma = self.u @ weight.flatten(1) @ self.v
        return weight / sigma

    @torch.no_grad()
    def advance(self, weight: Tensor) -> None:
        """Do one power iteration; a non-finite ``weight`` leaves u and v unchanged."""
        matrix = weight.flatten(1)
        v = normalize(matrix.T @ self.u, dim=0)
        u = normalize(matrix @ v, dim=0)
        finite = u.isfinite().all() & v.isfinite().all()
        self.u.copy_(u.where(finite, self.u))
        self.v.copy_(v.where(finite, self.v))


def add_spectral_norm(network: nn.Module) -> nn.Module:
    """Normalize every linear, embedding and (not transposed) convolution weight, in place.

    Modules with the attribute ``spectral_norm = False`` are exempt. A weight that is all zero has
    no singular vectors and is replaced by an orthogonal one.
    """
    for module in normalizable(network):
        if parametrize.is_parametrized(module, "weight"):
            rule = f"its {type(module).__name__.removeprefix('Parametrized')} is normalized already"
            hint = "Leave the network out"
            raise ConfigError("model.spectral_norm", rule, hint=hint)
        if not module.weight.is_meta and not module.weight.any():
            nn.init.orthogonal_(module.weight)
        parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))
    return network


def normalizable(network: nn.Module) -> list[Any]:
    """Return the modules whose ``weight`` spectral normalization applies to."""
    return [
        module
        for module in network.modules()
        if isinstance(module, _NORMALIZED)
        and not getattr(module, "transposed", False)
        and getattr(module, "spectral_norm", True)
    ]


def normalized_weights(network: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """Return each spectral norm in the network with its unnormalized weight W."""
    return [
        (module[0], module.original)
        for module in network.modules()
        if isinstance(module, parametrize.ParametrizationList)
        and isinstance(module[0], SpectralNorm)
    ]

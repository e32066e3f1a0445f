"""Residual blocks of SNGAN (Miyato et al. 2018) and BigGAN (Brock et al. 2019).

Legend: n images, c channels, h × w pixels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from gatdist.models.layers import label_embedding, to_logits
from gatdist.nn import Conv2d

# What a normalization is conditioned on: labels, vectors, or nothing.
Condition = Tensor | None
# Number of channels → normalization.
MakeNorm = Callable[[int], nn.Module]


class ConditionalBatchNorm(nn.Module):
    """Batch normalization whose gain and bias depend on the sample (de Vries et al. 2017).

    ``make`` builds the modules for the gain, added to 1, and the bias: n conditions → [n, c]. None:
    plain batch normalization.
    """

    def __init__(
        self, channels: int, make: Callable[[], nn.Module] | None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.is_conditional = make is not None
        self.norm = nn.BatchNorm2d(channels, eps, affine=make is None)
        if make is not None:
            self.gain, self.bias = make(), make()

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        normalized: Tensor = self.norm(x)
        if not self.is_conditional:
            return normalized
        gain = 1 + self.gain(condition)[:, :, None, None]
        return normalized * gain + self.bias(condition)[:, :, None, None]


class UpBlock(nn.Module):
    """x [n, inputs, h, w] → [n, outputs, 2h, 2w], by two convolutions and a 1×1 skip path."""

    def __init__(self, inputs: int, outputs: int, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norms = nn.ModuleList([make_norm(inputs), make_norm(outputs)])
        self.first = Conv2d(inputs, outputs, 3, padding=1)
        self.second = Conv2d(outputs, outputs, 3, padding=1)
        self.skip = Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        change = self.first(_double(functional.relu(self.norms[0](x, condition))))
        change = self.second(functional.relu(self.norms[1](change, condition)))
        # 1×1 convolution and upsampling commute; this order costs a quarter.
        shortcut: Tensor = _double(self.skip(x))
        return shortcut + change


class DownBlock(nn.Module):
    """x [n, inputs, h, w] → [n, outputs, h/2, w/2], or of the same size unless ``halves``.

    ``hidden`` channels between the two convolutions; no activation before ``is_first``.
    """

    def __init__(
        self, inputs: int, outputs: int, *, halves: bool, hidden: int, is_first: bool = False
    ) -> None:
        super().__init__()
        self.halves, self.is_first = halves, is_first
        self.first = Conv2d(inputs, hidden, 3, padding=1)
        self.second = Conv2d(hidden, outputs, 3, padding=1)
        self.skip = Conv2d(inputs, outputs, 1) if halves or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        start = x if self.is_first else functional.relu(x)
        change = self.second(functional.relu(self.first(start)))
        # Pooling and 1×1 convolution commute; this order costs a quarter.
        shortcut: Tensor = self.skip(functional.avg_pool2d(x, 2) if self.halves else x)
        return shortcut + (functional.avg_pool2d(change, 2) if self.halves else change)


class ProjectionDiscriminator(nn.Module):
    """Images [n, C, H, W] → blocks → [n, width, h, w], sum-pooled → logits [n]."""

    def __init__(
        self, blocks: nn.Sequential, width: int, num_classes: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.finish = nn.Linear(width, 1, bias)
        self.embedding = label_embedding(num_classes, width)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        features = functional.relu(self.blocks(samples)).sum(dim=(2, 3))
        return to_logits(features, labels, self.finish, self.embedding, scale=1.0)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")

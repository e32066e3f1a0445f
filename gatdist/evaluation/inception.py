"""The Inception network of published FIDs.

The architecture of Szegedy et al. 2016 ("Rethinking the Inception Architecture for Computer
Vision") as in TensorFlow's graph of 2015-12-05, which Heusel et al. (2017) used: average pooling
without the padding, max pooling in the last block, and TensorFlow's old bilinear resampling.
Parameters are named as in torchvision and in the weights that were converted from that graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError

NUM_FEATURES = 2048
SIDE = 299
# What files may also hold: the auxiliary classifier, and numbers of batches.
_UNUSED = ("AuxLogits.", "num_batches_tracked")

Kernel = int | tuple[int, int]
_ROW7, _COLUMN7, _ROW3, _COLUMN3 = (1, 7), (7, 1), (1, 3), (3, 1)


class Inception(nn.Module):
    """Pixels, uint8 [n, 3, H, W] of any size → features, float32 [n, 2048], without ``fc``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _small(192, pooled=32)
        self.Mixed_5c = _small(256, pooled=64)
        self.Mixed_5d = _small(288, pooled=64)
        self.Mixed_6a = _Mixed(
            288, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)]
        )
        self.Mixed_6b = _factorized(128)
        self.Mixed_6c = _factorized(160)
        self.Mixed_6d = _factorized(160)
        self.Mixed_6e = _factorized(192)
        self.Mixed_7a = _Mixed(
            768,
            branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, _ROW7), (192, _COLUMN7), (192, 3, 2)],
        )
        self.Mixed_7b = _wide(1280, _average)
        self.Mixed_7c = _wide(2048, _maximum)
        self.fc = nn.Linear(NUM_FEATURES, num_classes)

    @classmethod
    def with_weights(cls, weights: Mapping[str, Tensor], name: str) -> Self:
        """Return the network with the weights of the file ``name``, in evaluation mode."""
        last = weights.get("fc.weight")
        with torch.device("meta"):
            network = cls(len(last) if last is not None and last.dim() else 1)
        no_count = torch.zeros((), dtype=torch.long)
        used = {key: no_count.clone() for key in network.state_dict() if _is_unused(key)}
        used |= {key: x.float() for key, x in weights.items() if not _is_unused(key)}
        try:
            network.load_state_dict(used, assign=True)
        except RuntimeError as error:
            problem = str(error).splitlines()[1].strip()  # the first after a title
            raise ConfigError(
                "evaluate.features_file",
                f"holds weights of another network than Inception: {problem}",
                value=name,
                hint="Use the weights of published FIDs, with torchvision's parameter names",
            ) from None
        return network.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (enlarge(pixels.float(), SIDE) - 128) / 128  # [n, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _halve(x)  # [n, 64, 73, 73]
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # [n, 192, 35, 35]
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # [n, 768, 17, 17]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [n, 2048, 8, 8]
        return x.mean(dim=(2, 3))


def enlarge(images: Tensor, side: int) -> Tensor:
    """Resample float [n, C, H, W] → [n, C, side, side] bilinearly, as TensorFlow 1 did.

    Output pixel i lies at i · H / side: pixels' corners are aligned, not their centres, and the
    last pixel is repeated beyond the border.
    """
    for dim in (2, 3):
        size = images.shape[dim]
        at = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)
        before = at.long()
        after = (before + 1).clamp(max=size - 1)
        shape = [1] * images.dim()
        shape[dim] = side
        weight = (at - before).view(shape)
        images = torch.lerp(
            images.index_select(dim, before), images.index_select(dim, after), weight
        )
    return images


class _Convolution(nn.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches of convolutions side by side, concatenated; [n, inputs, h, w] → [n, outputs, …].

    Args:
        inputs: channels.
        pool: what ``branch_pool`` starts with; None: halves h and w, with a branch of max pooling.
        branches: by name, the (outputs, kernel, stride = 1) of their convolutions, in order. The
            last may be a list of several, side by side. A convolution is named after its branch,
            with its number and letter where there are several.
    """

    def __init__(
        self, inputs: int, pool: Callable[[Tensor], Tensor] | None = None, **branches: Sequence[Any]
    ) -> None:
        super().__init__()
        self.pool = pool
        self.names: list[list[list[str]]] = []  # by branch and depth
        for branch, layers in branches.items():
            channels, names = inputs, []
            for depth, layer in enumerate(layers, start=1):
                parallel = layer if isinstance(layer, list) else [layer]
                number = f"_{depth}" if len(layers) > 1 else ""
                letters = "ab" if len(parallel) > 1 else [""]
                names.append([f"{branch}{number}{letter}" for letter in letters])
                for name, (outputs, kernel, *stride) in zip(names[-1], parallel, strict=True):
                    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
                    options = {"stride": 2} if stride else {"padding": [s // 2 for s in sides]}
                    self.add_module(name, _Convolution(channels, outputs, kernel, **options))
                channels = outputs
            self.names.append(names)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for *chain, last in self.names:
            y = self.pool(x) if self.pool and last == ["branch_pool"] else x
            for (name,) in chain:
                y = self.get_submodule(name)(y)
            found += [self.get_submodule(name)(y) for name in last]
        return torch.cat(found if self.pool else [*found, _halve(x)], dim=1)


def _small(inputs: int, pooled: int) -> _Mixed:
    """Return a block at 35 × 35."""
    return _Mixed(
        inputs,
        _average,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pooled, 1)],
    )


def _factorized(width: int) -> _Mixed:
    """Return a block at 17 × 17, with 7 × 7 kernels as rows and columns."""
    rows, columns = (width, _ROW7), (width, _COLUMN7)
    return _Mixed(
        768,
        _average,
        branch1x1=[(192, 1)],
        branch7x7=[(width, 1), rows, (192, _COLUMN7)],
        branch7x7dbl=[(width, 1), columns, rows, columns, (192, _ROW7)],
        branch_pool=[(192, 1)],
    )


def _wide(inputs: int, pool: Callable[[Tensor], Tensor]) -> _Mixed:
    """Return a block at 8 × 8, with rows and columns side by side."""
    return _Mixed(
        inputs,
        pool,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), [(384, _ROW3), (384, _COLUMN3)]],
        branch3x3dbl=[(448, 1), (384, 3), [(384, _ROW3), (384, _COLUMN3)]],
        branch_pool=[(192, 1)],
    )


def _halve(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=2)


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=1, padding=1)


def _is_unused(key: str) -> bool:
    return key.startswith(_UNUSED[0]) or key.endswith(_UNUSED[1])

"""The Inception network that published Fréchet distances are measured by.

The architecture is that of Szegedy et al., "Rethinking the Inception Architecture for Computer
Vision" (2016), as TensorFlow's graph of 2015-12-05 has it, which Heusel et al. (2017) took:
averages that leave the border out, a maximum in the last block, and pictures enlarged the way
TensorFlow did then. Parameters are named as in torchvision and in the weights that were converted
from that graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatdist.common.errors import ConfigError

NUM_FEATURES = 2048
_SIDE = 299
# What files hold beside: the classifier that only training has, and how many batches there were.
_UNUSED = ("AuxLogits.", "num_batches_tracked")


class Inception(nn.Module):
    """Pixels, uint8 [n, 3, H, W] of any size → features, float32 [n, 2048].

    Args:
        num_classes: of the layer ``fc``, which :meth:`forward` leaves to others.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _Small(192, pooled=32)
        self.Mixed_5c = _Small(256, pooled=64)
        self.Mixed_5d = _Small(288, pooled=64)
        self.Mixed_6a = _HalveOnce(288)
        self.Mixed_6b = _Long(768, width=128)
        self.Mixed_6c = _Long(768, width=160)
        self.Mixed_6d = _Long(768, width=160)
        self.Mixed_6e = _Long(768, width=192)
        self.Mixed_7a = _HalveAgain(768)
        self.Mixed_7b = _Wide(1280, _average)
        self.Mixed_7c = _Wide(2048, _maximum)
        self.fc = nn.Linear(NUM_FEATURES, num_classes)

    @classmethod
    def with_weights(cls, weights: Mapping[str, Tensor], name: str) -> Self:
        """The network with the weights of a file, in evaluation mode.

        Args:
            weights: by the names of its parameters.
            name: of the file, for messages.

        Raises:
            ConfigError: the weights are another network's; the first tensor that differs is named.
        """
        last = weights.get("fc.weight")
        with torch.device("meta"):
            network = cls(len(last) if last is not None and last.dim() else 1)
        used: dict[str, Any] = {key: x for key, x in weights.items() if not _is_unused(key)}
        for key, tensor in network.state_dict().items():
            if _is_unused(key):
                used[key] = torch.zeros_like(tensor, device="cpu")
            elif key not in used:
                raise _another(name, f"tensor {key} is missing")
            elif used[key].shape != tensor.shape:
                there, here = tuple(used[key].shape), tuple(tensor.shape)
                raise _another(name, f"tensor {key} has shape {there}, not {here}")
            else:
                used[key] = used[key].float()
        if more := sorted(used.keys() - network.state_dict()):
            raise _another(name, f"tensor {more[0]} is not of this network")
        network.load_state_dict(used, assign=True)
        return network.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of pictures; see the class."""
        x = (enlarge(pixels.float(), _SIDE) - 128) / 128  # [n, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _halve(x)  # [n, 64, 73, 73]
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # [n, 192, 35, 35]
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # [n, 768, 17, 17]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [n, 2048, 8, 8]
        return x.mean(dim=(2, 3))


def enlarge(images: Tensor, side: int) -> Tensor:
    """Bilinear, float [n, C, H, W] → [n, C, side, side], as TensorFlow's first one did it.

    Output pixel i lies at i · H / side: corners of pixels are laid upon one another, not centres,
    and what lies beyond the last pixel is that pixel.
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
    """Convolution, normalization, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], **options: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, outputs, …]."""
        return functional.relu(self.bn(self.conv(x)))


def _row(inputs: int, outputs: int, length: int) -> _Convolution:
    return _Convolution(inputs, outputs, (1, length), padding=(0, length // 2))


def _column(inputs: int, outputs: int, length: int) -> _Convolution:
    return _Convolution(inputs, outputs, (length, 1), padding=(length // 2, 0))


def _halve(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=2)


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=1, padding=1)


class _Small(nn.Module):
    """35 × 35: kernels of 1, 5 and twice 3, and an average."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(inputs, 64, 1)
        self.branch5x5_1 = _Convolution(inputs, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, 224 + pooled, h, w]."""
        fives = self.branch5x5_2(self.branch5x5_1(x))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_average(x))], dim=1)


class _HalveOnce(nn.Module):
    """35 × 35 to 17 × 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, 480 + inputs, …]."""
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), threes, _halve(x)], dim=1)


class _Long(nn.Module):
    """17 × 17: kernels of 7 in rows and columns."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(inputs, 192, 1)
        self.branch7x7_1 = _Convolution(inputs, width, 1)
        self.branch7x7_2 = _row(width, width, 7)
        self.branch7x7_3 = _column(width, 192, 7)
        self.branch7x7dbl_1 = _Convolution(inputs, width, 1)
        self.branch7x7dbl_2 = _column(width, width, 7)
        self.branch7x7dbl_3 = _row(width, width, 7)
        self.branch7x7dbl_4 = _column(width, width, 7)
        self.branch7x7dbl_5 = _row(width, 192, 7)
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, 768, h, w]."""
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], dim=1)


class _HalveAgain(nn.Module):
    """17 × 17 to 8 × 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(inputs, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, 512 + inputs, …]."""
        threes = self.branch3x3_2(self.branch3x3_1(x))
        sevens = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([threes, self.branch7x7x3_4(sevens), _halve(x)], dim=1)


class _Wide(nn.Module):
    """8 × 8: rows and columns side by side.

    Args:
        inputs: channels.
        pool: what its last branch begins with.
    """

    def __init__(self, inputs: int, pool: Any) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Convolution(inputs, 320, 1)
        self.branch3x3_1 = _Convolution(inputs, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = _Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, 2048, h, w]."""
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(once),
                self.branch3x3_2b(once),
                self.branch3x3dbl_3a(twice),
                self.branch3x3dbl_3b(twice),
                self.branch_pool(self.pool(x)),
            ],
            dim=1,
        )


def _is_unused(key: str) -> bool:
    return key.startswith(_UNUSED[0]) or key.endswith(_UNUSED[1])


def _another(name: str, rule: str) -> ConfigError:
    return ConfigError(
        "evaluate.features_file",
        f"holds no weights of Inception: {rule}",
        value=name,
        hint="Take the weights of published FIDs, by torchvision's names of parameters",
    )

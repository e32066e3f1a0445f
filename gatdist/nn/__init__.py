"""Layers with efficient derivatives of every order, for networks with gradient penalties.

The modules and functions replace those of ``torch.nn`` with the same names.
"""

from gatdist.nn.activations import leaky_relu, styled_leaky_relu
from gatdist.nn.bottleneck import bottleneck, conv2d_leaky_relu
from gatdist.nn.casts import shared_casts
from gatdist.nn.convolutions import (
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    conv1d,
    conv2d,
    conv_transpose1d,
    conv_transpose2d,
    slow_layer,
)
from gatdist.nn.derivatives import derivatives_of_gpus, has_derivatives_of_gpus, is_plain
from gatdist.nn.fused import fuses, without_kernels

__all__ = [
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "bottleneck",
    "conv1d",
    "conv2d",
    "conv2d_leaky_relu",
    "conv_transpose1d",
    "conv_transpose2d",
    "derivatives_of_gpus",
    "fuses",
    "has_derivatives_of_gpus",
    "is_plain",
    "leaky_relu",
    "shared_casts",
    "slow_layer",
    "styled_leaky_relu",
    "without_kernels",
]
